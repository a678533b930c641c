"""The vocabulary and the sequence length of a run are the config's, its data's, or assumed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from running import small_config

from llm.config import Config, parse_config
from llm.errors import UserError
from llm.training.resolve import ASSUMED_VOCAB_SIZE, find_data, resolve

Llm = Callable[..., tuple[int, str, str]]


def shape(config: Config) -> tuple[int | None, int | None]:
    resolved, _ = resolve(config, find_data(config.data))
    return resolved.model.vocab_size, resolved.data.seq_len


@pytest.fixture
def config_of(small_shards: Path, tmp_path: Path) -> Callable[..., Config]:
    """config_of(path, **changes): a config for the data there; None: for the small shards."""

    def make(path: Path | None, **changes: object) -> Config:
        return parse_config(small_config(path or small_shards, tmp_path / "run", **changes), "test")

    return make


def test_data_that_exist_decide(config_of: Callable[..., Config], small_shards: Path) -> None:
    manifest = json.loads((small_shards / "manifest.json").read_text())
    assert shape(config_of(None)) == (manifest["vocab_size"], 64)
    assert shape(config_of(None, data__seq_len=32)) == (manifest["vocab_size"], 32)


def test_without_data_the_config_decides_and_else_both_are_assumed(
    config_of: Callable[..., Config], tmp_path: Path
) -> None:
    assert shape(config_of(tmp_path / "none", model__vocab_size=300, data__seq_len=16)) == (300, 16)
    assert shape(config_of(tmp_path / "none")) == (ASSUMED_VOCAB_SIZE, 64)  # max_seq_len
    with pytest.raises(UserError, match="the nearest is 510"):
        shape(config_of(tmp_path / "none", data__seq_len=30))


@pytest.mark.parametrize("verb", ["plan", "train", "profile"])
def test_every_verb_refuses_another_vocabulary_than_the_datas(
    write_config: Callable[..., Path], llm_here: Llm, verb: str
) -> None:
    code, _, err = llm_here(verb, "--config", write_config(model__vocab_size=77))
    assert code == 1
    assert "model.vocab_size 77 does not match the 500 of" in err.splitlines()[-1]
