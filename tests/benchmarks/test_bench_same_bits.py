"""bench_same_bits compares two engines step by step, and their memory in launches of their own."""

import json
from pathlib import Path

import pytest

from benchmarks import bench_same_bits
from benchmarks.bench_same_bits import table


def test_the_table_has_a_line_for_each_number_of_processes() -> None:
    one = {"config": "tiny.json", "optimizer": "muon", "precision": "bf16", "processes": 2, "micro_batches": 8}
    one |= {"micro_batch": 4, "seq_len": 512, "wall_ratio": 1.01, "processor_ratio": 1.02, "load": 3.4}
    one |= {"processor_ratios": [0.99, 1.05], "memory_ratio": 1.1}
    assert table([one]).splitlines()[2] == (
        "| tiny.json | muon, bf16 | 2 | 8 x 4 x 512 | 1.010 | 1.020 (0.990 to 1.050) | 1.100 | 3 |"
    )


@pytest.mark.slow
def test_two_processes_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["model.n_layers=1", "model.d_model=32", "model.d_ff=64", "train.micro_batch=1"]
    arguments = ["--processes", "2", "--pairs", "2", "--vocab_size", "500", "--seq_len", "64"]
    output = ["--output", str(tmp_path / "out.json")]
    bench_same_bits.main([*arguments, *output, "--memory", "--overrides", *small, "train.global_batch_tokens=512"])
    (found,) = json.loads((tmp_path / "out.json").read_text())
    assert (found["processes"], found["micro_batches"], found["pairs"]) == (2, 8, 2)
    assert min(found["wall_ratio"], found["processor_ratio"], found["memory_ratio"]) > 0.3
    assert "| tiny.json | muon, " in capsys.readouterr().out
