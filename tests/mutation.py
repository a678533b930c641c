"""Whether the tests can fail: an op with one thing changed in its source has to disagree with the reference."""

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

import pytest

import kernels.launch

OPS = Path(kernels.launch.__file__).parent
_numbers = itertools.count()


def mutated(op: str, old: str, new: str, folder: Path) -> ModuleType:
    """kernels/OP.py as a module of its own, with `old`, which must stand there exactly once, replaced by `new`."""
    source = (OPS / f"{op}.py").read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in kernels/{op}.py"
    name = f"mutated_{op}_{next(_numbers)}"
    path = folder / f"{name}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        # The registered ops stay those of the true module.
        patch.setattr(kernels.launch, "registered", lambda *_, **__: lambda launcher: launcher)
        spec.loader.exec_module(module)
    return module
