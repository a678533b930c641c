import json

import pytest

from benchmarks import bench_generate

SMALL = {"n_layers": 1, "d_model": 64, "n_heads": 2, "n_kv_heads": 1, "d_ff": 96, "max_seq_len": 64}


def test_measures_both_on_the_same_weights_against_the_limit(tmp_path, capsys):
    pytest.importorskip("transformers")
    config = {"model": SMALL, "train": {"total_tokens": 64, "global_batch_tokens": 64}}
    (tmp_path / "small.json").write_text(json.dumps(config))
    arguments = [
        "--configs",
        tmp_path / "small.json",
        "--vocab_size",
        500,
        "--batch_sizes",
        1,
        3,
        "--precisions",
        "fp32",
    ]
    sizes = [
        "--prompt_tokens",
        4,
        "--new_tokens",
        8,
        "--rounds",
        2,
        "--device",
        "cpu",
        "--output",
        tmp_path / "out.json",
    ]
    assert bench_generate.main([str(argument) for argument in [*arguments, *sizes]]) == 0
    lines = json.loads((tmp_path / "out.json").read_text())["lines"]
    assert [(line["config"], line["batch"], line["same_tokens"]) for line in lines] == [
        ("small", 1, 1),
        ("small", 3, 1),
    ]
    matrices = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 96 + 512 * 64  # the padded head is stored whole
    for line in lines:
        slots = line["batch"] * (4 + 8 // 2) * 2 * 32
        assert line["step_bytes"] == 4 * (matrices + 3 * 64 + 2 * 32 + slots)  # the norms of queries and keys, too
        assert line["of_limit"] == pytest.approx(
            line["step_bytes"] / line["read_bytes_per_second"] / (line["step_ms"] / 1e3)
        )
    assert "of limit" in capsys.readouterr().out
