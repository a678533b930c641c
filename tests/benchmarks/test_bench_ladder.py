"""benchmarks.bench_ladder: what a run of the ladder states, and what of it follows from the rules."""

import json
import random
from pathlib import Path

import pytest

from benchmarks import bench_ladder
from benchmarks.bench_ladder import (
    LENGTH,
    SEQ_LEN,
    Rung,
    check_text,
    config_of,
    prepare,
    prepared,
    rungs,
    short_rungs,
    table,
)
from llm.errors import UserError
from llm.training.resolve import epoch_tokens
from llm.training.rules import TOKENS_A_PARAMETER, matrix_parameters


@pytest.fixture
def folder(small_shards: Path, tmp_path: Path) -> Path:
    (tmp_path / "shards").symlink_to(small_shards)
    return tmp_path


def test_names_are_unique_and_every_run_has_a_config(folder: Path) -> None:
    for ladder in (list(rungs()), list(short_rungs())):
        assert len({rung.name for rung in ladder}) == len(ladder)
        for rung in ladder:
            assert config_of(rung, folder).optimizer.kind == rung.optimizer


def test_a_run_in_bf16_has_a_name_of_its_own(folder: Path) -> None:
    run = Rung("a", "0.2M", precision="bf16")
    assert run.title == "a, bf16"
    assert config_of(run, folder).train.precision == "bf16"
    assert config_of(run, folder).checkpoint.dir != config_of(Rung("a", "0.2M"), folder).checkpoint.dir


def test_factors_change_what_the_rules_give(folder: Path) -> None:
    ruled = config_of(Rung("a", "0.2M"), folder)
    assert ruled.train.horizon == TOKENS_A_PARAMETER * matrix_parameters(ruled)
    faster = config_of(Rung("b", "0.2M", factor=2.0), folder)
    assert faster.optimizer.muon_lr == pytest.approx(2 * ruled.optimizer.muon_lr)
    # The rates of embedding, head and norms follow the stated lr.
    assert faster.optimizer.embed_lr == pytest.approx(2 * ruled.optimizer.embed_lr, rel=0.01)
    smaller = config_of(Rung("c", "0.2M", stated={"batch": 0.5}), folder)
    assert smaller.train.batch == ruled.train.batch // 2
    assert smaller.train.horizon == ruled.train.horizon


def test_a_short_text_is_read_so_many_times_with_a_factor_on_its_decay(folder: Path) -> None:
    read, decayed = (
        config_of(Rung("d", "0.4M", stated={"epochs": 8, **more}), folder) for more in ({}, {"decay": 4.0})
    )
    assert read.train.horizon == decayed.train.horizon == 8 * epoch_tokens(prepared(folder), SEQ_LEN)
    assert decayed.optimizer.weight_decay == pytest.approx(4 * read.optimizer.weight_decay)


def test_a_run_is_compared_with_the_rules_at_its_own_seed_and_length() -> None:
    def line(name: str, bits: float, seed: int, precision: str = "fp32", **stated: object) -> dict[str, object]:
        same = {"size": "0.4M", "optimizer": "muon", "tokens": 1, "batch": 1, "lr": 1.0, "muon_lr": 1.0, "factor": 1.0}
        return {"name": name, "bits_per_byte": bits, "seed": seed, "precision": precision, "stated": stated, **same}

    lines = [
        line("muon", 2.0, 1337),
        line("seed 1", 1.0, 1, **{"train.seed": 1}),
        line("wsd", 1.8, 1337, **{"schedule.kind": "wsd"}),
        line("wsd, seed 1", 1.1, 1, **{"schedule.kind": "wsd", "train.seed": 1}),
        line("short", 4.0, 1337, **{LENGTH: 1}),
        line("short, half the batch", 5.0, 1337, batch=0.5, **{LENGTH: 1}),
        line("muon, bf16", 3.0, 1337, "bf16"),
        line("seed 1, bf16", 6.0, 1, "bf16", **{"train.seed": 1}),
    ]
    rows = table(lines).splitlines()[2:]
    expected = ["", "-50.00 %", "-10.00 %", "+10.00 %", "", "+25.00 %", "", "+100.00 %"]
    assert [row.split("|")[-2].strip() for row in rows] == expected


def test_a_short_text_has_a_validation_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ladder, "VOCAB_SIZE", 300)
    text, words = tmp_path / "text.jsonl", [f"{number:b}" for number in range(1000)]
    documents = (" ".join(random.Random(seed).choices(words, k=100)) for seed in range(300))
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    prepare([text], tmp_path / "data", 10)
    assert prepared(tmp_path / "data").sequences("val", SEQ_LEN) > 0


def test_a_text_of_one_document_cannot_be_held_out(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one document\n")
    with pytest.raises(UserError, match=r"text\.txt: too few documents to hold out one in 10; lower --held_out"):
        prepare([text], tmp_path / "data", 10)
    assert not (tmp_path / "data" / "held_out.jsonl").exists()


def test_lines_of_another_text_under_the_same_name_are_refused(tmp_path: Path) -> None:
    lines = [{"name": "0.4M muon", "text": {"name": "docs", "xz": 1.8247}}]
    check_text({"name": "docs", "xz": 1.8247}, lines, tmp_path)
    check_text({"name": "newer docs", "xz": 1.8398}, lines, tmp_path)
    with pytest.raises(UserError, match=r"ladder\.jsonl: '0\.4M muon' ran on another text named docs: .* 1\.8398 here"):
        check_text({"name": "docs", "xz": 1.8398}, lines, tmp_path)
