"""llm-from-scratch: pretrain a decoder-only language model from raw text. `llm --help` lists the commands."""

from llm_from_scratch import name_conflict

__version__ = "0.1.0"

conflict = name_conflict()
if conflict is not None:
    # With a name, `python -m llm` prints this error as one line; without one, runpy would let the traceback through.
    raise ImportError(conflict, name="llm")
