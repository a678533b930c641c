"""`llm doctor`: what it says of the machine, and that a kernel which computes something else does not pass."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from running import environment, result_of, run_llm, torchrun

import kernels
from kernels import dispatch
from kernels.parity import digest
from llm.tools import doctor_folders
from llm.tools.doctor_bits import compare_bits

Llm = Callable[..., tuple[int, str, str]]
SETTINGS = {"model__d_model": 64, "model__n_heads": 4, "model__n_kv_heads": 2}
OPS = [*dispatch.OPS] * 2  # in two dtypes


@pytest.fixture(autouse=True)
def _no_backend_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLM_KERNELS", raising=False)
    monkeypatch.setattr(doctor_folders, "PROBE_BYTES", doctor_folders.BLOCK)  # to save seconds


@pytest.fixture
def config(write_config: Callable[..., Path]) -> Path:
    return write_config(**SETTINGS)


def test_the_machine(llm_here: Llm) -> None:
    code, out, _ = llm_here("doctor", "--seconds", 0.05)
    assert code == 0
    for said in (
        f"torch       {torch.__version__}",
        "deepspeed",
        "cpu",
        "llm.data._shards loads",
        "kernels     cpp: ",
    ):
        assert said in out
    code, out, err = llm_here("doctor", "--seconds", 0.05, "--json")
    result = json.loads(out)
    assert code == 0
    assert result["failed"] == []
    assert result["versions"]["torch"] == torch.__version__
    assert set(result["kernels"]) == set(dispatch.OPS)
    assert "llm.data._shards loads" in err
    assert {finding["part"]: finding["level"] for finding in result["findings"]}["gpu"] == "warning"
    assert "gpu         WARNING: none" in err
    assert err.endswith(f"\nnothing is wrong; warnings: {', '.join(result['warnings'])}\n")
    assert {"matmul", "copy", "write", "read", "memory", "shm"} <= set(result["measured"])


@pytest.mark.parametrize(
    ("value", "said"), [("triton", "LLM_KERNELS=triton: Triton needs an NVIDIA device"), ("cuda", "unknown backend")]
)
def test_a_backend_that_cannot_run_fails(
    llm_here: Llm, config: Path, monkeypatch: pytest.MonkeyPatch, value: str, said: str
) -> None:
    monkeypatch.setenv("LLM_KERNELS", value)
    code, out, err = llm_here("doctor", "--seconds", 0.05)
    assert code == 1
    assert said in out
    assert err == "error: failed: kernels; see above\n"
    code, out, err = llm_here("doctor", "--kernels", "--config", config)
    assert (code, out) == (1, "")
    assert said in err


@pytest.mark.parametrize(
    ("asked", "backends"),
    [([], ["cpp", "torch"]), (["--backend", "cpp"], ["cpp"]), (["--backend", "torch"], ["torch"])],
)
def test_every_op_agrees_here_by_every_backend(
    llm_here: Llm, config: Path, asked: list[str], backends: list[str]
) -> None:
    code, out, err = llm_here("doctor", "--kernels", "--config", config, "--json", *asked)
    assert code == 0, err
    result = json.loads(out)
    checked = [(check["op"], check["backend"]) for check in result["checks"]]
    assert checked == [(op, backend) for op in OPS for backend in backends]
    assert all(check["agrees"] for check in result["checks"])
    assert {check["dtype"] for check in result["checks"]} == {"bf16", "fp32"}
    attention = result["checks"][0]
    assert attention["size"] == "2 x 64 tokens, heads of 16, 2 to each of 2 KV"
    assert [one["name"] for one in attention["results"]] == ["output 0", *(f"gradient of {x}" for x in "qkv")]
    count = len(OPS) * len(backends)
    assert f"{count} of {count} agree" in err
    _, table = err.split("errors ")
    assert max(map(len, table.splitlines())) <= 80
    assert "swiglu               128 rows of 2 x 64\n" in table
    assert kernels.dispatch.requested() == "auto"


@pytest.mark.slow
def test_the_kernels_in_the_interpreter(config: Path) -> None:
    env = environment() | {"TRITON_INTERPRET": "1"}
    done = run_llm("doctor", "--kernels", "--config", config, "--backend", "triton", "--json", env=env)
    checks = result_of(done)["checks"]
    assert [(check["op"], check["backend"]) for check in checks] == [(op, "triton") for op in OPS]
    assert {check["dtype"] for check in checks} == {"fp16", "fp32"}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda y: y * 1.02, "WRONG\n    output 0, gradient of gate_up\n"),
        (lambda y: y.detach() + 0 * y, "WRONG\n    gradient of gate_up\n"),
        (lambda y: y * torch.nan, "nan"),
        (lambda y: y[:-1], "AssertionError: output 0 is"),
        (lambda y: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
    ids=["values", "gradient", "NaN", "shape", "raises"],
)
def test_a_wrong_kernel_fails_and_the_others_are_still_checked(
    llm_here: Llm, config: Path, monkeypatch: pytest.MonkeyPatch, wrong, said: str
) -> None:
    true = kernels.swiglu
    monkeypatch.setattr(kernels, "swiglu", lambda x, **options: wrong(true(x, **options)))
    code, out, err = llm_here("doctor", "--kernels", "--config", config, "--json")
    assert code == 1
    result = json.loads(out)
    assert result["failed"] == ["swiglu in bf16", "swiglu in fp32"]
    assert [check["op"] for check in result["checks"]] == [op for op in OPS for _ in ("cpp", "torch")]
    assert said in err
    assert err.endswith("error: failed: swiglu in bf16, swiglu in fp32; see above\n")


def test_what_triton_does_not_cover_is_shown_with_torch(
    llm_here: Llm, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = {op: {"backend": "triton", "reason": "a test says so"} for op in dispatch.OPS}
    monkeypatch.setattr(kernels, "describe", lambda device: described)
    code, out, _ = llm_here("doctor", "--kernels", "--config", config, "--json")
    assert code == 0
    assert {check["backend"] for check in json.loads(out)["checks"]} == {"torch"}
    monkeypatch.setenv("LLM_KERNELS", "triton")
    for asked in ([], ["--backend", "triton"]):
        code, out, _ = llm_here("doctor", "--kernels", "--config", config, "--json", *asked)
        assert code == 1
        assert len(json.loads(out)["failed"]) == len(OPS)


def test_a_vocabulary_that_nothing_states_is_said_to_be_assumed(
    llm_here: Llm, write_config: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_config(**SETTINGS, data__path=str(tmp_path / "none"), model__max_seq_len=8)
    code, out, err = llm_here("doctor", "--kernels", "--config", path)
    assert code == 0, err
    assert "vocabulary 32,000, sequences of 8 tokens (a vocabulary assumed" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kernels"], "--kernels needs --config"),
        (["--config", "tiny.json"], "tiny.json: no such config file"),
        (["--backend", "torch"], "add --kernels"),
        (
            ["--kernels", "--config", "CONFIG", "--seconds", "1"],
            "--seconds does not go with --kernels",
        ),
        (["--kernels", "--config", "none.json"], "none.json: no such config file"),
        (["--kernels", "--config", "CONFIG", "--backend", "triton"], "--backend triton: Triton needs an NVIDIA device"),
    ],
)
def test_what_cannot_be_checked_is_refused(llm_here: Llm, config: Path, arguments: list[str], said: str) -> None:
    code, out, err = llm_here("doctor", *(config if word == "CONFIG" else word for word in arguments))
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err


def test_a_rank_with_other_bits_is_named() -> None:
    lines: list[str] = []
    right = {"swiglu in bf16 by cpp, output 0": "01", "product": "02"}
    result = compare_bits([(right, []), (right | {"product": "03"}, []), (right, ["rope in fp32"])], lines.append)
    assert result["ranks"] == {"size": 3, "same_bits": False, "other": {"1": ["product"]}}
    assert result["failed"] == ["rope in fp32 (rank 2)", "rank 1 computes other bits"]
    assert lines == ["rank 1      OTHER BITS than most ranks: product"]
    assert compare_bits([(right, []), (right, [])], lines.append)["failed"] == []
    assert lines[-1] == "the same bits on all 2 ranks: 2 results"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_digest_changes_with_every_bit_and_place(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    other, moved = x.clone(), x.flip(1)
    other[2, 7] = -other[2, 7]
    zeros = torch.zeros(150, dtype=dtype)
    digests = [digest(one) for one in (x, other, moved, zeros, -zeros)]
    assert len(set(digests)) == 5
    monkeypatch.setattr("kernels.parity.DIGESTED_AT_ONCE", 64)
    assert [digest(one) for one in (x, other, moved, zeros, -zeros)] == digests


@pytest.mark.slow
def test_under_a_launcher_all_ranks_compute_the_same_bits(config: Path) -> None:
    found = result_of(torchrun(2, "llm", "doctor", "--kernels", "--config", config, "--json"))
    assert found["ranks"] == {"size": 2, "same_bits": True, "other": {}}
    assert found["failed"] == []
    assert result_of(torchrun(2, "llm", "doctor", "--json"))["failed"] == []
