"""`llm config`: the page, the schema and the output in a terminal are those of the models in llm/config.py."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field
from running import CONFIGS, REPOSITORY

from llm.config import Config, Section
from llm.tools import config_keys as module
from llm.tools.config_keys import Key, config_keys, config_schema

Llm = Callable[..., tuple[int, str, str]]
SECTIONS: dict[str, Any] = Config.model_fields


@pytest.mark.parametrize(("format", "file"), [("markdown", "docs/config.md"), ("schema", "configs/schema.json")])
def test_the_committed_file_is_what_the_command_prints(llm_here: Llm, format: str, file: str) -> None:
    code, out, err = llm_here("config", "--format", format)
    assert code == 0, err
    assert (REPOSITORY / file).read_text() == out, f"run: llm config --format {format} > {file}"


def test_the_commands_on_the_page_run(llm_here: Llm) -> None:
    commands = re.findall(r"^llm (config.*)$", (REPOSITORY / "docs/config.md").read_text(), re.M)
    assert len(commands) == 3
    for command in commands:
        assert llm_here(*command.split())[0] == 0, command


def keys_of_sections() -> list[Key]:
    """All keys but those of sections within sections, such as the entries of data.sources."""
    return [key for key in config_keys() if key.name.count(".") == 1]


def test_every_key_is_there_once_with_its_type_and_meaning() -> None:
    expected = [f"{section}.{key}" for section, field in SECTIONS.items() for key in field.annotation.model_fields]
    assert [key.name for key in keys_of_sections()] == expected
    keys = list(config_keys())
    assert {"data.sources.N.path", "data.sources.N.weight"} <= {key.name for key in keys}
    assert not [key.name for key in keys if not key.meaning or not key.type]
    assert all(field.annotation.__doc__ for field in SECTIONS.values())


def test_a_default_is_that_of_a_config_that_leaves_the_key_out() -> None:
    model = {"n_layers": 1, "d_model": 64, "n_heads": 4, "n_kv_heads": 4, "d_ff": 64}
    made = Config.model_validate({"model": model}).model_dump()
    for key in keys_of_sections():
        section, name = key.name.split(".")
        assert key.required or made[section][name] == key.default, key.name
    assert {key.name for key in keys_of_sections() if key.required} == {f"model.{name}" for name in model}


class Scaling(Section):
    factor: float = Field(gt=1, description="the factor")


class Sizes(Section):
    """Sizes."""

    ratio: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = Field("auto", description="one | the other")
    names: list[str] = Field(default_factory=lambda: ["a"], min_length=1, description="names")
    scaling: Scaling | None = Field(None, description="a section within a section")


class Extended(Config):
    sizes: Sizes = Field(Sizes(), description="sizes")


def test_a_new_section_and_new_keys_need_no_change_elsewhere(monkeypatch: pytest.MonkeyPatch, llm_here: Llm) -> None:
    monkeypatch.setattr(module, "Config", Extended)
    code, out, err = llm_here("config", "sizes")
    assert code == 0, err
    assert out.splitlines()[::2] == [
        'sizes.ratio: number or string; >= 0, < 1, "auto"; default "auto"',
        'sizes.names: array of strings; >= 1 entries; default ["a"]',
        "sizes.scaling: object or null; default null",
        "sizes.scaling.factor: number; > 1; required",
    ]
    code, out, _ = llm_here("config", "--format", "markdown")
    assert code == 0
    assert r"| one \| the other |" in out


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("optimizer.lr", ["optimizer.lr"]),
        ("every_steps", ["checkpoint.every_steps"]),
        ("kind", ["model.rope_scaling.kind", "optimizer.kind", "schedule.kind"]),
        ("deepspeed", ["deepspeed.zero_stage", "deepspeed.offload", "deepspeed.extra"]),
    ],
)
def test_a_section_or_a_key_is_found_by_its_name(llm_here: Llm, name: str, expected: list[str]) -> None:
    code, out, err = llm_here("config", name, "--json")
    assert code == 0, err
    assert [key["name"] for key in json.loads(out.splitlines()[-1])["keys"]] == expected


def test_a_name_that_is_not_there_is_answered_with_the_nearest(llm_here: Llm) -> None:
    code, _, err = llm_here("config", "optimizer.lrr")
    assert (code, err) == (1, "error: optimizer.lrr: no such section or key; the nearest is optimizer.lr\n")
    code, _, err = llm_here("config", "optimizer", "--format", "schema")
    assert (code, err) == (1, "error: --format schema describes the whole config; leave optimizer out\n")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_schema_knows_the_keys_of_a_shipped_config_and_no_other(path: Path) -> None:
    schema = config_schema()
    tree = json.loads(path.read_text())
    assert schema["additionalProperties"] is False
    assert tree.keys() <= schema["properties"].keys()
    assert set(schema["required"]) <= tree.keys()
    for section in tree.keys() - {"$schema"}:
        part = schema["$defs"][schema["properties"][section]["$ref"].rpartition("/")[2]]
        assert part["additionalProperties"] is False
        assert set(part.get("required", ())) <= tree[section].keys() <= part["properties"].keys()


def test_json_with_the_schema_holds_the_schema(llm_here: Llm) -> None:
    code, out, err = llm_here("config", "--format", "schema", "--json")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1]) == {"schema": config_schema()}
