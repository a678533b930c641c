"""`llm inspect`: shows a directory of shards, a checkpoint or the tokens of a text, and verifies shards."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from llm.atomic import atomic_file
from llm.data.manifest import MANIFEST_NAME, SPLITS, Manifest, read_manifest
from llm.data.shards import Loader, document_starts, verify_shard
from llm.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_of
from llm.display import Display, tell
from llm.errors import UserError, visible

SAMPLE_TOKENS = 128
BAR_COLUMNS = 36  # of the 80 that a terminal has at least


def inspect(
    path: str | os.PathLike[str],
    *,
    verify: bool = False,
    samples: int = 3,
    png: str | os.PathLike[str] | None = None,
    show: bool = False,
) -> dict[str, Any]:
    """Describes a directory of shards or a checkpoint, as `llm inspect --json` prints it.

    Args:
        verify: read all of every shard, or of every checkpoint of a run; problems are printed to stderr, and "failed"
            lists the damaged shards or checkpoints.
        samples: number of parts of the training split to decode.
        png: the file for a histogram of document lengths.
        show: print the description.

    Raises:
        UserError: there is no such thing at `path`, or a shard cannot be read.
    """
    path = Path(path)
    if (path / MANIFEST_NAME).exists() or not path.exists():
        result = _shards(read_manifest(path), verify, samples, png)
    elif png:
        raise UserError(f"{path}: holds no {MANIFEST_NAME}; --png is for a directory of shards")
    else:
        result = _verify_checkpoints(path) if verify else _checkpoint(path)
    if show:
        _print_report(result)
    return result


def inspect_text(tok: str | os.PathLike[str], text: str, *, show: bool = False) -> dict[str, Any]:
    """Returns the tokens of a text and its bytes per token. show: print them."""
    tokenizer = load_tokenizer(tok)
    ids = tokenizer.encode(text)
    spelled = tokenizer.piece_bytes()
    size = len(text.encode())
    result = {
        "tokens": len(ids),
        "bytes": size,
        "bytes_per_token": size / len(ids) if ids else None,
        # A token may be a part of a character.
        "pieces": [[i, spelled[i].decode(errors="backslashreplace")] for i in ids],
    }
    if show:
        _print_report(result)
    return result


def _print_report(found: dict[str, Any]) -> None:
    for key, value in found.items():
        if key == "pieces":
            for number, piece in value:
                tell(f"{number:>8}  {piece!r}")
        elif key == "lengths":
            tell("documents by their length in tokens")
            most = max((count for *_, count in value), default=1)
            first = next((k for k, (*_, count) in enumerate(value) if count), 0)
            for low, high, count in value[first:]:
                tell(f"{low:>12,} to {high:<12,}{count:>14,}  {'#' * round(BAR_COLUMNS * count / most)}")
        elif key == "samples":
            for documents in value:
                tell("-- sample " + "-" * 62)
                tell("\n-- next document ".ljust(73, "-").join(f"{text}\n" for text in documents).rstrip("\n"))
        elif isinstance(value, dict):
            for name, entry in value.items():
                tell(f"{key + '.' + name:<31} {_text(entry)}")
        # _verify has already printed each problem.
        elif key != "failed":
            tell(f"{key:<31} {_text(value)}")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(entry)}" for name, entry in value.items())
    # A bool is an int, and {True:,} gives "1".
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value).replace("\n", "\\n")


def _shards(manifest: Manifest, verify: bool, samples: int, png: str | os.PathLike[str] | None) -> dict[str, Any]:
    tokenizer = tokenizer_of(manifest)
    result: dict[str, Any] = {
        "path": str(manifest.path),
        "dataset_hash": manifest.dataset_hash,
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "vocab_size": manifest.vocab_size,
        "seq_len": manifest.seq_len,
    }
    for split in SPLITS:
        shards = manifest.shards[split]
        result[split] = {
            "shards": len(shards),
            "bytes": sum(shard.bytes for shard in shards),
            "tokens": sum(shard.tokens for shard in shards),
            "documents": sum(shard.documents for shard in shards),
            "rows": manifest.sequences(split, manifest.seq_len),
            "unused_tokens": manifest.unused_tokens(split, manifest.seq_len),
        }
    result["tokenizer"] = {key: value for key, value in manifest.tokenizer.items() if key != "hash_covers"}
    result["packing"] = manifest.packing
    result["counters"] = manifest.counters
    if verify:  # damaged shards cannot be shown, so the rest is skipped
        result["failed"] = _verify(manifest, tokenizer)
        return result
    lengths = _lengths(manifest)
    result["lengths"] = [[2**k, 2 ** (k + 1) - 1, int(count)] for k, count in enumerate(lengths)]
    result["samples"] = _samples(manifest, tokenizer, samples)
    if png is not None:
        _draw(lengths, manifest, png)
    return result


def _verify(manifest: Manifest, tokenizer: Tokenizer) -> list[str]:
    """Returns the names of damaged shards, and prints each problem to stderr. Uses one thread per core."""
    shards = [shard for split in SPLITS for shard in manifest.shards[split]]
    failed = []
    with (
        Display("verifying", sum(shard.bytes for shard in shards)) as display,
        # Threads are enough, because the C++ that reads a shard releases the GIL.
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        done = 0
        bos_id, eos_id, in_text = tokenizer.bos_id, tokenizer.eos_id, tokenizer.special_in_text
        verdicts = pool.map(lambda shard: verify_shard(manifest, shard, bos_id, eos_id, in_text=in_text), shards)
        for shard, problems in zip(shards, verdicts, strict=True):
            for problem in problems:
                display.line(problem)
            failed += [shard.file] if problems else []
            done += shard.bytes
            display.update(done, f"verifying {shard.file}")
        display.line(
            f"{len(failed)} of {len(shards)} shards are damaged; make them again with `llm prepare_data`"
            if failed
            else f"{len(shards)} shards, {done:,} bytes: every checksum, id and document boundary is right"
        )
    return failed


def _lengths(manifest: Manifest) -> np.ndarray:
    """Counts documents of 2^k to 2^(k+1) - 1 tokens, BOS and EOS included: int64 [k]. Reads one shard at a time."""
    counts = np.zeros(0, np.int64)
    for split in SPLITS:
        offset, begin = 0, np.zeros(0, np.int64)  # begin: start of the document that may continue in the next shard
        for shard in manifest.shards[split]:
            starts = np.concatenate([begin, document_starts(manifest, shard).astype(np.int64) + offset])
            offset += shard.tokens
            counts = _add_lengths(counts, np.diff(starts))
            begin = starts[-1:]
        counts = _add_lengths(counts, offset - begin)
    return counts


def _add_lengths(counts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    # frexp gives the exact floor of log2; np.log2 may round up to the next power.
    more = np.bincount(np.frexp(lengths.astype(np.float64))[1] - 1, minlength=len(counts))
    more[: len(counts)] += counts
    return more


def _samples(manifest: Manifest, tokenizer: Tokenizer, count: int) -> list[list[str]]:
    """Decodes evenly drawn parts of the training split. Each gives a list with the texts of its documents."""
    # The label of a sequence's last token is the next token in the same shard.
    seq_len = min(SAMPLE_TOKENS, max(shard.tokens for shard in manifest.shards["train"]) - 1)
    count = min(count, manifest.sequences("train", seq_len))
    if count < 1:
        return []
    # With a fixed seed every call shows the same samples. For one batch, one thread is enough.
    with Loader(manifest, "train", seq_len=seq_len, seed=0, global_batch=count, micro_batch=count, threads=1) as loader:
        batch = next(loader)
        sequences = zip(batch.input_ids.tolist(), batch.doc_start.tolist(), strict=True)
        return [_documents(tokenizer, ids, starts) for ids, starts in sequences]


def _documents(tokenizer: Tokenizer, ids: Sequence[int], starts: Sequence[int]) -> list[str]:
    begins = sorted({0, *starts})
    parts = [ids[begin:end] for begin, end in zip(begins, [*begins[1:], len(ids)], strict=True)]
    markers = (tokenizer.bos_id, tokenizer.eos_id)
    # A sample may begin or end inside a character.
    return [tokenizer.decode_bytes([i for i in part if i not in markers]).decode(errors="replace") for part in parts]


def _draw(lengths: np.ndarray, manifest: Manifest, png: str | os.PathLike[str]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    edges = 2.0 ** np.arange(len(lengths) + 1)
    axes.stairs(lengths, edges, fill=True, color="tab:blue", alpha=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel("documents")
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_title(visible(str(manifest.path)), parse_math=False)  # two $ in a name are no TeX
    axes.grid(alpha=0.3)
    with atomic_file(png) as file:
        FigureCanvasAgg(figure).print_png(file)


def _verify_checkpoints(path: Path) -> dict[str, Any]:
    """Reads all of a checkpoint, or of every checkpoint in a run's folder."""
    from llm.model import checkpoint, checkpoint_path

    folders = checkpoint_path.saved(path) or [checkpoint_path.locate(path)]
    failed = []
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in folders]
    with Display("verifying", sum(sizes)) as display:
        for number, folder in enumerate(folders):
            problems = checkpoint.verify(folder)
            for problem in problems:
                display.line(problem)
            failed += [folder.name] if problems else []
            display.update(sum(sizes[: number + 1]), f"verifying {folder.name}")
        display.line(
            f"{len(failed)} of {len(folders)} checkpoints are damaged"
            if failed
            else f"{len(folders)} checkpoints, {sum(sizes):,} bytes: every checksum is right"
        )
    return {"path": str(path), "checkpoints": [folder.name for folder in folders], "failed": failed}


def _checkpoint(path: Path) -> dict[str, Any]:
    from dataclasses import asdict

    from llm.model import checkpoint, checkpoint_path
    from llm.model.transformer import parameter_count

    folder = checkpoint_path.locate(path)
    state, config = checkpoint.read_state(folder)
    return {
        "path": str(folder),
        "step": state.step,
        "tokens": state.tokens,
        "parameters": parameter_count(config.model),
        "data": asdict(state.data),
        "model": config.model.model_dump(),
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
    }
