"""The expected loss: what is measured of a text, and what the law makes of it."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llm.config import Config
from llm.config_file import parse_config
from llm.data.manifest import read_manifest
from llm.data.mixture import mix
from llm.data.tokenizer import load_tokenizer
from llm.training.expected_loss import EPOCHS_WORTH, Text, expect, sample_text, worth

Llm = Callable[..., tuple[int, str, str]]
TEXT = Text(xz=2.0, bigram=2.5, bytes_per_token=4.0)


def config(tokens: int = 10**8, layers: int = 4, **changes: dict[str, object]) -> Config:
    shape = {"n_layers": layers, "d_model": 64, "n_heads": 2, "n_kv_heads": 2, "d_ff": 176, "vocab_size": 4096}
    settings = {"optimizer": {"kind": "muon"}, **changes}
    return parse_config({"model": shape, "train": {"total_tokens": tokens}, **settings}, "test")


def test_a_sample_measures_the_text(small_shards: Path) -> None:
    manifest = read_manifest(small_shards)
    sample = sample_text(mix([manifest], [1.0]), 64)
    assert 1 < sample.bytes_per_token < 4
    # Python sources compress to less than half, and this short sample to more than a tenth.
    assert 0.8 < sample.xz < 4
    assert 0.8 < sample.bigram < 4
    assert sample == sample_text(mix([manifest], [1.0]), 64)


def test_the_scored_documents_decide_not_those_that_are_counted(small_shards: Path) -> None:
    data, tokenizer = mix([read_manifest(small_shards)], [1.0]), load_tokenizer(small_shards)
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=9_000)
    easy, hard = ("def f(self):\n    return self\n" * 500, "".join(letters))
    texts = []
    for text in (easy, hard):
        ids = tokenizer.encode(text)
        texts.append(sample_text(data, 64, (np.array([tokenizer.bos_id, *ids]), np.array([*ids, tokenizer.eos_id]))))
    assert texts[0].bytes_per_token == pytest.approx(len(easy) / (len(tokenizer.encode(easy)) + 1))
    assert texts[0].xz < 0.2 * texts[1].xz
    assert texts[0].bigram < 0.5 * texts[1].bigram


def test_more_tokens_and_more_parameters_lower_the_loss() -> None:
    losses = [expect(config(tokens), TEXT, None).loss for tokens in (10**6, 10**7, 10**9, 10**12)]
    assert losses == sorted(losses, reverse=True)
    losses = [expect(config(layers=layers), TEXT, None).loss for layers in (1, 4, 16, 64)]
    assert losses == sorted(losses, reverse=True)
    assert expect(config(optimizer={"kind": "adamw"}), TEXT, None).loss > expect(config(), TEXT, None).loss


def test_a_text_that_is_harder_to_compress_has_a_higher_loss() -> None:
    harder = Text(xz=2.4, bigram=3.0, bytes_per_token=4.0)
    assert expect(config(), harder, None).bits_per_byte > expect(config(), TEXT, None).bits_per_byte


def test_the_loss_in_nats_belongs_to_the_bits() -> None:
    found = expect(config(), TEXT, None)
    assert found.loss == pytest.approx(found.bits_per_byte * np.log(2) * TEXT.bytes_per_token)
    assert found.low < found.loss < found.high


def test_text_that_is_read_again_is_worth_less_and_less() -> None:
    assert worth(900, None) == worth(900, 1_000) == 900
    # One more epoch of a small part is worth nearly as much as new text.
    assert worth(1_010, 1_000) == pytest.approx(1_010, abs=0.1)
    assert 1_900 < worth(2_000, 1_000) < 2_000
    assert worth(10**9, 1_000) == pytest.approx(1_000 * (1 + EPOCHS_WORTH))
    assert expect(config(10**8), TEXT, 10**6).loss > expect(config(10**8), TEXT, 10**8).loss


def test_a_run_keeps_its_expected_loss_and_plan_says_it(
    small_shards: Path, tmp_path: Path, llm_here: Llm, write_config: Callable[..., Path]
) -> None:
    path = write_config(train__total_tokens=2_048, train__eval_tokens=512)
    code, out, err = llm_here("plan", "--config", path, "--device", "H100", "--json")
    assert code == 0, err
    planned = json.loads(out)
    code, _, err = llm_here("train", "--config", path)
    assert code == 0, err
    assert "expected    a validation loss of " in err
    first = json.loads((tmp_path / "run/run.json").read_text())["expected"]
    assert first["loss"] == planned["expected_loss"]
    assert [first["low"], first["high"]] == planned["expected_loss_band"]
    assert first["bits_per_byte"] == planned["expected_bits_per_byte"]
    # A longer run should end lower.
    code, _, err = llm_here("train", "--config", path, "train.total_tokens=4096")
    assert code == 0, err
    assert json.loads((tmp_path / "run/run.json").read_text())["expected"]["loss"] < first["loss"]
