"""What the commands check of their paths before anything imports torch, which takes seconds.

The functions that do the work check everything again.
"""

from collections.abc import Sequence
from pathlib import Path

from llm.atomic import check_absent
from llm.config_file import load_config
from llm.data.manifest import MANIFEST_NAME
from llm.data.text_files import find_sources
from llm.data.tokenizer import load_tokenizer
from llm.errors import UserError
from llm.inference.prompts import read_prompts
from llm.model.checkpoint_path import last_checkpoints, locate, saved


def check_eval(
    ckpt: str, inputs: Sequence[str] = (), documents: str = "auto", text_key: str = "text", tok: str | None = None
) -> None:
    _check_model(ckpt, tok)
    for path in inputs:
        if not Path(path, MANIFEST_NAME).is_file():
            find_sources([path], documents, text_key)


def check_generate(ckpt: str, prompts: str = "-", tok: str | None = None) -> None:
    _check_model(ckpt, tok)
    # A pipe can be read only once.
    if prompts != "-" and (Path(prompts).is_file() or not Path(prompts).exists()):
        read_prompts(None, prompts)


def check_export(ckpt: str, out_dir: str) -> None:
    locate(ckpt)
    check_absent(Path(out_dir))


def check_average(run_dir: str, out_dir: str | None = None, last: int | None = None) -> None:
    last_checkpoints(Path(run_dir), last)
    if out_dir is not None:
        check_absent(Path(out_dir))


def check_import(source: str, out_dir: str, tok: str | None = None) -> None:
    if not Path(source).is_dir():
        raise UserError(f"{source}: no such folder; --from names a Hugging Face model folder")
    if tok is not None:
        load_tokenizer(tok)
    check_absent(Path(out_dir))


def check_inspect(path: str = "") -> None:
    # With --verify, a damaged checkpoint is a result.
    if path and Path(path).exists() and not Path(path, MANIFEST_NAME).exists() and not saved(Path(path)):
        locate(path)


def check_compare(run_a: str, run_b: str) -> None:
    for run in (run_a, run_b):
        if not Path(run, "metrics.jsonl").is_file() and not saved(Path(run)):
            raise UserError(f"{run}: holds no run; name the checkpoint.dir of one")


def check_config(path: str = "", config_path: str = "", config: str = "", overrides: Sequence[str] = ()) -> None:
    """For verbs that load the config themselves, from the path under one of these names."""
    if named := path or config_path or config:
        load_config(named, overrides)


def _check_model(ckpt: str, tok: str | None) -> None:
    locate(ckpt)
    if tok is not None:
        load_tokenizer(tok)
