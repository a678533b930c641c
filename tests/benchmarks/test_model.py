"""The static model of a training step: its work is the exact one, and a change never makes it slower."""

import json
from itertools import pairwise

import pytest

from benchmarks import model
from benchmarks.model import Assumed, lines, predictions
from llm.config_file import load_config
from llm.model.flops import flops_per_token
from llm.training.resolve import resolve


@pytest.fixture(scope="module")
def config():
    stated = load_config("configs/125m.json", ["model.vocab_size=32000", "optimizer.kind=adamw"])
    return resolve(stated, None)[0]


def test_its_products_are_those_of_the_flops_that_mfu_counts(config):
    tokens = 16 * 2048
    products = sum(line.work.flops for line in lines(config, "H200", 16, Assumed()))
    # Backward of attention counts five products, MFU four: the scores are computed again.
    again = sum(line.work.flops for line in lines(config, "H200", 16, Assumed()) if line.op == "attention") / 3.5 / 2
    assert products - again == pytest.approx(tokens * flops_per_token(config.model, 2048).causal, rel=0.002)


def test_without_a_change_it_is_what_llm_plan_predicts(config, llm_here):
    changes = ("model.vocab_size=32000", "optimizer.kind=adamw", "train.micro_batch=16")
    code, out, err = llm_here("plan", "--config", "configs/125m.json", "--device", "H200", "--json", *changes)
    assert code == 0, err
    today = next(predictions(config, "H200", 16))
    assert today["tokens_per_second"] == pytest.approx(json.loads(out)["tokens_per_second"], rel=0.002)


def test_each_change_keeps_the_ones_before_it_and_saves_time(config):
    found = list(predictions(config, "H200", 16))
    assert len(found) == 1 + len(model.CHANGES)
    for before, after in pairwise(found):
        assert after["micro_batch_ms"] == pytest.approx(before["micro_batch_ms"] - after["saves_ms"])
        assert after["saves_ms"] > 0
        assert after["tokens_per_second"] * after["micro_batch_ms"] == pytest.approx(16 * 2048 * 1e3)


def test_muon_adds_its_products(config, tmp_path, capsys):
    assert model.main(["--output", str(tmp_path / "a.json"), "optimizer.kind=adamw"]) == 0
    assert model.main(["--output", str(tmp_path / "m.json"), "optimizer.kind=muon"]) == 0
    adamw, muon = (json.loads((tmp_path / f"{name}.json").read_text())["predicted"][0] for name in "am")
    assert 0 < muon["micro_batch_ms"] - adamw["micro_batch_ms"] < 2
    assert "attention backward with five products" in capsys.readouterr().out
