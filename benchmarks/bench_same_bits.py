"""What train.same_bits costs: `python -m benchmarks.bench_same_bits --config configs/tiny.json --processes 1 2 4`.

For each number of processes one launch holds two engines, one of each kind, and takes steps with them in turn, on
random tokens. The medians of the ratios of neighbouring steps are compared: other programs slow both down. Processor
time counts all threads of all processes and hardly depends on other programs. With --memory two more launches per
number, with one engine each, have peak memory of their own. Steps are those of Engine.backward and Engine.update,
without data and disk.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llm.atomic import atomic_text

KINDS = {"usual": False, "same_bits": True}


def worker(options: argparse.Namespace) -> dict[str, Any]:
    """Takes the steps of one process; returns, on rank 0, seconds and processor seconds of each step and kind."""
    import torch

    from benchmarks.training_step import random_batches
    from llm import device_rates
    from llm.config_file import load_config
    from llm.training.batch_plan import make_plan
    from llm.training.engine import start, stop
    from llm.training.rules import follow
    from llm.training.setup import build_engine

    given = [f"model.vocab_size={options.vocab_size}", f"data.seq_len={options.seq_len}", *options.overrides]
    configs = {
        kind: follow(load_config(options.config, [*given, f"train.same_bits={KINDS[kind]}".lower()]), None)[0]
        for kind in options.kinds
    }
    first = next(iter(configs.values()))
    device_rates.measure_matmul_flops = lambda *arguments: 1.0  # type: ignore[assignment] # it takes time and is not shown
    world = start(first)
    plan = make_plan(first, world.size, world.device, dtype=world.dtype)
    engines = {kind: build_engine(config, world, plan, None) for kind, config in configs.items()}
    batches = random_batches(first, plan, world.device)
    # The parts of a step that the metrics sum over ranks.
    taken: dict[str, list[tuple[float, float]]] = {kind: [] for kind in engines}
    for pair in range(1 + options.pairs):
        # In turn the first and the second of a pair.
        for kind in sorted(engines, reverse=pair % 2 == 1):
            world.barrier()
            begin, processor = time.perf_counter(), time.process_time()
            for batch in batches:
                engines[kind].backward(batch, plan.tokens_per_step)
            engines[kind].update(1e-4)
            world.barrier()
            used = world.sum(torch.tensor(time.process_time() - processor, dtype=torch.float64))
            if pair:  # the first one warms up
                taken[kind].append((time.perf_counter() - begin, float(used)))
    memory = world.sum(torch.tensor(float(device_rates.peak_memory_bytes(world.device)))) / world.size
    stop()
    return {
        "steps": taken,
        "memory_bytes": float(memory),
        "parameters": plan.parameters,
        "micro_batches": plan.accumulation * world.size,
        "micro_batch": plan.micro_batch,
        "seq_len": plan.seq_len,
        "precision": world.precision,
        "optimizer": first.optimizer.kind,
        "zero_stage": first.deepspeed.zero_stage,
    }


def launch(options: argparse.Namespace, processes: int, kinds: Sequence[str], pairs: int) -> dict[str, Any]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.bench_same_bits", "--worker", "--config", options.config]
    command += ["--vocab_size", str(options.vocab_size), "--seq_len", str(options.seq_len), "--pairs", str(pairs)]
    command += ["--kinds", *kinds, "--overrides", *options.overrides]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    running = []
    for rank in range(processes):
        joined = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        place = {key: str(value) for key, value in joined.items()} | {"MASTER_ADDR": "127.0.0.1"}
        quiet = subprocess.DEVNULL
        running.append(
            subprocess.Popen(
                command,
                env=environment | (place if processes > 1 else {}),
                stdout=subprocess.PIPE,
                stderr=quiet,
                text=True,
            )
        )
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"a process of {' '.join(command)} failed")
    found: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    return found


def measure(options: argparse.Namespace, processes: int) -> dict[str, Any]:
    both = launch(options, processes, list(KINDS), options.pairs)
    steps = both.pop("steps")
    ratios = [
        [same[place] / usual[place] for usual, same in zip(steps["usual"], steps["same_bits"], strict=True)]
        for place in (0, 1)
    ]
    alone = KINDS if options.memory else {}
    memory = {kind: launch(options, processes, [kind], 0)["memory_bytes"] for kind in alone}
    return both | {
        "processes": processes,
        "pairs": len(ratios[0]),
        "seconds": {kind: statistics.median(seconds for seconds, _ in steps[kind]) for kind in KINDS},
        "wall_ratio": statistics.median(ratios[0]),
        "processor_ratio": statistics.median(ratios[1]),
        "processor_ratios": [min(ratios[1]), max(ratios[1])],
        "memory_bytes": memory,
        "memory_ratio": memory["same_bits"] / memory["usual"] if memory else None,
        "load": os.getloadavg()[1],
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| config | optimizer, precision | processes | micro-batches | time | processor time (range) | memory | load |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        low, high = one["processor_ratios"]
        memory = "-" if one["memory_ratio"] is None else f"{one['memory_ratio']:.3f}"
        lines.append(
            f"| {one['config']} | {one['optimizer']}, {one['precision']} | {one['processes']} | "
            f"{one['micro_batches']} x {one['micro_batch']} x {one['seq_len']} | {one['wall_ratio']:.3f} | "
            f"{one['processor_ratio']:.3f} "
            f"({low:.3f} to {high:.3f}) | {memory} | {one['load']:.0f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_same_bits", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/tiny.json", help="default %(default)s")
    parser.add_argument("--vocab_size", type=int, default=4096, help="default %(default)s")
    parser.add_argument("--seq_len", type=int, default=512, help="default %(default)s")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="default 1 2 4")
    parser.add_argument("--pairs", type=int, default=10, help="pairs of steps (default %(default)s)")
    parser.add_argument("--overrides", nargs="*", default=[], metavar="section.key=value")
    parser.add_argument("--output", type=Path, help="a JSON file to which the results are added")
    parser.add_argument("--memory", action="store_true", help="also measure the peak memory, in launches of their own")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(worker(options)), flush=True)
        return 0
    results = json.loads(options.output.read_text()) if options.output and options.output.exists() else []
    for processes in options.processes:
        found = measure(options, processes)
        about = {"config": Path(options.config).name, "overrides": options.overrides, "cores": os.cpu_count()}
        results.append(about | found | {"versions": {"torch": version("torch"), "deepspeed": version("deepspeed")}})
        print(table(results[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        if options.output:
            atomic_text(options.output, json.dumps(results, indent=1) + "\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
