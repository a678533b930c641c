"""Tokens per second, MFU and memory of training steps on random tokens: `python -m benchmarks.bench_train --help`.

A step is the part of `llm train` after a batch has arrived: forward and backward of every micro-batch, clipping, AdamW,
without data loader and disk. Without deepspeed the same arithmetic runs in plain torch, and the result contains this
fact.

Attention computes nothing between documents, so packed sequences of short documents train faster than sequences of one
document each, which is what other projects report. Both are measured unless --documents chooses.

--micro_batch, --kernels, --checkpointing and --documents accept several values each; every combination is measured in a
process of its own. A combination that fails (out of memory) is not in the table; an error line names it. --output then
gets the list of results, and a picture with the same name.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kernels
from benchmarks.timing import installed_version
from benchmarks.training_step import DOCUMENT, TrainingStep, has_deepspeed, repeat
from llm import device_rates, metrics
from llm.atomic import atomic_file, atomic_text
from llm.config import Config
from llm.config_file import load_config
from llm.errors import UserError
from llm.training.engine import stop
from llm.training.resolve import ASSUMED_VOCAB_SIZE


def measure(config: Config, *, document: int | None, steps: int, warmup: int, seconds: float) -> dict[str, Any]:
    """Runs `warmup` and then up to `steps` steps, fewer (at least one) if `seconds` run out. Returns the result.

    Args:
        document: mean tokens of a document; None: each sequence is one.
    """
    step = TrainingStep(config, document)
    first_loss = step()  # at least one warm-up step, which compiles kernels and fills the allocator
    for _ in range(warmup - 1):
        step()
    times: list[float] = []
    for _ in repeat(steps, seconds):
        begin = time.perf_counter()
        loss = step()
        times.append(time.perf_counter() - begin)
    world = step.world
    plan = step.plan.measured_again(world.device, world.dtype)
    if has_deepspeed():
        stop()
    tokens_per_second = plan.tokens_per_step / statistics.median(times)
    return {
        "config": config.model_dump(),
        "parameters": plan.parameters,
        "device": plan.device,
        "versions": {name: installed_version(name) for name in ("torch", "triton", "deepspeed")},
        "engine": "deepspeed" if has_deepspeed() else "torch (deepspeed is not installed)",
        "zero_stage": step.engine.stage,  # the actual stage: a single process runs stage 0 if the config has 1
        "kernels": {op: entry["backend"] for op, entry in kernels.describe(world.device).items()},
        "precision": world.precision,
        "activation_checkpointing": config.train.activation_checkpointing,
        "seq_len": plan.seq_len,
        "document_tokens": plan.seq_len if document is None else document,
        "micro_batch": plan.micro_batch,
        "accumulation": plan.accumulation,
        "steps": len(times),
        "step_seconds": {"median": statistics.median(times), "min": min(times), "max": max(times)},
        "tokens_per_second": tokens_per_second,
        "flops_per_token": plan.flops.usual,
        "flops_per_token_causal": plan.flops.causal,
        "peak_flops": plan.peak_flops,
        "mfu": plan.mfu(tokens_per_second),
        "matmul_flops": plan.matmul_flops,
        "matmul_fraction": plan.matmul_fraction(tokens_per_second),
        "memory_bytes": device_rates.peak_memory_bytes(world.device),
        "first_loss": first_loss,
        "last_loss": loss,
    }


WHOLE = "whole"
ABOVE_MATMUL_RATE = (
    "Above 100 % of matmul: attention is counted over whole sequences, a step computes the causal half within "
    "documents. Or the host was slower while the matmul rate was measured than during the steps."
)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Formats the results as text, one line each, below the limits that MFU and "of matmul" refer to."""
    first = results[0]
    peak = f"{first['peak_flops'] / 1e12:.1f} TFLOP/s" if first["peak_flops"] else "unknown"
    lines = [
        f"{first['device']}, {first['parameters']:,} parameters, sequences of {first['seq_len']}, "
        f"{first['precision']}, {first['engine']}, ZeRO {first['zero_stage']}",
        f"{first['flops_per_token'] / 1e9:.3f} GFLOP a token ({first['flops_per_token_causal'] / 1e9:.3f} causal); "
        f"limits: datasheet {peak}, matmul measured in this run {first['matmul_flops'] / 1e12:.2f} TFLOP/s",
        f"kernels: {', '.join(f'{op} {backend}' for op, backend in first['kernels'].items())}",
        "",
        "micro-batch  documents  kernels  checkpointing   tokens/s   step ms      MFU  of matmul     GiB",
    ]
    for result in results:
        mfu, fraction = metrics.percent(result["mfu"]), metrics.percent(result["matmul_fraction"])
        lines.append(
            f"{result['micro_batch']:>11}  {result['document_tokens']:>9,}  {result['kernels']['attention']:>7}  "
            f"{result['activation_checkpointing']:>13}  {result['tokens_per_second']:>9,.0f}  "
            f"{1e3 * result['step_seconds']['median']:>8,.1f}  {mfu:>7}  {fraction:>9}  "
            f"{result['memory_bytes'] / 2**30:>6.1f}"
        )
    if any(result["matmul_fraction"] > 1 for result in results):
        lines.append(ABOVE_MATMUL_RATE)
    return "\n".join(lines)


def sweep(options: argparse.Namespace, combinations: Sequence[tuple[str, ...]]) -> list[dict[str, Any]]:
    """Measures every combination in a separate process, so that each has its own peak memory. Omits failures."""
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "one.json"
        for combination in combinations:
            command = [sys.executable, "-m", "benchmarks.bench_train"]
            for key in ("config", "vocab_size", "seq_len", "steps", "warmup", "seconds"):
                if getattr(options, key) is not None:
                    command += [f"--{key}", str(getattr(options, key))]
            chosen = dict(zip(AXES, combination, strict=True))
            for key, value in chosen.items():
                command += [f"--{key}", value] if value else []
            command += ["--output", str(output), *options.overrides]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                print(f"{chosen}: failed ({last})", file=sys.stderr)
                continue
            results.append(json.loads(output.read_text()))
            print(table(results[-1:]).splitlines()[-1], file=sys.stderr)
    return results


def picture(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws a bar of tokens per second for each combination, the best on top."""
    from matplotlib.figure import Figure

    ordered = sorted(results, key=lambda result: result["tokens_per_second"])
    labels = [
        f"{result['micro_batch']} sequences, {result['kernels']['attention']}"
        + (f", {result['activation_checkpointing']}" if result["activation_checkpointing"] != "none" else "")
        + f", documents of {result['document_tokens']:,}"
        for result in ordered
    ]
    figure = Figure(figsize=(8, 1.2 + 0.35 * len(ordered)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(labels, [result["tokens_per_second"] for result in ordered], color="#2563c9")
    axes.bar_label(
        bars,
        [f"{100 * result['matmul_fraction']:.0f} %, {result['memory_bytes'] / 2**30:.1f} GiB" for result in ordered],
        padding=3,
    )
    axes.margins(x=0.25)
    axes.set_xlabel("tokens/s (of the measured matmul rate, peak memory)")
    axes.set_title(f"{ordered[0]['device']}: {ordered[0]['parameters']:,} parameters, {ordered[0]['precision']}")
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


AXES = {
    "micro_batch": "sequences at once (default: chosen as in training)",
    "kernels": "auto, torch, triton (default: as in training)",
    "checkpointing": "none, selective, full: train.activation_checkpointing (default: the config's)",
    "documents": "mean tokens of a document, or whole: one document a sequence (default: both of whole 512)",
}
DEFAULTS = {"documents": [WHOLE, str(DOCUMENT)]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_train", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/125m.json")
    parser.add_argument("--vocab_size", type=int, default=ASSUMED_VOCAB_SIZE)
    parser.add_argument("--seq_len", type=int, help="tokens per sequence (default: model.max_seq_len)")
    for axis, text in AXES.items():
        parser.add_argument(f"--{axis}", nargs="+", default=DEFAULTS.get(axis, [""]), help=text)
    parser.add_argument("--steps", type=int, default=30, help="measured steps (default %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the measurement (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="measure no longer than this (default %(default)s)")
    parser.add_argument("--output", type=Path, help="also write the result there, as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    options = parser.parse_args(arguments)
    combinations = list(itertools.product(*(getattr(options, axis) for axis in AXES)))
    try:
        if len(combinations) > 1:
            results = sweep(options, combinations)
            if not results:
                raise UserError("no combination could be measured; see above")
        else:
            results = [_measure_one(options, *combinations[0])]
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(results))
    if options.output:
        many = len(combinations) > 1
        atomic_text(options.output, json.dumps(results if many else results[0], indent=2) + "\n")
        if many:
            picture(results, options.output.with_suffix(".png"))
    return 0


def _measure_one(
    options: argparse.Namespace, micro_batch: str, backend: str, checkpointing: str, documents: str
) -> dict[str, Any]:
    if documents != WHOLE and not (documents.isdecimal() and int(documents)):
        raise UserError(f"--documents {documents}: write {WHOLE} or a number of tokens")
    document = None if documents == WHOLE else int(documents)
    seq_len = options.seq_len or load_config(options.config, options.overrides).model.max_seq_len
    keys = {
        "model.vocab_size": options.vocab_size,
        "data.seq_len": seq_len,
        "train.micro_batch": micro_batch,
        "train.activation_checkpointing": checkpointing,
    }
    fixed = [f"{key}={value}" for key, value in keys.items() if value]
    config = load_config(options.config, [*options.overrides, *fixed])
    if backend:
        kernels.set_backend(backend)
    return measure(config, document=document, steps=options.steps, warmup=options.warmup, seconds=options.seconds)


if __name__ == "__main__":
    sys.exit(main())
