import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kernels
from benchmarks import bench_train, training_step
from llm import device_rates
from llm.config_file import load_config
from llm.training.batch_plan import make_plan

ROOT = Path(__file__).resolve().parent.parent.parent

SMALL = [
    *("model.n_layers=1", "model.d_model=32", "model.n_heads=2", "model.n_kv_heads=1", "model.d_ff=64"),
    *("train.global_batch_tokens=512", "train.device=cpu", "train.precision=fp32", "optimizer.grad_clip=0.5"),
]
ARGUMENTS = shlex.split(
    "--config configs/tiny.json --vocab_size 500 --seq_len 64 --documents 512 --micro_batch 4 --steps 2 --warmup 2"
)


@pytest.fixture
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def without_deepspeed(monkeypatch):
    """Hides the package: whoever imports it fails, as where it is not installed."""
    for name in {"deepspeed", *sys.modules}:
        if name.split(".")[0] == "deepspeed":
            monkeypatch.setitem(sys.modules, name, None)


def plainly(monkeypatch, output):
    """Runs the benchmark as on a host without deepspeed; returns its JSON."""
    without_deepspeed(monkeypatch)
    assert bench_train.main([*ARGUMENTS, "--output", str(output), *SMALL]) == 0
    return json.loads(output.read_text())


def test_measures_a_step_and_states_its_limits(in_root, tmp_path, monkeypatch, capsys):
    result = plainly(monkeypatch, tmp_path / "result.json")
    assert (result["micro_batch"], result["accumulation"], result["steps"]) == (4, 2, 2)
    assert result["tokens_per_second"] == pytest.approx(512 / result["step_seconds"]["median"])
    assert result["matmul_fraction"] == pytest.approx(
        result["tokens_per_second"] * result["flops_per_token"] / result["matmul_flops"]
    )
    assert result["mfu"] is None  # a CPU has no datasheet peak here, and none is made up
    text = capsys.readouterr().out
    assert "datasheet unknown" in text
    assert f"{result['tokens_per_second']:,.0f}" in text


def test_the_matmul_rate_is_the_better_of_one_before_and_one_after_the_steps(in_root, tmp_path, monkeypatch, capsys):
    rates = iter([2e3, 1e3, 1e3, 2e3])
    monkeypatch.setattr(device_rates, "measure_matmul_flops", lambda *_: next(rates))
    for name in ("first.json", "second.json"):
        result = plainly(monkeypatch, tmp_path / name)
        assert result["matmul_flops"] == 2e3
        assert result["matmul_fraction"] == result["tokens_per_second"] * result["flops_per_token"] / 2e3
        assert "Above 100 % of matmul" in capsys.readouterr().out  # no host is as slow as that rate


def test_without_deepspeed_the_same_steps_are_computed(in_root, tmp_path, monkeypatch):
    plain = plainly(monkeypatch, tmp_path / "plain.json")
    output = tmp_path / "deepspeed.json"
    command = [sys.executable, "-m", "benchmarks.bench_train", *ARGUMENTS, "--output", str(output), *SMALL]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert (plain["engine"][:5], result["engine"]) == ("torch", "deepspeed")
    assert result["config"]["deepspeed"]["zero_stage"] == 1
    assert (plain["zero_stage"], result["zero_stage"]) == (0, 0)  # a process alone runs stage 0
    assert "deepspeed, ZeRO 0" in done.stdout
    assert plain["first_loss"] == pytest.approx(result["first_loss"], rel=1e-6)
    assert plain["last_loss"] == pytest.approx(result["last_loss"], rel=1e-5)
    assert plain["last_loss"] < plain["first_loss"] - 0.01  # the steps do update


@pytest.mark.slow
def test_a_sweep_measures_each_combination_by_itself(in_root, tmp_path, capsys):
    output = tmp_path / "sweep.json"
    arguments = [*ARGUMENTS, "--micro_batch", "4", "0", "--checkpointing", "selective", "--output", str(output)]
    assert bench_train.main([*arguments, *SMALL, "train.global_batch_tokens=256"]) == 0
    (result,) = json.loads(output.read_text())
    assert (result["micro_batch"], result["activation_checkpointing"]) == (4, "selective")
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "'0', 'kernels': '', 'checkpointing': 'selective', 'documents': '512'}: failed" in capsys.readouterr().err


def test_a_sweep_sets_kernels_and_documents_for_each_combination(in_root, tmp_path, monkeypatch, capsys):
    """Runs every combination in this process and without deepspeed; the measured figures do not matter here."""
    measured, measure = [], bench_train.measure

    def watched(config, **options):
        measured.append((options["document"], kernels.dispatch.requested()))
        return measure(config, **options)

    def run(command, **_):
        return SimpleNamespace(returncode=bench_train.main(command[3:]), stderr="")

    without_deepspeed(monkeypatch)
    monkeypatch.setattr(bench_train, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(bench_train, "measure", watched)
    output = tmp_path / "sweep.json"
    sweep = ["--kernels", "torch", "auto", "--documents", "whole", "16", "--output", str(output)]
    with kernels.dispatch.using("auto"):
        assert bench_train.main([*ARGUMENTS, *sweep, *SMALL]) == 0
    assert measured == [(document, backend) for backend in ("torch", "auto") for document in (None, 16)]
    results = json.loads(output.read_text())
    assert [result["document_tokens"] for result in results] == [64, 16, 64, 16]
    rows = [line.split()[:4] for line in capsys.readouterr().out.splitlines()[-4:]]
    assert rows == [
        ["4", str(result["document_tokens"]), result["kernels"]["attention"], result["activation_checkpointing"]]
        for result in results
    ]


def test_one_document_a_sequence_and_short_ones_are_both_measured(in_root, tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(bench_train, "measure", lambda config, *, document, **_: made.append(document) or {})
    monkeypatch.setattr(
        bench_train, "sweep", lambda options, combinations: made.extend(each[-1] for each in combinations) or []
    )
    at = ARGUMENTS.index("--documents")
    arguments = ARGUMENTS[:at] + ARGUMENTS[at + 2 :]
    assert bench_train.main([*arguments, *SMALL]) == 1  # the replaced sweep measures nothing
    assert made == ["whole", "512"]
    assert bench_train.main(["--documents", "0", *arguments, *SMALL]) == 1
    assert "--documents 0: write whole or a number of tokens" in capsys.readouterr().err


def test_a_whole_sequence_is_one_document(in_root):
    config = load_config("configs/tiny.json", [*SMALL, "model.vocab_size=500", "data.seq_len=64"])
    plan = make_plan(config, 1, torch.device("cpu"), dtype=torch.float32)
    assert training_step.random_batch(plan, 500, torch.device("cpu"), None)["doc_start"].count_nonzero() == 0


def test_random_documents_begin_where_doc_start_says(in_root):
    config = load_config("configs/tiny.json", [*SMALL, "model.vocab_size=500", "data.seq_len=64"])
    plan = make_plan(config, 1, torch.device("cpu"), dtype=torch.float32)
    torch.manual_seed(0)
    batch = training_step.random_batch(plan, 500, torch.device("cpu"))
    assert {key: tensor.dtype for key, tensor in batch.items()} == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "doc_start": torch.int32,
    }
    assert (batch["input_ids"][:, 1:] == batch["labels"][:, :-1]).all()
    assert (batch["doc_start"].diff(dim=1) >= 0).all()
    assert (batch["doc_start"] <= torch.arange(64)).all()
