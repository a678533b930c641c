"""The measurement of preparation runs, compares what it says it compares, and a preparation keeps to its memory."""

import json
import random
from pathlib import Path

import pytest

from benchmarks import bench_prepare


@pytest.fixture
def text(tmp_path: Path) -> Path:
    chance = random.Random(0)
    words = ["".join(chance.choices("etaoin", k=chance.randrange(1, 8))) for _ in range(500)]
    (tmp_path / "a.txt").write_text("\n".join(" ".join(chance.choices(words, k=12)) for _ in range(3000)))
    return tmp_path / "a.txt"


def test_a_table_for_people_and_json_for_machines(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = text.with_name("result.json")
    bench_prepare.main(
        ["--input", str(text), "--vocab_size", "600", "--rounds", "1", "--processes", "1", "--output", str(output)]
    )
    result = json.loads(output.read_text())
    rates = result["mb_per_core_second"]
    kinds = ("byte-level BPE (tokenizer.json)", "unigram (SentencePiece)")
    assert {
        "ours, end to end",
        "SentencePiece",
        *(f"{kind}, {how}" for kind in kinds for how in ("--tok", "alone")),
    } <= (rates.keys())
    assert all(rate > 0 for rate in rates.values())
    assert result["bytes"] == text.stat().st_size - 2999  # without the ends of lines
    shown = capsys.readouterr().out
    assert all(name.removesuffix(", --tok").removesuffix(", alone") in shown for name in rates)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_document_larger_than_the_memory_it_may_take(text: Path) -> None:
    model = bench_prepare.train_tokenizer([text], text.with_name("spm"), 600)["model"]
    result = bench_prepare.measure_memory(text.parent, [str(text)], model, 1_500_000_000, 2)
    assert result["bytes"] >= 1_500_000_000
    assert result["peak_mb"]["main"] < 1000
    assert result["peak_mb"]["largest_worker"] < 150
