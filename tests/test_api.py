"""The Python API: what `import llm` offers, and what it imports for that."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import llm

INIT = Path(llm.__file__)


STAGES = [
    ("import llm", {"torch", "numpy", "pydantic", "rich", "deepspeed"}),
    ("llm.UserError, llm.read_metrics, llm.Score", {"torch", "numpy", "pydantic", "rich", "pandas"}),
    ("llm.Config, llm.load_config, llm.load_tokenizer, llm.Tokenizer", {"torch", "deepspeed", "pandas"}),
    ("llm.load, llm.ShardDataset, llm.Batch", {"deepspeed", "transformers", "pandas"}),
]


def test_a_name_imports_only_what_it_needs() -> None:
    """One Python runs the lines, and says after each what it has imported until then."""
    imported = "print(*{name.partition('.')[0] for name in sys.modules})"
    program = "\n".join(["import sys", *(f"{line}\n{imported}" for line, _ in STAGES)])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    for (line, left_out), modules in zip(STAGES, done.stdout.splitlines(), strict=True):
        assert set(modules.split()) & left_out == set(), line


def test_each_public_name_is_there_and_no_other() -> None:
    for name in llm.__all__:
        assert getattr(llm, name) is getattr(llm, name)
    assert set(llm.__all__) <= set(dir(llm))
    with pytest.raises(AttributeError, match="module 'llm' has no attribute 'nothing'"):
        _ = llm.nothing  # type: ignore[attr-defined]


def test_type_checkers_see_the_imports_that_python_makes() -> None:
    for_types = {
        node.module: tuple(alias.name for alias in node.names)
        for block in ast.parse(INIT.read_text()).body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
    }
    assert for_types == llm._NAMES
    assert sorted(llm.__all__) == sorted(["__version__", *(name for names in for_types.values() for name in names)])


def test_the_page_names_every_public_name() -> None:
    page = (INIT.parents[1] / "docs/api.md").read_text()
    assert [name for name in llm.__all__ if f"llm.{name}" not in page] == []
