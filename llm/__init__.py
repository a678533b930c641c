"""Pretrain a decoder-only language model from raw text. `llm --help` lists the commands."""

__version__ = "0.1.0"
