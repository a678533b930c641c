"""The architecture that docs/architecture.md draws: imports point one way, and a thing is found under its name."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("llm", "kernels")
    for path in sorted((ROOT / package).rglob("*.py*"))
    if path.suffix in (".py", ".pyi")  # the types of a C++ extension
}
ALLOWED = {
    "kernels": set(),
    "llm": {"kernels"},
    "llm.data": {"llm"},
    "llm.model": {"llm", "kernels", "llm.data"},
    "llm.inference": {"llm", "kernels", "llm.data", "llm.model"},
    "llm.training": {"llm", "kernels", "llm.data", "llm.model", "llm.inference"},
    "llm.tools": {"llm", "kernels", "llm.data", "llm.model", "llm.inference", "llm.training"},
}
"""What each package may import. "llm" is the files at the top without the command line and the Python API (__init__),
which may import all."""


def imports(path: Path) -> Iterator[str]:
    """The project's modules that a file imports anywhere: at its top, inside functions, and for types alone."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def graph() -> dict[str, set[str]]:
    return {name: {other for other in imports(path) if other in MODULES} - {name} for name, path in MODULES.items()}


def package(module: str) -> str:
    return module.rpartition(".")[0] if MODULES[module].name != "__init__.py" and "." in module else module


def test_no_circle_of_imports_between_files() -> None:
    try:
        list(TopologicalSorter(graph()).static_order())
    except CycleError as error:
        pytest.fail(f"these files import each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("name", sorted(set(ALLOWED) - {"llm"}))
def test_a_package_imports_only_those_below_it(name: str) -> None:
    for module, others in graph().items():
        if package(module) == name:
            above = {other for other in others if package(other) != name and package(other) not in ALLOWED[name]}
            assert not above, f"{module} imports {above}"
            assert not {"llm.cli", "llm.cli_verbs"} & others, f"{module} imports the command line"


def test_the_files_at_the_top_import_no_package_but_kernels() -> None:
    for module, others in graph().items():
        if package(module) == "llm" and module not in ("llm", "llm.cli", "llm.__main__"):
            assert {package(other) for other in others} <= {"llm", "kernels"}, f"{module} imports {others}"


def test_only_the_training_package_imports_deepspeed() -> None:
    for module, path in MODULES.items():
        if package(module) != "llm.training":
            assert not any(name.split(".")[0] == "deepspeed" for name in imports(path)), module


def test_no_file_has_a_name_of_the_standard_librarys() -> None:
    """Its folder comes first on sys.path where a file is run by its path: every import of that name would find it."""
    taken = {name for name in MODULES if name.rpartition(".")[2] in sys.stdlib_module_names} - {"llm.__main__"}
    assert not taken


@pytest.mark.parametrize(
    ("verb", "module"),
    {
        "train_tokenizer": "data.tokenizer",
        "prepare_data": "data.prepare",
        "corpus": "data.corpus",
        "config": "tools.config_keys",
        "train": "training.train",
        "plan": "tools.plan",
        "eval": "inference.evaluate",
        "eval --tasks": "inference.eval_tasks",
        "generate": "inference.generate",
        "profile": "tools.profile_step",
        "report": "tools.report",
        "export": "tools.export",
        "import": "tools.import_model",
        "average": "tools.average",
        "compare": "tools.compare",
        "doctor": "tools.doctor",
        "inspect": "tools.inspect_files",
    }.items(),
)
def test_a_verb_is_found_under_its_name(verb: str, module: str) -> None:
    word = {"train_tokenizer": "tokenizer", "prepare_data": "prepare", "eval --tasks": "eval_tasks"}.get(verb, verb)
    assert word in module.rpartition(".")[2]
    assert f"llm.{module}" in MODULES
