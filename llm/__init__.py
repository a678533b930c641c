"""llm-from-scratch: pretrain a decoder-only language model from raw text. `llm --help` lists the commands.

The names of __all__ are the Python API, which docs/api.md describes; all others are private. Each is imported when it
is used first, because torch, which most of them need, takes seconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

from llm.version import __version__
from llm_from_scratch import name_conflict

if TYPE_CHECKING:
    from llm.config import Config
    from llm.config_file import load_config
    from llm.data.shard_dataset import ShardDataset
    from llm.data.shards import Batch
    from llm.data.tokenizer import Tokenizer, load_tokenizer
    from llm.errors import UserError
    from llm.inference.language_model import LanguageModel, load
    from llm.metrics import Score, read_frame, read_metrics
    from llm.training.train import train

__all__ = [
    "Batch",
    "Config",
    "LanguageModel",
    "Score",
    "ShardDataset",
    "Tokenizer",
    "UserError",
    "__version__",
    "load",
    "load_config",
    "load_tokenizer",
    "read_frame",
    "read_metrics",
    "train",
]

# {module: names}: the imports above, for Python.
_NAMES = {
    "llm.config": ("Config",),
    "llm.config_file": ("load_config",),
    "llm.data.shard_dataset": ("ShardDataset",),
    "llm.data.shards": ("Batch",),
    "llm.data.tokenizer": ("Tokenizer", "load_tokenizer"),
    "llm.errors": ("UserError",),
    "llm.inference.language_model": ("LanguageModel", "load"),
    "llm.metrics": ("Score", "read_frame", "read_metrics"),
    "llm.training.train": ("train",),
}


def __getattr__(name: str) -> Any:
    for module, names in _NAMES.items():
        if name in names:
            # Kept, so that Python asks only once.
            value = globals()[name] = getattr(importlib.import_module(module), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


conflict = name_conflict()
if conflict is not None:
    # With a name, `python -m llm` prints this error as one line; without one, runpy would let the traceback through.
    raise ImportError(conflict, name="llm")
