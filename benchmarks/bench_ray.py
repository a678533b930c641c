"""Measures `llm prepare_data --ray` on local Ray clusters: `python -m benchmarks.bench_ray --help`.

    python -m benchmarks.bench_ray --input data/raw/corpus.jsonl --output ray.json

In each round the pool of processes and a cluster with as many CPUs prepare the same text in turn, for each number of
workers, so a busy machine slows both; the table has medians of the ratios. The processor time of the main process,
which reads the text and writes the shards, bounds how many workers it can keep busy.
"""

import argparse
import contextlib
import json
import os
import platform
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llm.atomic import atomic_text
from llm.data.corpus import write_stdlib_corpus
from llm.data.prepare import prepare_data
from llm.data.tokenizer import train_tokenizer

SECRET = secrets.token_hex(32)
HEAD = """
import sys, ray
cpus, folder = sys.argv[1:]
options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
context = ray.init(address="local", num_cpus=int(cpus), _temp_dir=folder, object_store_memory=200_000_000, **options)
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def local_cluster(folder: Path, cpus: int, **environment: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Starts a Ray cluster on this machine. Yields its address, and the process whose children are all of Ray's.

    folder: holds Ray's files; environment: of the workers, in addition to this process's.
    """
    # Ray listens to the network and runs whatever it gets, so it asks for a secret. Ray reads it when it is imported.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": SECRET}
    with tempfile.TemporaryDirectory(prefix="r") as short, open(folder / "head.txt", "w+") as log:
        # A link, because the path of a socket has at most 107 characters, and Ray adds 64 to its folder's.
        link = Path(short) / "l"
        link.symlink_to(folder, target_is_directory=True)
        # Ray gives up after 30 seconds, which a busy machine may take.
        for _ in range(3):
            head = subprocess.Popen(
                [sys.executable, "-c", HEAD, str(cpus), str(link)],
                env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"} | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
            assert head.stdin is not None
            assert head.stdout is not None
            with head, head.stdin:  # the end of its input ends it
                if address := head.stdout.readline().strip():
                    yield address, head
                    return
        log.seek(0)
        raise RuntimeError(f"Ray did not start: {log.read()[-2000:]}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", help="text; default: the standard library of this Python")
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--copies", type=int, default=8, help="copies of the text that are read")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the result to this file as JSON")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-ray-") as name:
        folder = Path(name)
        inputs = options.input or [write_stdlib_corpus(folder / "stdlib.jsonl")["output"]]
        model = train_tokenizer(inputs, folder / "spm", options.vocab_size)["model"]
        copies = [
            shutil.copy(path, folder / f"{i}-{Path(path).name}") for i in range(options.copies) for path in inputs
        ]
        rows = [measure(folder, copies, model, workers, options.rounds) for workers in options.workers]
    size = f"{rows[0]['bytes'] / 1e6:.1f} MB of text"
    print(f"\n{size}, medians of {options.rounds} rounds, wall clock with the start of the workers\n")
    print(
        f"{'workers':>7}{'processes, MB/s':>17}{'Ray, MB/s':>11}{'ratio':>7}{'its main process, MB per CPU second':>38}"
    )
    for row in rows:
        print(
            f"{row['workers']:>7}{row['processes']:>17.1f}{row['ray']:>11.1f}{row['ratio']:>7.2f}"
            f"{row['main_mb_per_cpu_second']:>38.0f}"
        )
    load = os.getloadavg()
    result = {
        "rows": rows,
        "rounds": options.rounds,
        "cores": len(os.sched_getaffinity(0)),
        "load_average_at_the_end": load,
        "versions": {"python": platform.python_version(), "ray": version("ray")},
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(result))
    if options.output:
        atomic_text(options.output, json.dumps(result, indent=2) + "\n")


def measure(folder: Path, inputs: list[str], model: str, workers: int, rounds: int) -> dict[str, Any]:
    rates: dict[str, list[float]] = {"processes": [], "ray": [], "main_mb_per_cpu_second": []}
    (folder / "ray").mkdir(exist_ok=True)
    with local_cluster(folder / "ray", workers) as (address, _):
        prepare(folder, inputs, model, ray=address)  # imports Ray
        for _ in range(rounds):
            size, seconds, _ = prepare(folder, inputs, model, workers=workers)
            rates["processes"].append(size / seconds / 1e6)
            size, seconds, cpu = prepare(folder, inputs, model, ray=address)
            rates["ray"].append(size / seconds / 1e6)
            rates["main_mb_per_cpu_second"].append(size / cpu / 1e6)
    ratio = statistics.median(a / b for a, b in zip(rates["ray"], rates["processes"], strict=True))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {"workers": workers, "bytes": size, "ratio": ratio, **medians}


def prepare(folder: Path, inputs: list[str], model: str, **options: Any) -> tuple[int, float, float]:
    """Returns bytes of text, seconds, and processor seconds of this process."""
    shutil.rmtree(folder / "shards", ignore_errors=True)
    wall, cpu = time.perf_counter(), time.process_time()
    result = prepare_data(inputs, model, folder / "shards", seq_len=256, shard_tokens=200_000_000, **options)
    return result["bytes"], time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
