import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from running import CONFIGS, SMALL_MODEL, without_checksums

from llm import world
from llm.config import Config
from llm.config_file import REMOVED_KEYS, load_config, parse_config
from llm.config_names import OTHER_NAMES
from llm.errors import UserError
from llm.model.checkpoint import read_state


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"model": SMALL_MODEL, "train": {"total_tokens": 4096, "global_batch_tokens": 512}}))
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_take_the_vocabulary_from_the_data(path: Path) -> None:
    assert load_config(path).model.vocab_size is None


def test_the_five_configs_are_there() -> None:
    assert {path.stem for path in CONFIGS} == {"shakespeare", "tiny", "125m", "350m", "1.3b"}


def test_overrides_replace_keys_and_read_integers_as_people_write_them(config_file: Path) -> None:
    overrides = ["train.total_tokens=200_000_000", "optimizer.lr=3e-4", "train.device=cpu", "data.seq_len=null"]
    config = load_config(config_file, [*overrides, "train.global_batch_tokens=5e5", "train.force=true"])
    assert config.train.total_tokens == 200_000_000
    assert config.train.global_batch_tokens == 500_000
    assert config.optimizer.lr == 3e-4
    assert config.data.seq_len is None
    assert config.train.force is True


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.force=False", False),
        ("train.force=TRUE", True),
        ("data.seq_len=None", None),
        ("train.stop_patience=none", None),
        ("train.monitor=csv", ["csv"]),
        ("train.monitor=csv, tensorboard", ["csv", "tensorboard"]),
        ("train.monitor=", []),
        ("train.monitor=None", []),
        ("train.sample_prompts=Once, a river", ["Once, a river"]),
        ("checkpoint.dir=20261128", "20261128"),
        ("checkpoint.dir=None", "None"),
        ("train.total_tokens=1M", 1_000_000),
        ("train.total_tokens=2.3m", 2_300_000),
        ("train.total_tokens=4k", 4_000),
        ("train.total_tokens=4Ki", 4_096),
        ("train.total_tokens=1e6", 1_000_000),
        ("train.total_tokens=1,000,000", 1_000_000),
        ("optimizer.lr=1e-3", 1e-3),
        ("optimizer.lr=.0003", 3e-4),
        ("train.total_tokens = 1M", 1_000_000),
        ("deepspeed.offload=None", "none"),
        ("train.precision=BF16", "bf16"),
        ("deepspeed.extra.x=True", {"x": True}),
    ],
)
def test_values_are_taken_as_people_write_them(config_file: Path, override: str, expected: Any) -> None:
    section, key = override.partition("=")[0].strip().split(".")[:2]
    found = getattr(getattr(load_config(config_file, [override]), section), key)
    assert (type(found), found) == (type(expected), expected)


def test_a_path_may_begin_with_the_home_folder(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/a")
    config = load_config(config_file, ["checkpoint.dir=~/run", "data.path=~/shards", "train.init_from=~/x"])
    assert (config.checkpoint.dir, config.data.path, config.train.init_from) == (
        "/home/a/run",
        "/home/a/shards",
        "/home/a/x",
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rate=1", "unknown key train.learning_rate; that is optimizer.lr here"),
        ("train.lr=1", "that is optimizer.lr here"),
        ("train.max_iters=1", "that is train.total_tokens here"),
        ("train.batch_size=1", "that is train.global_batch_tokens here"),
        ("model.n_embd=1", "that is model.d_model here"),
        ("data.block-size=1", "that is data.seq_len here"),
        ("learning_rate=1", "such as train.seed=1; did you mean optimizer.lr=1?"),
        ("lr=1", "did you mean optimizer.lr=1?"),
        ("n_layer.x=1", "unknown key n_layer; that is model.n_layers here"),
        ("optimizer.weight_decays=1", "the nearest is optimizer.weight_decay"),
    ],
)
def test_names_of_other_projects_lead_to_ours(config_file: Path, override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(config_file, [override])
    assert expected in str(caught.value)


def test_every_key_that_a_foreign_name_leads_to_exists() -> None:
    keys = {
        f"{section}.{key}" for section, field in Config.model_fields.items() for key in field.annotation.model_fields
    }
    names = " ".join(OTHER_NAMES.values()).split()
    assert set(OTHER_NAMES) <= keys
    assert len(set(names)) == len(names)


def test_an_override_reaches_into_deepspeed_extra(config_file: Path) -> None:
    config = load_config(config_file, ["deepspeed.extra.zero_optimization.reduce_bucket_size=1000"])
    assert config.deepspeed.extra == {"zero_optimization": {"reduce_bucket_size": 1000}}


def test_all_problems_are_listed_at_once_with_the_nearest_key(config_file: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_config(config_file, ["model.n_head=3", "optimizer.lr=fast", "train.total_tokens=1.5", "trian.seed=1"])
    message = str(caught.value)
    assert "unknown key model.n_head; the nearest is model.n_heads" in message
    assert 'optimizer.lr = "fast"' in message
    assert "train.total_tokens = 1.5" in message
    assert "unknown key trian; the nearest is train" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.n_heads=5"], "not a multiple of model.n_heads 5"),
        (["model.n_kv_heads=3", "model.n_heads=2"], "model.n_heads 2 is not a multiple of model.n_kv_heads 3"),
        (["model.d_model=48", "model.n_heads=2"], "must be a multiple of 16"),
        (["data.seq_len=128"], "data.seq_len 128 is above model.max_seq_len 64"),
        (
            ["optimizer.kind=muon", "deepspeed.zero_stage=3"],
            "optimizer.kind=muon does not train at deepspeed.zero_stage 3",
        ),
        (
            ["deepspeed.zero_stage=0", "train.precision=fp16"],
            "train.precision=fp16 does not train at deepspeed.zero_stage 0",
        ),
        (["deepspeed.zero_stage=0", "deepspeed.offload=cpu"], "deepspeed.zero_stage 0 has none"),
        (
            ["deepspeed.zero_stage=3", "train.activation_checkpointing=selective"],
            "train.activation_checkpointing=selective does not train at deepspeed.zero_stage 3",
        ),
        (["optimizer.kind=adamw", "optimizer.muon_lr=0.1"], "optimizer.muon_lr is for optimizer.kind=muon, not adamw"),
        (["deepspeed.zero_stage=4"], "deepspeed.zero_stage = 4"),
        (["train.total_tokens=0"], "train.total_tokens = 0"),
        (["train.micro_batch=true"], "train.micro_batch = true"),
        (["optimizer.lr=NaN"], "optimizer.lr"),
        (["lr=3"], "section.key=value"),
        (["train.seed"], "section.key=value"),
        (["model.d_model.x=3"], "model.d_model is not a section"),
        (["train.total_tokens=1" + "0" * 400], "(401 characters): does not fit into 64 bits"),
        (["train.total_tokens=1" + "0" * 5000], "train.total_tokens = "),
        (["train.total_tokens=1e999999999"], "train.total_tokens = Infinity"),
        (["train.global_batch_tokens=1000000000000000"], "train.global_batch_tokens = 1000000000000000"),
        (["train.micro_batch=1000000000"], "train.micro_batch = 1000000000"),
        (["model.max_seq_len=9223372036854775808"], "model.max_seq_len = 9223372036854775808"),
        (["model.d_model=1099511627776", "model.n_heads=68719476736"], "model.d_model = 1099511627776"),
        (["model.d_ff=4611686018427387904"], "model.d_ff = 4611686018427387904"),
        (["optimizer.lr=1e400"], "optimizer.lr = Infinity"),
        (["optimizer.lr=" + "[" * 3000], "optimizer.lr: nested more than 32 levels deep"),
        (["deepspeed.extra.x=" + "[" * 50 + "]" * 50], "deepspeed.extra: nested more than 32 levels deep"),
        (["deepspeed.extra" + ".x" * 5000 + "=1"], "deepspeed.extra: nested more than 32 levels deep"),
        (["deepspeed.extra.x=" + "9" * 30], "deepspeed.extra.x = 999999999999999999999999999999: does not fit"),
        (["checkpoint.dir="], 'checkpoint.dir = "": a path has one character or more'),
        (["data.path=a\0b"], "data.path = "),
        (["train.force=maybe"], "valid boolean; write true or false"),
    ],
)
def test_impossible_settings_are_one_line_errors(config_file: Path, overrides: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(config_file, overrides)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", ":1:2: not JSON"),
        (b"[1]", "a config is a JSON object"),
        (b"\xff{}", "not UTF-8"),
        (b"{}", "model is missing"),
        (b'{"model": {},\n}', ":1:13: not JSON: a trailing comma; remove it"),
        (b'{"model": [1, 2,\n\n]}', ":1:16: not JSON: a trailing comma"),
        (b'{"train": {"compile": True}}', ":1:23: not JSON: True; JSON writes true"),
        (b'{"data": {"seq_len": None}}', "not JSON: None; JSON writes null"),
        (b"{\n  // a comment\n}", ":2:3: not JSON: a comment; JSON has none"),
        (b"{'model': {}}", "not JSON: a single quote"),
        (b"", ":1:1: not JSON: the file is empty"),
        (b"[" * 100_000, "nested more than 32 levels deep"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "nested more than 32 levels deep"),
        (b'{"train": {"seed": ' + b"9" * 5000 + b"}}", "a number has too many digits"),
        (b'{"train": {"seed": 1, "seed": 2}}', "train.seed: more than once in one object"),
        (b'{"train": {}, "model": {}, "train": {}}', "train: more than once in one object"),
        (b'{"train": {"seed": "7"}}', 'train.seed = "7": input should be a valid integer; write it without quotes'),
        (b'{"train": {"seed": "' + b"[" * 5000 + b'"}}', "(5,002 characters): input should be a valid integer"),
        (b" " * (1 << 20) + b"{}", "larger than 1,048,576 bytes"),
    ],
)
def test_files_that_are_no_config_are_named(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_text(config_file: Path, encoding: str) -> None:
    expected = load_config(config_file)
    config_file.write_text(config_file.read_text(), encoding)
    assert load_config(config_file) == expected


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such config file"):
        load_config(tmp_path / "none.json")
    with pytest.raises(UserError, match="is a directory"):
        load_config(tmp_path)


def test_a_config_survives_its_own_json(config_file: Path) -> None:
    config = load_config(config_file)
    assert parse_config(json.loads(json.dumps(config.model_dump())), "again") == config
    assert isinstance(config, Config)


def test_the_schema_that_a_file_names_is_no_setting(config_file: Path) -> None:
    expected = load_config(config_file)
    tree = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({"$schema": "./schema.json", **tree}))
    assert load_config(config_file) == expected
    assert "$schema" not in expected.model_dump()
    with pytest.raises(UserError, match=r"unknown key model\.\$schema"):
        load_config(config_file, ["model.$schema=x"])


SOURCES = [{"path": "a", "weight": 2}, {"path": "b", "weight": 0.5}]


def test_data_come_from_a_path_or_from_sources(config_file: Path) -> None:
    def data(*overrides: str) -> Any:
        return load_config(config_file, overrides).data

    assert (data().path, data().sources) == ("data/shards", None)
    mixed = data(f"data.sources={json.dumps(SOURCES)}")
    assert mixed.path is None
    assert [(source.path, source.weight) for source in mixed.sources] == [("a", 2), ("b", 0.5)]
    for wrong in (["data.path=null"], [f"data.sources={json.dumps(SOURCES)}", "data.path=a"]):
        with pytest.raises(UserError, match=r"data\.path and data\.sources: name exactly one of them"):
            data(*wrong)
    for wrong, expected in (
        ([{"pth": "a", "weight": 1}], r"unknown key data\.sources\.0\.pth; the nearest is data\.sources\.0\.path"),
        ([{"path": "a", "weight": 0}], r"data\.sources\.0\.weight = 0: input should be greater than 0"),
        ([], r"data\.sources = \[\]: "),
    ):
        with pytest.raises(UserError, match=expected):
            data(f"data.sources={json.dumps(wrong)}")


def test_stages_take_the_place_of_the_first_data(config_file: Path) -> None:
    def data(*stages: dict[str, Any]) -> Any:
        return load_config(config_file, [f"data.stages={json.dumps(stages)}"]).data

    found = data({"from_tokens": 5, "sources": SOURCES}, {"from_tokens": 9, "sources": SOURCES[:1]})
    assert found.paths == ["data/shards", "a", "b", "a"]
    assert [from_tokens for from_tokens, _ in found.mixtures] == [0, 5, 9]
    one = {"from_tokens": 5, "sources": SOURCES}
    key = r"data\.stages\.0"
    for wrong, expected in (
        ([one, one], r"data\.stages\.1\.from_tokens 5 is not above the 5 of the stage before it"),
        ([{**one, "from_tokens": 0}], rf"{key}\.from_tokens = 0: input should be greater than 0"),
        ([{**one, "from_token": 1}], rf"unknown key {key}\.from_token; the nearest is {key}\.from_tokens"),
        ([{**one, "sources": []}], rf"{key}\.sources = \[\]: "),
        ([{"from_tokens": 5}], rf"{key}\.sources is missing"),
        (
            [{**one, "sources": [{"path": "a", "wait": 1, "weight": 1}]}],
            rf"unknown key {key}\.sources\.0\.wait; the nearest is {key}\.sources\.0\.weight",
        ),
    ):
        with pytest.raises(UserError, match=expected):
            data(*wrong)


def test_a_config_with_sources_survives_its_own_json(config_file: Path) -> None:
    stages = [{"from_tokens": 5, "sources": SOURCES}]
    config = load_config(config_file, [f"data.sources={json.dumps(SOURCES)}", f"data.stages={json.dumps(stages)}"])
    assert parse_config(json.loads(json.dumps(config.model_dump())), source="state.json") == config


@pytest.mark.parametrize("has_bf16", [True, False])
def test_precision_is_bf16_by_itself_where_the_processor_multiplies_it(monkeypatch, has_bf16):
    monkeypatch.setattr(world, "cpu_has_bf16", lambda: has_bf16)
    for stated, expected in (("auto", torch.bfloat16 if has_bf16 else torch.float32), ("fp32", torch.float32)):
        train = {"total_tokens": 1, "global_batch_tokens": 1, "precision": stated}
        config = parse_config({"model": SMALL_MODEL, "train": train}, "test")
        assert world.pick_dtype(config, torch.device("cpu")) == expected


@pytest.mark.parametrize(("once", "now"), [(True, "full"), (False, "none"), ("selective", "selective")])
def test_a_checkpointing_switch_from_before_keeps_its_meaning(once, now):
    tree = {
        "model": SMALL_MODEL,
        "train": {"total_tokens": 1, "global_batch_tokens": 1, "activation_checkpointing": once},
    }
    assert parse_config(tree, "test").train.activation_checkpointing == now


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_states_no_default(path: Path) -> None:
    tree = json.loads(path.read_text())
    assert tree.pop("$schema") == "./schema.json"
    for section, keys in tree.items():
        fields = Config.model_fields[section].annotation.model_fields
        for key, value in keys.items():
            field = fields[key]
            assert field.is_required() or field.get_default(call_default_factory=True) != value, f"{section}.{key}"


def removed(*keys: tuple[str, str, Any]) -> dict[str, Any]:
    """A config of an earlier release: (section, key, value) of keys that this one does not know."""
    tree: dict[str, Any] = {"model": SMALL_MODEL, "train": {"total_tokens": 1, "global_batch_tokens": 1}}
    for section, key, value in keys:
        tree.setdefault(section, {})[key] = value
    return tree


@pytest.mark.parametrize(("section", "key"), REMOVED_KEYS)
def test_a_removed_key_is_dropped_where_it_held_its_default(section: str, key: str) -> None:
    tree = removed((section, key, REMOVED_KEYS[section, key][0]))
    before = json.dumps(tree)
    assert parse_config(tree, "state.json") == parse_config(removed(), "state.json")
    assert json.dumps(tree) == before


def test_a_removed_key_with_another_value_is_left_out_and_named_once(capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert parse_config(removed(("data", "io", "mmap")), "run/state.json") == parse_config(removed(), "test")
    line = 'run/state.json: data.io = "mmap" is left out: this key was removed; shards are always read with pread\n'
    assert capfd.readouterr().err == line


def test_an_override_may_name_a_removed_key(config_file: Path) -> None:
    assert load_config(config_file, ["data.io=pread"]) == load_config(config_file)
    assert load_config(config_file, ["data.io=mmap"]) == load_config(config_file)


def test_a_checkpoint_of_an_earlier_release_is_read(random_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = random_checkpoint / "step-00000000"
    older = without_checksums(shutil.copytree(checkpoint, tmp_path / "older"))
    state = json.loads((older / "state.json").read_text())
    state["config"]["data"]["io"] = "pread"
    (older / "state.json").write_text(json.dumps(state))
    assert read_state(older) == read_state(checkpoint)
