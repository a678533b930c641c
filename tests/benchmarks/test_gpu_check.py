"""`make gpu-check`: what each part runs and what makes it fail, tried on the CPU with one small case."""

import importlib
import json
import shlex
from importlib.util import find_spec

import pytest
import torch

import kernels
from benchmarks import bench_generate, bench_kernels, determinism, gpu_check, timing
from benchmarks.cases import rms_norm
from kernels import reference


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """Runs benchmarks in this process and tests not at all; returns the commands."""
    seen = []

    def run(self, name, command, *, at_most):
        seen.append(shlex.join(command))
        module, arguments = command[1], command[2:]
        return 0 if module == "pytest" or command[0] == "setup.py" else importlib.import_module(module).main(arguments)

    monkeypatch.setattr(gpu_check.Check, "run", run)
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setitem(timing.WARMUP_SECONDS, "cpu", 0.0)
    monkeypatch.setattr(timing, "measure_limits", lambda *_, **__: timing.Limits(copy=1e9, matmul=1e10))
    for module in (bench_kernels, determinism):
        monkeypatch.setattr(module, "cases", lambda device: [rms_norm(device, torch.float32, 80, 32)])
    return seen


def test_kernels_part_tests_compares_bits_and_measures(commands, tmp_path, capsys):
    assert gpu_check.main(["kernels", "--device", "cpu"]) == 0
    tests, bits, bench = commands
    assert tests.startswith("-m pytest -q -m gpu -p no:cacheprovider tests/kernels tests/benchmarks/")
    assert "benchmarks.determinism --device cpu" in bits
    assert 300 < int(bench.split("--seconds ")[1].split()[0]) < 60 * 8  # what eight minutes leave
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert found["passed"]
    assert found["determinism"] == {"runs": 10, "different": {"rms_norm 80x32, ours (cpp)": []}}
    assert {f["variant"] for f in found["benchmark"]["figures"]} == {"ours (torch)", "ours (cpp)", "F.rms_norm"}
    assert "rms_norm 80x32, forward+backward" in (tmp_path / "kernels.txt").read_text()
    assert (tmp_path / "bench" / "kernels.png").is_file()


def test_decode_part_tests_and_measures_with_and_without_transformers(commands, tmp_path, monkeypatch, capsys):
    for rival in (True, False):
        monkeypatch.setattr(bench_generate, "RIVAL", rival and find_spec("transformers") is not None)
        assert gpu_check.main(["decode", "--device", "cpu"]) == 0
        build, tests, bench = commands[-3:]
        assert build.startswith("setup.py")
        assert tests.startswith("-m pytest -q -m gpu -p no:cacheprovider tests/llm/inference/test_decode.py")
        assert bench.startswith("-m benchmarks.bench_generate --configs tiny --precisions bf16")
        (found,) = json.loads((tmp_path / "decode.json").read_text())["decode"]
        assert found["lines"][0]["ours_tokens_per_second"] > 0
        assert (found["lines"][0]["ratio"] is not None) == bench_generate.RIVAL
    assert "transformers not installed" in (tmp_path / "decode.txt").read_text()


def test_other_bits_in_another_run_fail_the_part(commands, tmp_path, monkeypatch, capsys):
    noise = iter(range(1, 1000))
    monkeypatch.setattr(
        kernels, "rms_norm", lambda x, weight, **_: reference.rms_norm(x, weight) * (1 + 1e-7 * (next(noise) % 7))
    )
    assert gpu_check.main(["kernels", "--device", "cpu"]) == 1
    assert "rms_norm 80x32, ours (cpp): 10 runs, differ: [0, 1, 2]" in capsys.readouterr().out
    assert "FAILED: the same bits in ten runs" in (tmp_path / "kernels.txt").read_text()


def test_a_missing_plugin_of_pytest_is_named_and_the_rest_runs(commands, tmp_path, monkeypatch, capsys):
    (tmp_path / "test_laws.py").write_text("from hypothesis import given\n")
    (tmp_path / "test_plain.py").write_text("import torch\n")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    check = gpu_check.Check("kernels", tmp_path, config="", device="cpu")
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None if name in ("hypothesis", "xdist") else object())
    gpu_check.gpu_tests(check, ["."])
    assert check.lines == ["hypothesis is not installed here; its tests are left out: test_laws.py"]
    assert commands == ["-m pytest -q -m gpu -p no:cacheprovider . --ignore=test_laws.py"]
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None)
    gpu_check.gpu_tests(check, ["."])
    assert check.lines[-1] == "FAILED: pytest is not installed here: the tests marked gpu did not run"
    assert not check.passed


@pytest.mark.skipif(torch.cuda.is_available(), reason="the host has a GPU")
@pytest.mark.parametrize("part", gpu_check.PARTS)
def test_without_a_gpu_it_says_so_in_one_line(part, capsys):
    assert gpu_check.main([part]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def result_of(command, one):
    """What bench_train writes: an object for one combination, else a list."""
    values = command[command.index("--documents") + 1 :] if "--documents" in command else ["whole", "512"]
    number = next((i for i, word in enumerate(values) if word.startswith("--")), len(values))
    return one if number == 1 else [one] * number


def test_train_part_measures_both_kinds_of_documents(commands, tmp_path, monkeypatch):
    committed = json.loads((gpu_check.ROOT / "benchmarks" / "results" / "train-sweep.json").read_text())[0]

    def measured(self, name, command, *, at_most):
        if "--output" in command:
            file = tmp_path / f"train-{name.split()[-1]}.json"
            file.write_text(json.dumps(result_of(command, {"document_tokens": 512, **committed})))
        return 0

    monkeypatch.setattr(gpu_check.Check, "run", measured)
    assert gpu_check.main(["train", "--device", "cpu"]) == 0
    assert len(json.loads((tmp_path / "train.json").read_text())["train"]) == 6


def test_an_exception_leaves_the_parts_results(commands, tmp_path, monkeypatch, capsys):
    def fail(check):
        check.say("a result")
        raise ZeroDivisionError("a rate of 0")

    monkeypatch.setitem(gpu_check.PARTS, "kernels", gpu_check.PARTS["kernels"]._replace(measure=fail))
    assert gpu_check.main(["kernels", "--device", "cpu"]) == 1
    assert (tmp_path / "kernels.txt").read_text() == "a result\nFAILED: ZeroDivisionError: a rate of 0\n"
    assert not json.loads((tmp_path / "kernels.json").read_text())["passed"]


def test_plan_part_holds_what_is_planned_against_what_is_taken(commands, tmp_path, monkeypatch):
    def measured(self, name, command, *, at_most):
        if "--output" in command:
            (tmp_path / "plan-measured.json").write_text(json.dumps(result_of(command, {"memory_bytes": 10**9})))
        return 0

    monkeypatch.setattr(gpu_check.Check, "run", measured)
    tiny = str(gpu_check.ROOT / "configs" / "tiny.json")
    assert gpu_check.main(["plan", "--device", "cpu", "--config", tiny]) == 0
    found = {entry["name"]: entry["predicted"] for entry in json.loads((tmp_path / "plan.json").read_text())["plan"]}
    assert found["none, micro-batch 8"] > found["selective, micro-batch 8"] > found["full, micro-batch 8"]
    assert found["none, micro-batch 8"] > found["none, micro-batch 4"]
    assert "GB planned, 1.00 measured" in (tmp_path / "plan.txt").read_text()
