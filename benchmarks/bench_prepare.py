"""Measures speed and memory of tokenizing text into shards: `python -m benchmarks.bench_prepare --help`.

    python -m benchmarks.bench_prepare    # comparison with other tokenizers, on the standard library's sources
    python -m benchmarks.bench_prepare --memory 5_000_000_000    # one document of 5 GB: the processes' peak memory

Rates are in MB of text per second of processor time, so a busy machine changes them little. All tokenizers run in turn
in every round; the tables show medians. All have the same vocabulary size and were trained on the same text; the column
`of SentencePiece` compares medians of one run. The second table has tokenizers of others: with `--tok`, and their
library alone.
"""

import argparse
import base64
import json
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import sentencepiece

from llm.atomic import atomic_text
from llm.data.byte_level import GPT4_SPLIT, byte_characters
from llm.data.corpus import write_stdlib_corpus
from llm.data.document_reader import read_documents
from llm.data.prepare import prepare_data
from llm.data.tokenizer import BYTE_LEVEL_NAMES, load_tokenizer, train_tokenizer
from llm.model.hf_tokenizer import write_files

BATCH = 256


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", help="text; default: the standard library of this Python")
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--memory", type=int, metavar="BYTES", help="measure memory instead, on a text of this size")
    parser.add_argument("--output", type=Path, help="write the result to this file as JSON")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as name:
        folder = Path(name)
        inputs = options.input or [write_stdlib_corpus(folder / "stdlib.jsonl")["output"]]
        model = train_tokenizer(inputs, folder / "spm", options.vocab_size)["model"]
        if options.memory:
            result = measure_memory(folder, inputs, model, options.memory, options.processes)
        else:
            result = measure_speed(folder, inputs, model, options.rounds, options.processes)
    result |= {"versions": versions(), "machine": platform.processor() or platform.machine()}
    print(json.dumps(result))
    if options.output:
        atomic_text(options.output, json.dumps(result, indent=2) + "\n")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("sentencepiece", "tokenizers", "tiktoken"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


# Speed.


def measure_speed(folder: Path, inputs: list[str], model: str, rounds: int, processes: int) -> dict[str, Any]:
    texts = [document.text for document in read_documents(inputs)]
    size = sum(len(text.encode()) for text in texts)
    runs: dict[str, Callable[[], object]] = {
        "ours, end to end": lambda: prepare(folder, inputs, model, 1),
        "ours, encoding alone, nothing remembered": lambda: encode(texts, model),
        "SentencePiece": lambda: encode_sentencepiece(texts, model),
    }
    foreign = others(folder, inputs, model)
    for kind, (tok, library) in foreign.items():
        runs[f"{kind}, --tok"] = partial(encode, texts, tok)
        runs[f"{kind}, alone"] = partial(library, texts)
    rates: dict[str, list[float]] = {name: [] for name in runs}
    wall: dict[str, list[float]] = {"ours": [], "SentencePiece": []}
    for _ in range(rounds):
        for name, run in runs.items():
            begun = time.process_time()
            run()
            rates[name].append(size / (time.process_time() - begun) / 1e6)
        for name, work in (("ours", prepare_wall), ("SentencePiece", sentencepiece_wall)):
            wall[name].append(size / work(folder, inputs, model, processes, texts) / 1e6)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"\n{size / 1e6:.1f} MB of text, vocabulary {load_tokenizer(model).vocab_size:,}, {rounds} rounds\n")
    print(f"{'one core':<42}{'MB/s':>8}{'of SentencePiece':>20}")
    for name in list(runs)[:3]:
        print(f"{name:<42}{medians[name]:>8.1f}{medians[name] / medians['SentencePiece']:>19.2f}x")
    print(f"\n{'tokenizers of others, one core':<42}{'--tok, MB/s':>14}{'alone, MB/s':>14}{'of it':>8}")
    for kind in foreign:
        ours, theirs = medians[f"{kind}, --tok"], medians[f"{kind}, alone"]
        print(f"{kind:<42}{ours:>14.1f}{theirs:>14.1f}{ours / theirs:>7.2f}x")
    ratio = statistics.median(a / b for a, b in zip(wall["ours"], wall["SentencePiece"], strict=True))
    print(
        f"\n{processes} processes, wall clock, with their start: ours end to end {statistics.median(wall['ours']):.1f}"
        f" MB/s, bare SentencePiece {statistics.median(wall['SentencePiece']):.1f} MB/s: {ratio:.2f}x\n"
    )
    return {"bytes": size, "rounds": rounds, "mb_per_core_second": medians, "processes": processes, "wall_ratio": ratio}


def prepare(folder: Path, inputs: list[str], model: str, workers: int) -> None:
    shutil.rmtree(folder / "shards", ignore_errors=True)
    prepare_data(inputs, model, folder / "shards", seq_len=256, shard_tokens=200_000_000, workers=workers)


def encode(texts: list[str], tok: str) -> None:
    tokenizer = load_tokenizer(tok)
    for begin in range(0, len(texts), BATCH):
        tokenizer.encode_batch([text.encode() for text in texts[begin : begin + BATCH]])


def encode_sentencepiece(texts: list[str], model: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    for begin in range(0, len(texts), BATCH):
        processor.encode(texts[begin : begin + BATCH], return_type="numpy", num_threads=1)


def others(folder: Path, inputs: list[str], model: str) -> dict[str, tuple[str, Callable[[Sequence[str]], object]]]:
    """{kind: (as --tok takes it, its library alone)} of the kinds whose library is installed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab_size = load_tokenizer(model).vocab_size
    byte_level = train_tokenizer(inputs, folder / "byte-level", vocab_size, kind="bytelevel")["model"]
    # Ours as transformers reads it. A text is one word, as with Llama 2, so the library remembers nothing.
    write_files(load_tokenizer(model), folder, 2048)
    fallback = str((folder / "tokenizer.json").rename(folder / "fallback.json"))
    unigram = train_unigram(folder, inputs, vocab_size)
    library = Tokenizer(
        models.Unigram([(unigram.id_to_piece(i), unigram.get_score(i)) for i in range(len(unigram))], 0)
    )
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    library.save(str(folder / "unigram.json"))
    found: dict[str, tuple[str, Callable[[Sequence[str]], object]]] = {
        "byte-level BPE (tokenizer.json)": (byte_level, alone(byte_level)),
        "BPE with byte fallback (tokenizer.json)": (fallback, alone(fallback)),
        "unigram (tokenizer.json)": (str(folder / "unigram.json"), alone(folder / "unigram.json")),
        "unigram (SentencePiece)": (
            str(folder / "unigram.model"),
            lambda texts: unigram.encode(texts, return_type="numpy", num_threads=1),
        ),
    }
    if find_spec("tiktoken") is not None:
        import tiktoken

        ranks = write_ranks(folder / "ranks.tiktoken", byte_level)
        encoding = tiktoken.Encoding("same", pat_str=GPT4_SPLIT, mergeable_ranks=ranks, special_tokens={})
        found["tiktoken ranks"] = (
            f"{folder / 'ranks.tiktoken'}:cl100k",
            lambda texts: [encoding.encode_ordinary(text) for text in texts],
        )
    return found


def alone(path: str | Path) -> Callable[[Sequence[str]], object]:
    from tokenizers import Tokenizer

    library = Tokenizer.from_file(str(path))
    return lambda texts: [library.encode(text, add_special_tokens=False).ids for text in texts]


def train_unigram(folder: Path, inputs: list[str], vocab_size: int) -> sentencepiece.SentencePieceProcessor:
    lines = (line for document in read_documents(inputs) for line in document.text.splitlines() if len(line) < 1000)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(folder / "unigram"),
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        minloglevel=4,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "unigram.model"))


def write_ranks(path: Path, tokenizer_json: str) -> dict[bytes, int]:
    """Writes the vocabulary of a byte-level BPE as tiktoken ranks, without its two special tokens."""
    byte_of = {char: byte for byte, char in enumerate(byte_characters())}
    vocabulary = json.loads(Path(tokenizer_json).read_text())["model"]["vocab"]
    pieces = sorted(vocabulary.keys() - set(BYTE_LEVEL_NAMES), key=vocabulary.__getitem__)
    ranks = {bytes(byte_of[char] for char in piece): rank for rank, piece in enumerate(pieces)}
    lines = [b"%s %d\n" % (base64.b64encode(piece), rank) for piece, rank in ranks.items()]
    path.write_bytes(b"".join(lines))
    return ranks


def prepare_wall(folder: Path, inputs: list[str], model: str, processes: int, texts: list[str]) -> float:
    begun = time.perf_counter()
    prepare(folder, inputs, model, processes)
    return time.perf_counter() - begun


def sentencepiece_wall(folder: Path, inputs: list[str], model: str, processes: int, texts: list[str]) -> float:
    context = multiprocessing.get_context("spawn")
    begun = time.perf_counter()
    children = [
        context.Process(target=encode_sentencepiece, args=(texts[i::processes], model)) for i in range(processes)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return time.perf_counter() - begun


# Memory.


def measure_memory(folder: Path, inputs: list[str], model: str, size: int, processes: int) -> dict[str, Any]:
    """Prepares one document of about `size` bytes in a separate process. Returns the peak memory of all processes."""
    import psutil

    path = make_text(folder / "large.txt", inputs, size)
    program = "import sys; from llm.cli import main; sys.exit(main())"
    arguments = ["--input", path, "--documents", "file", "--tok", model, "--out_dir", folder / "shards"]
    begun = time.perf_counter()
    process = psutil.Popen(
        [sys.executable, "-c", program, "prepare_data", *map(str, arguments), "--workers", str(processes), "--json"],
        stdout=subprocess.PIPE,
    )
    peak: dict[str, int] = {"tree": 0, "main": 0, "largest_worker": 0}
    while process.poll() is None:
        workers = [resident(child) for child in process.children(recursive=True)]
        main_memory = resident(process)
        peak["tree"] = max(peak["tree"], main_memory + sum(workers))
        peak["main"] = max(peak["main"], main_memory)
        peak["largest_worker"] = max([peak["largest_worker"], *workers])
        time.sleep(0.05)
    seconds = time.perf_counter() - begun
    if process.returncode:
        raise SystemExit(process.returncode)
    peak_mb = {name: round(value / 1e6) for name, value in peak.items()}
    print(f"\n{path.stat().st_size / 1e9:.2f} GB in {seconds:.0f} s; peak memory in MB: {peak_mb}\n")
    return {"bytes": path.stat().st_size, "seconds": round(seconds), "workers": processes, "peak_mb": peak_mb}


def resident(process: Any) -> int:
    import psutil

    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def make_text(path: Path, inputs: list[str], size: int) -> Path:
    """Writes one text of that size: the inputs' text repeated, each time from another place on."""
    text = b"".join(document.text.encode() for document in read_documents(inputs))
    chance = random.Random(0)
    with open(path, "wb") as file:
        while file.tell() < size:
            cut = text.find(b" ", chance.randrange(len(text)))
            file.write(text[cut:] + text[:cut])
    return path


if __name__ == "__main__":
    main()
