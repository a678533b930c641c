"""`make gpu-check PART=day-one`: steps that hang or fail stop nothing, and the table says what was measured."""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from benchmarks import day_one
from benchmarks.cases import MODES, cases
from benchmarks.day_one import STDOUT, Call, Step, figures, judge, rows, steps, table
from llm.config_file import load_config

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def call(tmp_path):
    (tmp_path / "scratch").mkdir()
    with open(tmp_path / "log.txt", "w") as log:
        yield Call(tmp_path, tmp_path / "scratch", log, seconds=60)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(day_one, "END_GRACE", 0.3)


def python(name, program, *, share=1.0, seconds=20.0, **options):
    return Step(name, share, seconds, ("-c", program), **options)


def found(folder):
    return json.loads((folder / "day-one.json").read_text())


def test_a_step_that_hangs_is_ended_with_its_children_and_the_next_one_runs(call, tmp_path, impatient):
    child = tmp_path / "child"
    hang = (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(child)!r}, 'w').write(str(child.pid)); time.sleep(600)"
    )
    call.run(python("hangs", hang, seconds=2.0, result=STDOUT))
    call.run(python("works", "print('a line'); print('{\"x\": 1}')", result=STDOUT))
    assert [each["outcome"] for each in found(tmp_path)["steps"]] == ["over its 2 seconds, no result", "exit code 0"]
    assert found(tmp_path)["works"] == {"x": 1}
    end = time.monotonic() + 10
    while time.monotonic() < end and _alive(int(child.read_text())):
        time.sleep(0.05)
    assert not _alive(int(child.read_text()))


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_late_step_can_still_write_what_it_has(call, tmp_path, monkeypatch):
    monkeypatch.setattr(day_one, "END_GRACE", 5)
    late = "import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: print('{\"half\": 1}')"
    call.run(python("late", late, seconds=8.0, result=STDOUT))
    assert found(tmp_path)["late"] == {"half": 1}


def test_a_step_that_fails_is_named_and_its_output_kept(call, tmp_path):
    call.run(python("fails", "print('why'); raise SystemExit(3)", result="never.json"))
    assert found(tmp_path)["steps"][0]["outcome"] == "exit code 3, no result"
    assert "why" in (tmp_path / "log.txt").read_text()


def test_output_of_the_tests_is_a_file_of_its_own(call, tmp_path):
    call.run(python("tests", "print('FAILED one'); raise SystemExit(1)", stdout="tests.txt"))
    assert (tmp_path / "tests.txt").read_text() == "FAILED one\n"


def test_no_step_begins_after_the_end(call, tmp_path):
    call._end = time.monotonic() + 1
    call.run(python("late", f"open({str(tmp_path / 'began')!r}, 'w')"))
    assert found(tmp_path)["steps"][0]["outcome"] == "no time was left"
    assert not (tmp_path / "began").exists()


def test_the_whole_call_survives_a_build_that_fails_and_leaves_at_most_eight_files(
    tmp_path, monkeypatch, impatient, capsys
):
    begin = Call.begin

    def without_build(self, command, stdout=None):
        return begin(self, ("-c", "raise SystemExit(1)") if command[0] == "setup.py" else command, stdout)

    listed = [python(step.name, "print('{}')", result=STDOUT) for step in steps("configs/125m.json", "cpu", tmp_path)]
    monkeypatch.setattr(Call, "begin", without_build)
    monkeypatch.setattr(day_one, "steps", lambda *_: iter(listed))
    monkeypatch.setattr(day_one, "machine", lambda: {})
    assert day_one.day_one(tmp_path / "out", "configs/125m.json", "cpu") == 1
    outcomes = {each["step"]: each["outcome"] for each in found(tmp_path / "out")["steps"]}
    assert outcomes.pop("build") == "exit code 1"
    assert set(outcomes.values()) == {"exit code 0"}
    assert len(os.listdir(tmp_path / "out")) <= 8
    assert "\ntraining 1.3b " in capsys.readouterr().out


def test_the_steps_name_commands_and_configs_that_exist(tmp_path):
    listed = list(steps("configs/125m.json", "cpu", tmp_path))
    names = [step.name for step in listed]
    assert names[-1] == "compiled rivals"  # the slowest rivals come last
    for step in listed:
        assert step.command[0] == "-m"
        if "--config" in step.command:
            config = step.command[step.command.index("--config") + 1]
            changes = [each for each in step.command if "=" in each]
            load_config(ROOT / config, changes)
        for path in (each for each in step.command if each.startswith("tests/")):
            assert (ROOT / path).exists()


def test_the_shares_fit_into_the_call(tmp_path):
    listed = list(steps("configs/125m.json", "cpu", tmp_path))
    assert sum(step.share for step in listed) <= day_one.SECONDS - 60
    assert all(step.share <= step.seconds for step in listed)


@pytest.mark.parametrize("seconds", [day_one.SECONDS, 200.0])
def test_no_step_takes_the_share_of_a_later_one(call, tmp_path, seconds):
    listed = list(steps("configs/125m.json", "cpu", tmp_path))
    clock = iter([])
    call.left = lambda: next(clock)
    left, scale = seconds, min(1.0, seconds / sum(step.share for step in listed))
    for place, step in enumerate(listed):  # each takes all that it may
        clock = iter([left])
        limit = call.limit(step, sum(each.share for each in listed[place + 1 :]))
        assert limit >= 0.999 * scale * step.share
        left -= limit
    assert left >= -1e-6


def test_the_kernel_benchmark_is_told_what_is_left(call, tmp_path):
    call.run(Step("bench", 1.0, 40.0, ("-c", "import sys; print(sys.argv[1])", "{left}"), STDOUT))
    assert found(tmp_path)["bench"] == 40 - day_one.BENCH_SECONDS


def kernels(*figures_):
    keys = ("op", "case", "mode", "variant", "seconds", "fraction", "flops")
    return {"matmul_flops": 8e14, "figures": [dict(zip(keys, each, strict=True)) for each in figures_]}


ATTENTION = ("attention", "8x4096 16/8x128 causal", "forward")


def row(name):
    return next(each for each in rows() if each.name == name)


def test_a_row_of_a_kernel_is_its_rate_its_share_of_the_limit_and_the_best_rival():
    results = {
        "kernels": kernels(
            (*ATTENTION, "ours (triton)", 1.0, 0.5, 4.2e14),
            (*ATTENTION, "SDPA", 0.9, 0.55, 4.2e14),
            (*ATTENTION, "varlen", None, None, 4.2e14),
        ),
        "compiled rivals": kernels(
            (*ATTENTION, "ours (triton)", 2.0, 0.5, 4.2e14), (*ATTENTION, "torch.compile", 1.4, 0.6, 4.2e14)
        ),
    }
    entry = judge(row("attention forward hd128 4k"), results)
    assert (entry["measured"], entry["verdict"]) == (420.0, "accept")
    assert entry["of_limit"] == pytest.approx(420 / 800)
    assert (entry["relative_to_best_rival"], entry["best_rival"]) == (0.7, "torch.compile")  # each beside its own ours
    results["kernels"]["figures"][0]["seconds"] = 4.2e14 / 5.4e14
    assert judge(row("attention forward hd128 4k"), results)["verdict"] == "aim"
    results["kernels"]["figures"][0]["seconds"] = 1.1
    assert judge(row("attention forward hd128 4k"), results)["verdict"] == "below"


def test_of_our_variants_the_fastest_counts():
    case = ("cross_entropy", "8192x32000", "forward+backward")
    results = {"kernels": kernels((*case, "ours (triton)", 2.0, 0.4, 1.0), (*case, "ours, in place", 1.0, 0.8, 1.0))}
    ours, others = figures(results, "kernels", case)
    assert (ours["variant"], others) == ("ours, in place", [])
    assert judge(row("cross-entropy, gradient 32,000"), results)["measured"] == 80.0


def test_plain_torch_is_neither_ours_nor_a_rival():
    case = ("attention", "8x4096 16/8x128 causal", "forward")
    results = {"kernels": kernels((*case, "ours (torch)", 0.5, 0.9, 1.0), (*case, "ours (triton)", 1.0, 0.5, 1.0))}
    ours, others = figures(results, "kernels", case)
    assert (ours["variant"], others) == ("ours (triton)", [])


def test_where_less_is_better_the_limits_are_upper_ones():
    results = {"plan": {"memory_bytes": 104, "tokens_per_second": 100}, "train": {"memory_bytes": 100}}
    assert judge(row("plan: memory off by"), results)["verdict"] == "accept"
    results["plan"]["memory_bytes"] = 94
    assert judge(row("plan: memory off by"), results)["verdict"] == "below"
    assert judge(row("plan: tokens/s off by"), results)["verdict"] == "not measured"
    # Too fast and too slow count alike.
    for measured, verdict in (
        (109, "aim"),
        (92, "aim"),
        (115, "accept"),
        (89, "accept"),
        (120, "below"),
        (85, "below"),
    ):
        results["train"]["tokens_per_second"] = measured
        assert judge(row("plan: tokens/s off by"), results)["verdict"] == verdict
    assert judge(row("ops that disagree"), {"doctor": {"failed": []}})["verdict"] == "aim"
    assert judge(row("ops that disagree"), {"doctor": {"failed": ["rope in bf16"]}})["verdict"] == "below"


def test_a_row_without_its_result_is_not_measured_and_never_a_number():
    entries = [judge(each, {}) for each in rows()]
    assert {entry["verdict"] for entry in entries} == {"not measured"}
    assert {entry["measured"] for entry in entries} == {None}
    missing = {"decode": {"lines": [{"config": "125m", "batch": 1, "of_limit": 0.2, "ratio": None}]}}
    assert judge(row("decoding 125m to transformers"), missing)["verdict"] == "not measured"
    assert judge(row("decoding 125m batch 1"), missing)["measured"] == 20.0
    assert all(len(line) <= 80 for line in table(entries).splitlines())


def test_the_rows_cases_are_those_of_the_kernel_benchmark(monkeypatch):
    """A row of a case that the benchmark does not have would never be measured."""
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self)  # there is no GPU here
    listed = [(case.op, case.name) for case in cases(torch.device("cuda"))]
    asked = [each.case for each in rows() if each.case]
    assert len(asked) == 12
    # They come first, so that the time is never over before them.
    first = {case[:2] for case in asked}
    assert set(listed[: len(first)]) == first
    for op, name, mode in asked:
        assert (op, name) in listed
        assert mode in (*MODES, "backward")
