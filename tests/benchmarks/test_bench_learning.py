"""The benchmark of learning trains on nine tenths of a text, scores the rest as `llm eval` does, and keeps time."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import bench_learning
from llm.config import Config
from llm.data.manifest import read_manifest
from llm.data.shards import Loader
from llm.data.tokenizer import load_tokenizer
from llm.inference.evaluate import evaluate
from llm.training import train
from llm.training.train import Run

SMALL = [
    *("model.n_layers=1", "model.d_model=32", "model.n_heads=2", "model.n_kv_heads=1", "model.d_ff=64"),
    *("model.max_seq_len=32", "train.global_batch_tokens=128", "train.device=cpu", "schedule.warmup_tokens=256"),
]
CONFIG = str(Path(__file__).parents[2] / "configs" / "shakespeare.json")
SECRET = "ξ"  # stands in the last tenth alone


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 kB with characters of two bytes, one of them across the place of the cut."""
    chance = random.Random(0)
    words = ["".join(chance.choices("etaoinü", k=chance.randrange(1, 8))) for _ in range(60)]
    early = " ".join(chance.choices(words, k=4_000)).encode()[:17_999].decode(errors="ignore")
    early += "." * (17_999 - len(early.encode()))
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text(early + "ü" + SECRET * 999 + "!", encoding="utf-8")
    assert path.stat().st_size == 20_000
    return path


@pytest.fixture(scope="module")
def measured(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("work")
    lengths = {"seconds": None, "tokens": 16 * 128}
    return bench_learning.measure(text, CONFIG, SMALL, vocab_size=300, **lengths, folder=folder), folder


def test_nothing_of_the_last_tenth_is_trained_on(text: Path, measured: tuple[dict, Path]) -> None:
    result, folder = measured
    train, validation = (folder / name for name in ("train.txt", "validation.txt"))
    assert train.read_bytes() + validation.read_bytes() == text.read_bytes()
    assert len(train.read_bytes()) == 17_999  # a byte less than nine tenths: the cut would part a character
    assert (result["train_bytes"], result["validation_bytes"]) == (17_999, 2_001)
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    assert not any(SECRET.encode() in piece for piece in tokenizer.piece_bytes())
    data = read_manifest(folder / "shards")
    with Loader(data, "train", seq_len=32, seed=0, global_batch=1, micro_batch=1, shuffle=False, end=20) as loader:
        seen = [token for batch in loader for token in batch.input_ids[0].tolist()]
    assert train.read_bytes().startswith(tokenizer.decode_bytes(seen))


def test_the_score_is_that_of_llm_eval(measured: tuple[dict, Path]) -> None:
    result, folder = measured
    ours = evaluate(folder / "run", [folder / "validation.txt"], stride=8, documents="file", device="cpu")
    assert result["validation_bits_per_byte"] == ours["bits_per_byte"] == result["curve"][-1]["bits_per_byte"]
    whole = evaluate(folder / "run", [folder / "validation.txt"], documents="file", device="cpu")
    assert abs(whole["bits_per_byte"] - ours["bits_per_byte"]) > 1e-4  # the context of a target does count


def test_the_curve_runs_from_the_untrained_model_to_the_last_step(measured: tuple[dict, Path]) -> None:
    result, _ = measured
    tokens = [point["tokens"] for point in result["curve"]]
    assert tokens == [0, 128, 256, 512, 1024, 1536, 2048]  # the first two scores would be of one step
    seconds = [point["seconds"] for point in result["curve"]]
    assert seconds[0] == 0
    assert seconds == sorted(seconds)
    bits = [point["bits_per_byte"] for point in result["curve"]]
    assert bits[-1] < bits[0] - 0.1
    assert (result["steps"], result["tokens"]) == (16, 2048)


def test_by_the_clock_the_schedule_ends_when_the_time_does_and_scoring_takes_none_of_it(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, rates = [0.0], []
    step, learning_rate = bench_learning.Run.step, train.learning_rate

    def step_of_100_ms(run: Run, batches: Any) -> None:
        step(run, batches)
        now[0] += 0.1

    def noted_rate(tokens: int, config: Config) -> float:
        rates.append(learning_rate(tokens, config))
        return rates[-1]

    def score_of_10_s(*arguments: Any, **options: Any) -> dict[str, float]:
        now[0] += 10
        return {"bits_per_byte": 4.0}

    monkeypatch.setattr(bench_learning, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(bench_learning.Run, "step", step_of_100_ms)
    monkeypatch.setattr(train, "learning_rate", noted_rate)
    monkeypatch.setattr(bench_learning, "evaluate_model", score_of_10_s)
    arguments = ["--text", str(text), "--config", CONFIG, "--vocab_size", "300", "--minutes", str(1.55 / 60)]
    assert bench_learning.main([*arguments, "--output", str(tmp_path), *SMALL]) == 0
    result = json.loads((tmp_path / "learning-some.json").read_text())
    assert [point["seconds"] for point in result["curve"]] == [0, 0.1, 0.2, 0.4, 0.8, 1.2, 1.6]
    assert (result["steps"], result["seconds"], result["tokens_per_second"]) == (16, 1.6, 1280)
    # Half way, 1,024 tokens in 0.8 s promise 1,984 in all, of which 256 are warmup.
    peak = result["config"]["optimizer"]["lr"]
    assert rates[8] == pytest.approx(peak * (1 - (1024 - 256) / (1984 - 256)))
    assert rates[-1] < 0.08 * peak
    assert (tmp_path / "learning-some.png").read_bytes().startswith(b"\x89PNG")
    assert f"{result['validation_bits_per_byte']:.4f}" in capsys.readouterr().out
    assert "--text some.txt --minutes" in result["command"]


def test_by_the_clock_it_trains_on_no_more_than_the_config_or_the_rule_says(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    learning_rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", lambda *of: rates.append(learning_rate(*of)) or rates[-1])
    short = [*SMALL, "train.total_tokens=1024"]
    result = bench_learning.measure(text, CONFIG, short, vocab_size=300, seconds=600, tokens=None, folder=tmp_path)
    assert (result["steps"], result["tokens"]) == (8, 1024)
    # The schedule ends there too: after a quarter of warm-up each step takes a sixth of the peak away.
    peak = result["config"]["optimizer"]["lr"]
    assert rates == pytest.approx([peak * share for share in (1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)])
    assert [point["tokens"] for point in result["curve"]] == [0, 128, 256, 512, 768, 1024]


def test_a_text_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_learning.main(["--text", str(tmp_path / "none.txt"), "--config", CONFIG]) == 1
    assert "none.txt: No such file or directory" in capsys.readouterr().err
