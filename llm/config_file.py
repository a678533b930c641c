"""How a config is read: a JSON file and overrides into llm/config.py's models, with every problem in one line."""

import difflib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from llm.config import Config
from llm.config_names import OTHER_NAMES
from llm.config_text import MAX_DEPTH, MAX_SHOWN, beyond_bounds, read_object, read_value, read_word, shown
from llm.errors import UserError, visible

NEAR = 0.85
"""How similar, by difflib, a misspelt key is to the one that is meant."""

HINTS = {"bool_type": "; write true or false", "int_type": "; write a whole number", "list_type": '; write ["..."]'}
"""What to write, by pydantic's name of an error."""

# Keys that earlier releases had, and that old configs and checkpoints still contain: (section, key) -> (default, what
# happens now). The default changes nothing; any other value asks for something that no longer exists.
REMOVED_KEYS: dict[tuple[str, str], tuple[Any, str]] = {
    ("data", "io"): ("pread", "shards are always read with pread"),
    ("train", "compile"): (False, "torch.compile has nothing left to fuse between the kernels (docs/kernels.md)"),
}


def load_config(source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Reads a config and `section.key=value` overrides. source: a JSON file, or its content as a dict.

    Raises UserError with every problem at once, each naming its key and, for an unknown one, the nearest.
    """
    if isinstance(overrides, str):
        raise UserError("overrides is a list of texts, not one text: [override]")
    # Copied, because overrides change it and the caller keeps it.
    tree = deepcopy(dict(source)) if isinstance(source, Mapping) else read_object(Path(source))
    # Only for editors, which find the schema of a config there. It is not a setting, so no checkpoint contains it.
    tree.pop("$schema", None)
    # Applied to the tree, so that a value is validated with the others, wherever it comes from.
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, source="the config" if isinstance(source, Mapping) else str(source))


def parse_config(tree: dict[str, Any], source: str) -> Config:
    """Validates a config tree, which an earlier release may have written; `source` names it in errors."""
    try:
        # Before validation, whose messages could not be made of such values.
        for problem in beyond_bounds(tree):
            raise UserError(f"{source}: {problem}")
        return Config.model_validate(_without_removed_keys(tree, source))
    except ValidationError as error:
        raise UserError(f"{source}: " + "; ".join(validation_problems(error))) from None


def _without_removed_keys(tree: Any, source: str) -> Any:
    """Copies the tree without the keys of REMOVED_KEYS. A line on stderr names each one that had another value.

    This is not an error, because checkpoints of earlier releases must stay readable.
    """
    if not isinstance(tree, dict):
        return tree
    # Two levels deep, because keys are popped below and the caller keeps the tree.
    tree = {name: dict(section) if isinstance(section, dict) else section for name, section in tree.items()}
    for (section, key), (default, now) in REMOVED_KEYS.items():
        if isinstance(tree.get(section), dict) and key in tree[section]:
            value = tree[section].pop(key)
            # Compared as JSON: to Python, False and 0 are equal.
            if json.dumps(value) != json.dumps(default):
                _note(f"{source}: {section}.{key} = {shown(value)} is left out: this key was removed; {now}")
    return tree


@lru_cache
def _note(text: str) -> None:
    """Shows a line once and on one rank only; a run reads the same config several times."""
    if os.environ.get("RANK", "0") == "0":
        print(visible(text), file=sys.stderr, flush=True)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if key != key.rstrip():  # 'train.seed = 1'
        key, value = key.rstrip(), value.strip()
    section, dot, name = key.partition(".")
    if not equals or not dot or not name:
        meant = _key_meant(key) if equals else None
        hint = f"; did you mean {meant}={value}?" if meant else ""
        raise UserError(f"{override}: an override is written section.key=value, such as train.seed=1{hint}")
    # A section that does not exist is made here; validation then reports it with the nearest name.
    node = tree.setdefault(section, {})
    *parents, name = name.split(".")
    for parent in parents:
        node = node.setdefault(parent, {}) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise UserError(f"{override}: {key.rpartition('.')[0]} is not a section")
    try:
        node[name] = read_value(value, _annotation(key))
    except RecursionError:
        raise UserError(f"{key}: nested more than {MAX_DEPTH} levels deep") from None


def _annotation(key: str) -> Any:
    """Returns the type of a key with its section; Any if there is no such key."""
    model: type[BaseModel] | None = Config
    annotation: Any = Any
    for part in key.split("."):
        if model is None or part not in model.model_fields:
            return Any
        annotation = model.model_fields[part].annotation
        model = _section(annotation)
    return annotation


def changed_settings(before: Config, now: Config) -> Iterator[str]:
    """Yields the settings in which a resumed run differs from the one that saved its checkpoint."""
    for section, keys in now.model_dump().items():
        old = getattr(before, section).model_dump()
        for key, value in keys.items():
            if old[key] != value:
                yield f"{section}.{key}: {json.dumps(old[key])} -> {json.dumps(value)}"


def validation_problems(error: ValidationError) -> Iterator[str]:
    """Yields a sentence for each problem that a section or a whole config has."""
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            yield f"unknown key {' '.join(where.splitlines())}; {_suggestion(problem['loc'])}"
        elif problem["type"] == "missing":
            yield f"{where} is missing"
        elif problem["type"] == "value_error":
            # The text of our own validators; pydantic's message adds "Value error, " in front.
            yield str(problem["ctx"]["error"])
        else:
            message = problem["msg"]
            hint = HINTS.get(problem["type"], "")
            text = problem["input"]
            # A long text is no value in quotes, and may be nested too deeply for JSON's reader.
            if isinstance(text, str) and len(text) <= MAX_SHOWN and read_word(text) != text:
                hint = "; write it without quotes"
            yield f"{where} = {shown(problem['input'])}: {message[0].lower()}{message[1:]}{hint}"


def _suggestion(location: Sequence[Any]) -> str:
    """Names the key that was probably meant by an unknown one."""
    *parents, name = location
    known = _known_keys(parents)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=NEAR)
    # A misspelt key of this section comes before other projects' names, and any key of it before none.
    if not near and (meant := _key_meant(str(name))):
        return f"that is {meant} here"
    near = near or difflib.get_close_matches(str(name), known, n=1, cutoff=0)
    return f"the nearest is {'.'.join([*map(str, parents), near[0]])}"


def _key_meant(name: str) -> str | None:
    """Returns section.key for a key without its section or in a wrong one, or for another project's name of it."""
    name = name.rpartition(".")[2].lower().replace("-", "_")
    sections = {key: _section(field.annotation) for key, field in Config.model_fields.items()}
    for section, model in sections.items():
        # Some keys, such as `kind`, are in two sections: no one of them is meant.
        if model is not None and name in model.model_fields and name != "kind":
            return f"{section}.{name}"
    return next((key for key, names in OTHER_NAMES.items() if name in names.split()), None)


def _known_keys(location: Sequence[Any]) -> list[str]:
    model: type[BaseModel] = Config
    for part in location:
        # An index into a list, such as data.sources, leads to the model that the list's own key led to.
        if not isinstance(part, int):
            model = _section(model.model_fields[str(part)].annotation) or model
    return list(model.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section in an annotation such as `list[SourceConfig] | None`, if there is one."""
    # `int | None` and Literal are no classes, and issubclass raises TypeError for them.
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section, get_args(annotation))), None)
