"""The kernel benchmark: what it counts, how it takes time, that it notices wrong results, and what it writes."""

import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import kernels
from benchmarks import bench_kernels, cases, rivals, timing
from benchmarks.cases import BOTH, FORWARD, Variant, check
from benchmarks.timing import Limits, Timing
from kernels import reference
from kernels.parity import disagreements

ROOT = Path(__file__).resolve().parent.parent.parent
CPU = torch.device("cpu")
LIMITS = Limits(copy=1e9, matmul=1e10)


@pytest.fixture
def quick(monkeypatch):
    """Limits without measuring them, and no warm-up."""
    monkeypatch.setattr(timing, "measure_limits", lambda *_, **__: LIMITS)
    monkeypatch.setitem(timing.WARMUP_SECONDS, "cpu", 0.0)


def bench(folder, *arguments):
    options = ["--device", "cpu", "--samples", "3", "--output", str(folder), *arguments]
    return bench_kernels.main(options)


def test_tables_json_and_picture(quick, tmp_path, capsys):
    wanted = ["--cases", "^rms_norm|^cross_entropy|attention .*documents", "--variants", "ours|F[.]|SDPA flash"]
    bench(tmp_path, *wanted)
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
    assert (report["copy_bytes_per_second"], report["matmul_flops"]) == (1e9, 1e10)
    assert re.search(r"rms_norm 512x256, forward\+backward\n", out)
    assert (tmp_path / "kernels.txt").read_text().splitlines()[3:8] == out.splitlines()[3:8]
    measured = [f for f in report["figures"] if f["seconds"] is not None]
    assert {(f["op"], f["mode"]) for f in measured} == {
        ("attention", "forward"),
        ("attention", "forward+backward"),
        ("attention", "backward"),
        ("rms_norm", "forward"),
        ("rms_norm", "forward+backward"),
        ("rms_norm", "backward"),
        ("cross_entropy", "forward"),
        ("cross_entropy", "forward+backward"),
    }
    for f in measured:
        limit = max(f["moved_bytes"] / 1e9, f["flops"] / 1e10)
        assert f["fraction"] == pytest.approx(limit / f["seconds"])
        assert f["agrees"]
        assert f["method"] == ("difference" if f["mode"] == "backward" else "clock")
        assert f"{1e6 * f['seconds']:,.1f}" in out
    # The table gives the reason for a rival that cannot run.
    assert {f["reason"] for f in report["figures"] if f["variant"] == "SDPA flash"} == {"it knows no documents"}
    assert "SDPA flash                  it knows no documents" in out


def test_what_is_not_measured_for_want_of_time_is_listed(quick, tmp_path, capsys):
    assert bench(tmp_path, "--cases", "^rope", "--seconds", "-1") == 0
    assert capsys.readouterr().out.count("not run: the time was over") == 2


def test_a_wrong_or_broken_kernel_of_ours_fails_the_run(quick, tmp_path, capsys, monkeypatch):
    def wrong(x, weight, **_):
        return reference.rms_norm(x + 0.01 * (x - x.detach()), weight)  # in the gradient of x alone

    monkeypatch.setattr(kernels, "rms_norm", wrong)
    assert bench(tmp_path, "--cases", "^rms_norm", "--variants", "ours .cpp|F.rms") == 1
    out = capsys.readouterr().out
    assert re.findall(r"FAILED: (.*, ours)", out) == [f"rms_norm 512x256, {mode}, ours" for mode in (BOTH, "backward")]
    assert re.search(r"ours \(cpp\).*DISAGREES with the reference", out)
    assert not re.search(r"F.rms_norm.*DISAGREES", out)
    monkeypatch.setattr(kernels, "rms_norm", lambda *_, **__: 1 / 0)
    assert bench(tmp_path, "--cases", "^rms_norm", "--variants", "ours .cpp|F.rms") == 1
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().out


@pytest.mark.parametrize("case", [*cases.cases(CPU)], ids=str)
def test_the_check_sees_every_output_and_every_gradient(case):
    name, build = next(iter(rivals.variants(case, BOTH).items()))
    assert name == "ours (cpp)"

    def bent(extras, place):
        """Our results with one of them wrong, in the last row alone."""

        def function(*operands):
            found = list(cases.results(build(extras), BOTH, list(operands), behind))
            found[place] = found[place].clone(memory_format=torch.contiguous_format)
            found[place].view(-1)[-1:] += 0.1 * found[place].abs().max()
            return tuple(found)

        return Variant(function, whole=True)

    behind = cases.draw_behind(case, 1)
    for gradient in behind:
        if gradient is not None:
            gradient[: -case.part] = 0.0
    agreed = check(case, build, BOTH)
    assert all(result.agrees for result in agreed), disagreements(agreed)
    assert [result.name for result in check(case, build, FORWARD)] == [r.name for r in agreed if "output" in r.name]
    for place in range(len(agreed)):
        wrong = [result.name for result in check(case, partial(bent, place=place), BOTH) if not result.agrees]
        assert wrong == [agreed[place].name]


def test_what_is_counted():
    half = torch.bfloat16
    full = cases.attention(CPU, half, 2, 64, 6, 2, 16)
    assert full.forward.flops == 4 * 16 * 6 * 2 * (64 * 65 / 2)
    assert full.backward.flops == 2.5 * full.forward.flops
    assert full.forward.moved == 2 * 64 * (6 + 2 + 2 + 6) * 16 * 2
    packed = cases.attention(CPU, half, 2, 64, 6, 2, 16, documents=True)
    seen = reference.attention_allowed(packed.by_row["doc_start"], 64, 64, True, CPU)
    assert packed.forward.flops == 4 * 16 * 6 * int(seen.sum())
    norm, added = cases.rms_norm(CPU, half, 8, 32), cases.add_rms_norm(CPU, half, 8, 32)
    assert (norm.forward.moved, norm.backward.moved) == (4 * 8 * 32, 6 * 8 * 32)
    assert (added.forward.moved, added.backward.moved) == (8 * 8 * 32, 8 * 8 * 32)
    head = cases.linear_cross_entropy(CPU, half, 8, 16, 100)
    assert head.work(BOTH).flops == 6 * 8 * 16 * 100
    logits = cases.cross_entropy(CPU, half, 8, 100)
    assert (logits.work(FORWARD).moved, logits.work(BOTH).moved) == (2 * 8 * 100, 4 * 8 * 100)
    assert LIMITS.bound(100, 100) == "copy"


def test_documents_are_as_long_as_stated():
    start = cases.document_starts(64, 2048)
    place = torch.arange(2048)
    assert start.dtype == torch.int32
    assert (start.diff(dim=1) >= 0).all()
    assert (start <= place).all()
    edges = (start == place).flatten().nonzero()[:, 0].diff().float()  # also cut by the sequences' own edges
    assert 300 < float(edges.median()) < 500
    assert (start[1:, 0] == 0).all()  # the first document of a sequence may have begun in an earlier one


def test_inputs_rotate_through_more_than_the_cache(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 50_000_000)
    assert timing.input_sets(40_000_000, gpu) == 3
    assert timing.input_sets(400_000_000, gpu) == 1
    assert timing.calls_a_replay(3, 20e-6, gpu) == 27  # half a millisecond or more, each set equally often
    assert timing.calls_a_replay(1, 1.0, gpu) == 1
    assert timing.calls_a_replay(3, 1e-9, gpu) == 63


def test_variants_are_interleaved_and_a_failure_stays_its_own(monkeypatch):
    monkeypatch.setitem(timing.WARMUP_SECONDS, "cpu", 0.0)
    order = []
    calls = {"a": [partial(order.append, "a")] * 2, "broken": [lambda: 1 / 0], "b": [partial(order.append, "b")]}
    found = timing.interleaved(calls, CPU, samples=3)
    assert order == ["a", "a", "b"] + ["a", "a", "b"] * 3
    assert isinstance(found["broken"], ZeroDivisionError)
    assert len(found["a"].samples) == 3


def test_on_a_gpu_each_limit_is_that_of_the_faster_method(monkeypatch):
    taken = {True: {"copy": 4.0, "matmul": 1.0}, False: {"copy": 2.0, "matmul": 3.0}}
    asked = []

    def interleaved(calls, device, *, samples, capture):
        for each in calls.values():
            each[0]()
        asked.append(capture)
        return {name: Timing((seconds,) * samples, "") for name, seconds in taken[capture].items()}

    monkeypatch.setattr(timing, "interleaved", interleaved)
    limits = timing.measure_limits(CPU, torch.float32, samples=3)
    assert asked == [False]
    assert (limits.copy, limits.matmul) == (2 * 4 * (2**25 // 4) / 2.0, 2 * 512**3 / 3.0)
    small = torch.zeros(2, 2)
    for owner, name in ((torch, "randn"), (torch, "empty_like"), (torch.Tensor, "to"), (torch, "mm")):  # no GPU here
        monkeypatch.setattr(owner, name, lambda *_, **__: small)
    limits = timing.measure_limits(torch.device("cuda"), torch.bfloat16, samples=3)
    assert asked[1:] == [True, False]
    assert (limits.copy, limits.matmul) == (2 * small.nbytes / 2.0, 2 * 8192**3 / 1.0)


def test_medians_and_quantiles():
    taken = Timing(tuple(float(x) for x in (5, 1, 4, 2, 3)), "clock")
    assert (taken.median, taken.quantile(0.2), taken.quantile(0.8)) == (3, 2, 5)


def test_pytest_benchmark_times_each_variant(tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/bench_kernels.py"]
    command += ["-k", "rope and not norm_rope and forward and (cpp or Liger) and not backward"]
    command += ["--benchmark-json", tmp_path / "pytest.json"]
    # pytest-benchmark measures nothing in a worker of xdist.
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 1 skipped" in done.stdout
    assert "it is not installed" in done.stdout  # the reason of the skip
    (timed,) = json.loads((tmp_path / "pytest.json").read_text())["benchmarks"]
    assert re.fullmatch("rope .*, forward", timed["group"])
    assert timed["stats"]["rounds"] == bench_kernels.SAMPLES["cpu"]
    assert timed["stats"]["min"] > 0
    assert timed["extra_info"]["moved"] > 0


@pytest.mark.gpu
def test_device_time_is_of_graph_replays():
    x, gpu = torch.randn(2**24, device="cuda"), torch.device("cuda")
    calls = {"copy": [x.clone] * 4, "waits": [lambda: float(x.sum())]}
    found = timing.interleaved(calls, gpu, samples=5)
    assert (found["copy"].method, found["waits"].method) == ("graph", "events")
    assert timing.interleaved({"copy": calls["copy"]}, gpu, samples=5, capture=False)["copy"].method == "events"
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(100):
        x.clone()
    torch.cuda.synchronize()
    assert found["copy"].median < (time.perf_counter() - begin) / 100 * 1.5


@pytest.mark.gpu
def test_our_kernels_run_from_graphs_and_agree_with_the_references_at_full_size(tmp_path, monkeypatch):
    first = {case.op: case for case in reversed([*cases.cases(torch.device("cuda"))])}
    monkeypatch.setattr(bench_kernels, "cases", lambda device: first.values())
    options = ["--samples", "5", "--variants", "ours .triton|in place", "--output", str(tmp_path)]
    assert bench_kernels.main(options) == 0
    figures = json.loads((tmp_path / "kernels.json").read_text())["figures"]
    assert {f["op"] for f in figures} == set(first)
    assert {f["method"] for f in figures} == {"graph", "difference"}
