"""Measures speed and memory of tokenizing text into shards: `python -m benchmarks.bench_prepare --help`.

    python -m benchmarks.bench_prepare    # comparison with other tokenizers, on the standard library's sources
    python -m benchmarks.bench_prepare --memory 5_000_000_000    # one document of 5 GB: the processes' peak memory

Rates are in MB of text per second of processor time, so a busy machine changes them little. All tokenizers run in turn
in every round; the table shows medians. All have the same vocabulary size and were trained on the same text; the column
`of SentencePiece` compares medians of one run.
"""

import argparse
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
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import sentencepiece

from llm.atomic import atomic_text
from llm.data.corpus import write_stdlib_corpus
from llm.data.document_reader import read_documents
from llm.data.prepare import prepare_data
from llm.data.tokenizer import load_tokenizer, train_tokenizer

# The pattern with which GPT-4 splits text before byte-pair encoding, without its possessive quantifiers.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
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
    runs: dict[str, Callable[[], None]] = {
        "ours, end to end": lambda: prepare(folder, inputs, model, 1),
        "ours, encoding alone, nothing remembered": lambda: encode_ours(texts, model),
        "SentencePiece": lambda: encode_sentencepiece(texts, model),
        **others(texts, load_tokenizer(model).vocab_size),
    }
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
    for name, rate in medians.items():
        print(f"{name:<42}{rate:>8.1f}{rate / medians['SentencePiece']:>19.2f}x")
    ratio = statistics.median(a / b for a, b in zip(wall["ours"], wall["SentencePiece"], strict=True))
    print(
        f"\n{processes} processes, wall clock, with their start: ours end to end {statistics.median(wall['ours']):.1f}"
        f" MB/s, bare SentencePiece {statistics.median(wall['SentencePiece']):.1f} MB/s: {ratio:.2f}x\n"
    )
    return {"bytes": size, "rounds": rounds, "mb_per_core_second": medians, "processes": processes, "wall_ratio": ratio}


def prepare(folder: Path, inputs: list[str], model: str, workers: int) -> None:
    shutil.rmtree(folder / "shards", ignore_errors=True)
    prepare_data(inputs, model, folder / "shards", seq_len=256, shard_tokens=200_000_000, workers=workers)


def encode_ours(texts: list[str], model: str) -> None:
    tokenizer = load_tokenizer(model)
    for begin in range(0, len(texts), BATCH):
        tokenizer.encode_batch([text.encode() for text in texts[begin : begin + BATCH]])


def encode_sentencepiece(texts: list[str], model: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    for begin in range(0, len(texts), BATCH):
        processor.encode(texts[begin : begin + BATCH], return_type="numpy", num_threads=1)


def others(texts: list[str], vocab_size: int) -> dict[str, Callable[[], None]]:
    """Hugging Face's tokenizers and tiktoken with one vocabulary, if they are installed."""
    if find_spec("tokenizers") is None:
        return {}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HuggingFace

    hugging_face = HuggingFace(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    hugging_face.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    hugging_face.train_from_iterator(texts, trainer)
    found: dict[str, Callable[[], None]] = {
        "tokenizers": lambda: [hugging_face.encode(text) for text in texts] and None
    }
    if find_spec("tiktoken") is not None:
        import tiktoken

        # ByteLevel maps each byte to a character: printable ones to themselves, the others to U+0100 and above.
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        hidden = [byte for byte in range(256) if byte not in printable]
        byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
        pieces = sorted(hugging_face.get_vocab().items(), key=lambda item: item[1])
        single = [bytes([byte]) for byte in range(256)]
        merged = [bytes(byte_of[char] for char in piece) for piece, _ in pieces if len(piece) > 1]
        ranks = {piece: rank for rank, piece in enumerate([*single, *merged])}
        encoding = tiktoken.Encoding("same", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
        found["tiktoken"] = lambda: [encoding.encode_ordinary(text) for text in texts] and None
    return found


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
