"""The vocabulary and the sequence length of a run are the config's, its data's, or assumed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from running import small_config

from llm.config import Config
from llm.config_file import parse_config
from llm.data.object_store import read_data
from llm.errors import UserError
from llm.training.resolve import ASSUMED_VOCAB_SIZE, find_data, missing_data, resolve

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


def test_every_stage_decides_with_the_first_data(
    config_of: Callable[..., Config], small_shards: Path, tmp_path: Path
) -> None:
    def staged(path: Path) -> Config:
        return config_of(None, data__stages=[{"from_tokens": 5, "sources": [{"path": str(path), "weight": 1}]}])

    found = find_data(staged(small_shards).data)
    assert found is not None
    assert [source.path for source in found.sources] == [small_shards]
    assert [(stage.from_tokens, stage.counts) for stage in found.stages] == [(0, (4096,)), (5, (4096,))]
    assert find_data(staged(tmp_path / "none").data) is None
    assert missing_data(staged(tmp_path / "none").data) == str(tmp_path / "none")
    with pytest.raises(UserError, match="none"):
        read_data(staged(tmp_path / "none").data)


def test_plan_and_profile_take_stages(
    write_config: Callable[..., Path], llm_here: Llm, small_shards: Path, tmp_path: Path
) -> None:
    def stages(path: Path) -> list[dict[str, object]]:
        return [{"from_tokens": 600, "sources": [{"path": str(path), "weight": 1}]}]

    config = write_config(data__stages=stages(small_shards))
    for verb, options in (("plan", []), ("profile", ["--out_dir", tmp_path / "profile", "--steps", 1])):
        code, _, err = llm_here(verb, "--config", config, *options)
        assert code == 0, err
    code, out, err = llm_here("plan", "--config", write_config(data__stages=stages(tmp_path / "none")))
    assert code == 0, err
    assert f"assumed     a vocabulary of 32,000: {tmp_path / 'none'} is not there" in out + err
