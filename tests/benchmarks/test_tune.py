"""The tuner: what it tries, what it refuses, what it chooses and what it writes; the GPU is played by a fake timer."""

import json
import shutil
import sys

import pytest
import torch

from benchmarks import timing, tune
from benchmarks.cases import FORWARD, Case, Operand, Variant, Work
from benchmarks.timing import Timing
from benchmarks.tune import Trial
from kernels import launch

CPU = torch.device("cpu")
KERNEL = "rms_norm.forward"
TABLES = sorted(launch.TILES.glob("*.json"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_tables_are_written_as_they_stand(path):
    assert tune.text_of(json.loads(path.read_text())) == path.read_text()


@pytest.mark.parametrize("kernel", [f"{path.stem}.{name}" for path in TABLES for name in launch.kernels_of(path.stem)])
def test_every_kernel_has_candidates_of_its_own_parameters(kernel):
    rows = launch.rows(kernel, "sm_90")
    parameters = {key for row in rows for key in row} - {"bytes", "width", "size"}
    for row in rows:
        width, size = tune.call_of(kernel.split(".")[0], row, rows)
        assert row["width"] is None or width <= row["width"]
        tried = tune.candidates(kernel, width)
        assert 1 <= len(tried) <= 60
        assert all(set(tile) == parameters for tile in tried)
        calls = tune.calls(kernel, CPU, row["bytes"], width, min(size, 64))
        # A packed projection has 20 heads, and the packed half of SwiGLU is one of two.
        assert {case.operands[0].shape[-1] for case, _, _ in calls} <= {width, 2 * width, 20 * width}


def test_a_row_is_tuned_at_the_widest_shipped_model_that_takes_it():
    rows = launch.rows(KERNEL, "sm_90")
    widths = {row["width"]: tune.call_of("rms_norm", row, rows)[0] for row in rows}
    assert widths == {128: 128, 512: 512, 1024: 1024, 2048: 2048, 4096: 4096, 8192: 8192}
    split = [{"bytes": 2, "width": 800, "size": None}, {"bytes": 2, "width": 2000, "size": None}]
    assert [tune.call_of("rms_norm", row, split)[0] for row in split] == [768, 1024]


@pytest.fixture
def fake_device(monkeypatch):
    """A kernel whose tile decides the result and the time: fastest 8 rows; 1 does not run, 2 spills, 16 are wrong."""

    def function(x):
        rows = launch.tile(KERNEL, x, 64, 8)["ROWS"]
        assert rows != 1, "out of resources"
        launch_of_the_op(Binary, (1,), x, ROWS=rows)
        return x * (1.1 if rows == 16 else 1.0)

    class Binary:
        n_spills = 0

        def __class_getitem__(cls, grid):
            def run(*_, ROWS, **__):
                binary = cls()
                binary.n_spills = 4 if ROWS == 2 else 0
                return binary

            return run

    def launch_of_the_op(*args, **meta):
        sys.modules["kernels.rms_norm"].launch(*args, **meta)

    def seconds(variants, device, *, samples):
        found = {}
        for name, calls in variants.items():
            rows = forced_rows(calls[0])
            found[name] = Timing(({4: 1.0, 8: 0.9, 16: 0.1}[rows],) * samples, "graph")
        return found

    def forced_rows(call):
        seen, tile = [], launch.tile
        with monkeypatch.context() as patch:
            patch.setattr(launch, "tile", lambda *asked: seen.append(tile(*asked)) or seen[-1])
            call()
        return seen[0]["ROWS"]

    case = Case("rms_norm", "", torch.float32, CPU, (Operand((8, 64)),), Work(), Work(), part=1)
    monkeypatch.setattr(tune, "calls", lambda *_: [(case, FORWARD, Variant(function))])
    monkeypatch.setattr(tune.cases, "draw_behind", lambda *_: [None])
    monkeypatch.setattr(timing, "interleaved", seconds)
    monkeypatch.setattr(tune, "candidates", lambda *_: [{"ROWS": rows, "num_warps": 4} for rows in (1, 2, 4, 8, 16)])


def test_what_does_not_run_spills_or_is_wrong_is_left_out(fake_device):
    row = {"bytes": 4, "width": 1024, "size": None, "ROWS": 4, "num_warps": 4}
    best, trials = tune.tune(KERNEL, row, CPU)
    assert best == Trial({"ROWS": 8, "num_warps": 4}, ratio=0.9)
    assert [(trial.tile["ROWS"], trial.reason) for trial in trials] == [
        (1, "does not run (AssertionError)"),
        (2, "spills"),
        (8, None),
        (16, "computes something else"),
    ]


def test_a_gain_within_the_noise_changes_nothing():
    now, other = {"ROWS": 4}, {"ROWS": 8}
    assert tune.choose([Trial(other, 0.985)], now).tile == now
    assert tune.choose([Trial(other, 0.97), Trial({"ROWS": 2}, reason="spills")], now).tile == other
    assert tune.choose([], now).tile == now


def test_a_better_tile_becomes_this_architectures_own_and_the_others_keep_theirs(tmp_path, monkeypatch, capsys):
    shutil.copy(launch.TILES / "rms_norm.json", tmp_path)
    before = json.loads((tmp_path / "rms_norm.json").read_text())
    better = {"ROWS": 2, "num_warps": 2}

    def found(kernel, row, device):
        now = {key: value for key, value in row.items() if key not in ("bytes", "width", "size")}
        improved = kernel == KERNEL and (row["bytes"], row["width"]) == (2, 512)
        return (Trial(better, 0.8) if improved else Trial(now, 1.0)), [Trial(better, 0.8), Trial(now, reason="spills")]

    monkeypatch.setattr(launch, "TILES", tmp_path)
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tune, "tune", found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert tune.main(["--op", "rms_norm"]) == 0
    out = capsys.readouterr().out
    after = json.loads((tmp_path / "rms_norm.json").read_text())
    expected = {"*": before["forward"]["*"], "sm_90": [dict(row) for row in before["forward"]["*"]]}
    expected["sm_90"][1] = {"bytes": 2, "width": 512, "size": None, **better}
    assert after == {"forward": expected, "backward": before["backward"]}
    assert "ROWS=8 num_warps=4 -> ROWS=2 num_warps=2, 0.80 x the time (2 tried, of which 1 spills)" in out
    assert tune.main(["--op", "rms_norm", "--minutes", "-1"]) == 0
    assert capsys.readouterr().out.count("not tuned, the time was over") == 24


@pytest.mark.skipif(torch.cuda.is_available(), reason="the host has a GPU")
def test_without_a_gpu_it_says_so_in_one_line(capsys):
    assert tune.main([]) == 1
    assert capsys.readouterr().err.count("\n") == 1
