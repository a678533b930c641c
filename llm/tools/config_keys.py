"""`llm config`: every key of a config, with its type, default, allowed values and meaning; and the schema for editors.

All of it is read from the models of llm/config.py, so a new key needs no change here.
"""

import difflib
import json
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic.json_schema import GenerateJsonSchema

from llm.config import Config
from llm.errors import UserError

INTRODUCTION = """\
# Configuration

<!-- Generated from llm/config.py by: llm config --format markdown > docs/config.md -->

A config is one JSON file with the sections below. A key that is left out has its default. On the command line,
`section.key=value` replaces a key: `llm train --config configs/125m.json optimizer.lr=3e-4 train.seed=7`. An unknown
key or an impossible value is an error that names the key.

On the command line a number may be written `200_000_000`, `2e8`, `200M` (k, M, B or G, T: powers of 1000) or `4Ki` (Ki,
Mi, Gi: powers of 1024); true, false and null also `True`, `False` and `None`; a list of names `csv,tensorboard`.

The same list in a terminal, whole or in part:

```sh
llm config
llm config optimizer
llm config model.n_layers
```

Each file in `configs/` begins with `"$schema": "./schema.json"`. An editor that knows JSON schemas, such as VS Code,
then completes keys, shows this text and marks mistakes. For a config in another folder, write the schema next to it:
`llm config --format schema > schema.json`.
"""
WIDTH = 80
INDENT = "    "


class Key(NamedTuple):
    name: str
    """With its section, such as "model.n_layers"."""
    type: str
    allowed: str
    """The values or the range; "": every value of the type."""
    default: Any
    required: bool
    meaning: str


class _Schema(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        # Such a title is the key once more, in capitals ("N Layers").
        return False

    def get_default_value(self, schema: Any) -> Any:
        return schema["default_factory"]() if "default_factory" in schema else super().get_default_value(schema)


def describe_config(name: str | None = None, *, format: str = "text", show: bool = False) -> dict[str, Any]:
    """Describes the keys of a config, as `llm config --json` prints them.

    Args:
        name: a section, a key with its section, or a key alone; None: all keys.
        format: "text" and "markdown" list the keys; "schema" is the JSON schema of a config file.
        show: print it in this format.

    Raises:
        UserError: nothing is called `name`, or `name` is given with another format than "text".
    """
    if name is not None and format != "text":
        raise UserError(f"--format {format} describes the whole config; leave {name} out")
    if format == "schema":
        result: dict[str, Any] = {"schema": config_schema()}
        text = json.dumps(result["schema"], indent=2)
    else:
        keys = list(config_keys()) if name is None else find_keys(name)
        text = _markdown() if format == "markdown" else "\n".join(map(_paragraph, keys))
        result = {"keys": [key._asdict() for key in keys]}
    if show:
        print(text)
    return result


def config_schema() -> dict[str, Any]:
    """Makes the JSON schema (draft 2020-12) of a config file."""
    schema = Config.model_json_schema(schema_generator=_Schema)
    for section in schema["properties"].values():
        # It repeats the defaults of all its keys.
        section.pop("default", None)
    schema["properties"] = {"$schema": {"type": "string"}, **schema["properties"]}
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema}


def config_keys() -> Iterator[Key]:
    """Yields every key, in the order of llm/config.py."""
    schema = config_schema()
    for name in Config.model_fields:
        yield from _keys(name, schema["properties"][name], schema["$defs"])


def find_keys(name: str) -> list[Key]:
    """Returns the keys of a section, or those with this name. Raises UserError, with the nearest, if there is none."""
    keys = list(config_keys())
    found = [key for key in keys if f".{name}." in f".{key.name}."]
    if not found:
        known = {part for key in keys for part in (key.name, *key.name.split("."))}
        # cutoff=0: even a poor match shows the user a name that exists.
        near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise UserError(f"{name}: no such section or key; the nearest is {near}")
    return found


def _keys(section: str, reference: dict[str, str], definitions: dict[str, Any]) -> Iterator[Key]:
    model = _definition(reference, definitions)
    for name, key in model["properties"].items():
        kinds = key.get("anyOf", [key])
        yield Key(
            f"{section}.{name}",
            type=" or ".join(map(_type, kinds)),
            allowed=", ".join(filter(None, map(_allowed, kinds))),
            default=key.get("default"),
            required=name in model.get("required", ()),
            meaning=key.get("description", ""),
        )
        for kind in kinds:
            if "$ref" in kind:
                yield from _keys(f"{section}.{name}", kind, definitions)
            elif "$ref" in kind.get("items", {}):
                # Errors name an entry by its number, as in data.sources.0.path.
                yield from _keys(f"{section}.{name}.N", kind["items"], definitions)


def _definition(reference: dict[str, str], definitions: dict[str, Any]) -> dict[str, Any]:
    """What {"$ref": "#/$defs/NAME"} refers to."""
    definition: dict[str, Any] = definitions[reference["$ref"].rpartition("/")[2]]
    return definition


def _type(kind: dict[str, Any]) -> str:
    name = kind.get("type", "object" if "$ref" in kind else "value")
    return f"array of {_type(kind['items'])}s" if name == "array" and "items" in kind else name


def _allowed(kind: dict[str, Any]) -> str:
    """The values or the range of one type of a key, such as "1 to 64 entries"."""
    if "enum" in kind.get("items", {}):
        return _allowed(kind["items"])
    if values := kind.get("enum", [kind["const"]] if "const" in kind else None):
        return ", ".join(map(json.dumps, values))
    unit = " entries" if kind.get("type") == "array" else ""
    low, high = kind.get("minimum", kind.get("minItems")), kind.get("maximum", kind.get("maxItems"))
    if low is not None and high is not None:
        return f"{low} to {high}{unit}"
    limits = {">=": low, ">": kind.get("exclusiveMinimum"), "<=": high, "<": kind.get("exclusiveMaximum")}
    return ", ".join(f"{sign} {limit}{unit}" for sign, limit in limits.items() if limit is not None)


def _paragraph(key: Key) -> str:
    default = "required" if key.required else f"default {json.dumps(key.default)}"
    facts = "; ".join(filter(None, (key.type, key.allowed, default)))
    return f"{key.name}: {facts}\n" + textwrap.fill(key.meaning, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)


def _markdown() -> str:
    """The page docs/config.md."""
    schema = config_schema()
    lines = [INTRODUCTION]
    for section in Config.model_fields:
        about = _definition(schema["properties"][section], schema["$defs"]).get("description", "")
        lines += [f"## {section}", "", " ".join(about.split()), "", "| key | type | allowed | default | meaning |"]
        lines.append("|---|---|---|---|---|")
        for key in config_keys():
            if key.name.startswith(f"{section}."):
                default = "required" if key.required else f"`{json.dumps(key.default)}`"
                meaning = key.meaning.replace("|", r"\|")
                lines.append(f"| `{key.name}` | {key.type} | {key.allowed} | {default} | {meaning} |")
        lines.append("")
    return "\n".join(lines).rstrip()
