"""Tokens per second, MFU and memory of training steps on random tokens: `python -m benchmarks.bench_train --help`.

A step is what `llm train` does after a batch has come: forward and backward of every micro-batch, clipping, AdamW. The
data loader and the disk have no part in it. Where deepspeed is not installed the same arithmetic runs in plain torch,
and the result says so.

--micro_batch, --compile, --kernels and --checkpointing take several values each: every combination is measured in a
process of its own, one that fails (memory is full) stands in the table as such, and --output gets the list, with a
picture beside it.
"""

import argparse
import itertools
import json
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

import torch
from torch import nn

import kernels
from llm import metrics
from llm.atomic import atomic_file, atomic_text
from llm.config import Config, load_config
from llm.errors import UserError
from llm.model.transformer import Transformer
from llm.training.batch_plan import Plan, make_plan
from llm.training.engine import Engine, start
from llm.training.optim import make_optimizer
from llm.training.resolve import ASSUMED_VOCAB_SIZE
from llm.world import World, pick_device, stop

Batch = dict[str, torch.Tensor]


class PlainEngine:
    """What Engine does on one device, without deepspeed: bf16 (or fp32) weights, fp32 gradients and masters."""

    def __init__(self, build: Callable[[], Transformer], config: Config, world: World) -> None:
        self._grad_clip = config.optimizer.grad_clip
        self._masters = build().to(world.device)
        self._masters.init_weights(config.train.seed)
        self._model = build().to(world.device)
        self._model.to(world.dtype)
        self._pairs = list(zip(self._masters.parameters(), self._model.parameters(), strict=True))
        self._copy_weights()
        for master, weight in self._pairs:
            master.grad = torch.zeros_like(master)
            weight.register_post_accumulate_grad_hook(self._collect(master))
        self._optimizer = make_optimizer(self._masters, config.optimizer, world.dtype)

    @staticmethod
    def _collect(master: nn.Parameter) -> Callable[[torch.Tensor], None]:
        def add(weight: torch.Tensor) -> None:
            assert master.grad is not None
            master.grad.add_(weight.grad)  # in fp32: bf16 sums over micro-batches lose what small batches add
            weight.grad = None

        return add

    @torch.no_grad()
    def _copy_weights(self) -> None:
        masters, weights = zip(*self._pairs, strict=True)
        torch._foreach_copy_(weights, masters)

    def backward(self, inputs: Batch, targets: int) -> torch.Tensor:
        loss = self._model(**inputs, reduction="sum")
        (loss / targets).backward()
        return loss.detach() / targets

    def update(self, lr: float) -> None:
        nn.utils.clip_grad_norm_(self._masters.parameters(), self._grad_clip or float("inf"))
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)
        self._copy_weights()


def has_deepspeed() -> bool:
    return find_spec("deepspeed") is not None


def random_batch(plan: Plan, vocab_size: int, device: torch.device) -> Batch:
    """Uniformly random tokens in documents of 512 tokens on average. The same keys as a loader's batch."""
    shape = (plan.micro_batch, plan.seq_len)
    tokens = torch.randint(vocab_size, (plan.micro_batch, plan.seq_len + 1))
    begins = torch.rand(shape) < 1 / 512
    index = torch.arange(plan.seq_len, dtype=torch.int32).expand(shape)
    doc_start = torch.where(begins, index, 0).cummax(dim=1).values
    batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "doc_start": doc_start}
    return {name: tensor.contiguous().to(device) for name, tensor in batch.items()}


def make_engine(config: Config, world: World, plan: Plan) -> Engine | PlainEngine:
    def build() -> Transformer:
        checkpointing = config.train.activation_checkpointing
        model = Transformer(config.model, activation_checkpointing=checkpointing, compute_dtype=world.dtype)
        if config.train.compile:
            model.compile_blocks(fullgraph=config.deepspeed.zero_stage < 3)
        return model

    if not has_deepspeed():
        return PlainEngine(build, config, world)
    engine = Engine(build, config, world, plan.micro_batch, plan.accumulation)
    initial = Transformer(config.model)
    initial.init_weights(config.train.seed)
    for name, value in initial.named_parameters():
        engine.write_parameter(name, value.detach())
    return engine


def make_world(config: Config) -> World:
    """This process alone, through deepspeed where it is installed."""
    if has_deepspeed():
        return start(config)
    device = pick_device(config.train.device)
    if config.train.precision == "fp16" or config.deepspeed.offload == "cpu":
        raise UserError("train.precision=fp16 and deepspeed.offload=cpu need deepspeed, which is not installed here")
    bf16 = config.train.precision == "bf16" or (config.train.precision == "auto" and device.type == "cuda")
    return World(0, 0, 1, device, torch.bfloat16 if bf16 else torch.float32)


def measure(config: Config, *, steps: int, warmup: int, seconds: float) -> dict[str, Any]:
    """Runs `warmup` and then up to `steps` steps, fewer (at least one) if `seconds` run out. Returns the result."""
    world = make_world(config)
    plan = make_plan(config, 1, world.device, dtype=world.dtype)
    engine = make_engine(config, world, plan)
    assert config.model.vocab_size is not None
    torch.manual_seed(0)
    pool = [random_batch(plan, config.model.vocab_size, world.device) for _ in range(4)]
    tokens = plan.accumulation * plan.micro_batch * plan.seq_len

    def step() -> tuple[float, float]:
        loss = torch.zeros((), device=world.device)
        for micro in range(plan.accumulation):
            loss += engine.backward(pool[micro % len(pool)], tokens)
        engine.update(config.optimizer.lr)
        metrics.synchronize(world.device)
        return time.perf_counter(), float(loss)

    first_loss = loss = step()[1]  # at least one: it compiles kernels and fills the allocator
    for _ in range(warmup - 1):
        step()
    times: list[float] = []
    begin = before = time.perf_counter()
    while not times or (len(times) < steps and before - begin < seconds):
        now, loss = step()
        times.append(now - before)
        before = time.perf_counter()
    stop()
    tokens_per_second = tokens / statistics.median(times)
    return {
        "config": config.model_dump(),
        "parameters": plan.parameters,
        "device": plan.device,
        "versions": {name: _version(name) for name in ("torch", "triton", "deepspeed")},
        "engine": "deepspeed" if has_deepspeed() else "torch (deepspeed is not installed)",
        "zero_stage": config.deepspeed.zero_stage,
        "kernels": {op: entry["backend"] for op, entry in kernels.describe(world.device).items()},
        "precision": world.precision,
        "compile": config.train.compile,
        "activation_checkpointing": config.train.activation_checkpointing,
        "seq_len": plan.seq_len,
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
        "memory_bytes": metrics.peak_memory_bytes(world.device),
        "first_loss": first_loss,
        "last_loss": loss,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as text, one line each, with the physical limit they are held against."""
    first = results[0]
    peak = f"{first['peak_flops'] / 1e12:.1f} TFLOP/s" if first["peak_flops"] else "unknown"
    lines = [
        f"{first['device']}, {first['parameters']:,} parameters, rows of {first['seq_len']}, {first['precision']}, "
        f"{first['engine']}, ZeRO {first['zero_stage']}",
        f"{first['flops_per_token'] / 1e9:.3f} GFLOP a token ({first['flops_per_token_causal'] / 1e9:.3f} causal); "
        f"limits: datasheet {peak}, matmul measured in this run {first['matmul_flops'] / 1e12:.2f} TFLOP/s",
        f"kernels: {', '.join(f'{op} {backend}' for op, backend in first['kernels'].items())}",
        "",
        "micro-batch  compile  kernels  checkpointing   tokens/s   step ms      MFU  of matmul     GiB",
    ]
    for result in results:
        mfu = "unknown" if result["mfu"] is None else f"{100 * result['mfu']:.1f} %"
        lines.append(
            f"{result['micro_batch']:>11}  {result['compile']!s:>7}  {result['kernels']['attention']:>7}  "
            f"{result['activation_checkpointing']:>13}  {result['tokens_per_second']:>9,.0f}  "
            f"{1e3 * result['step_seconds']['median']:>8,.1f}  {mfu:>7}  {100 * result['matmul_fraction']:>7.1f} %  "
            f"{result['memory_bytes'] / 2**30:>6.1f}"
        )
    return "\n".join(lines)


def sweep(options: argparse.Namespace, combinations: Sequence[tuple[str, ...]]) -> list[dict[str, Any]]:
    """Every combination in a process of its own, whose peak of memory is then its own too; failures are left out."""
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
    """Bars of tokens a second, one a combination, the best on top."""
    from matplotlib.figure import Figure

    ordered = sorted(results, key=lambda result: result["tokens_per_second"])
    labels = [
        f"{result['micro_batch']} rows, {result['kernels']['attention']}"
        + (", compiled" if result["compile"] else "")
        + (f", {result['activation_checkpointing']}" if result["activation_checkpointing"] != "none" else "")
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
    "micro_batch": "rows at once (default: chosen as in training)",
    "compile": "false, true: train.compile (default: the config's)",
    "kernels": "auto, torch, triton (default: as in training)",
    "checkpointing": "none, selective, full: train.activation_checkpointing (default: the config's)",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_train", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/125m.json")
    parser.add_argument("--vocab_size", type=int, default=ASSUMED_VOCAB_SIZE)
    parser.add_argument("--seq_len", type=int, help="tokens a row (default: model.max_seq_len)")
    for axis, text in AXES.items():
        parser.add_argument(f"--{axis}", nargs="+", default=[""], help=text)
    parser.add_argument("--steps", type=int, default=30, help="measured steps (default %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before (default %(default)s)")
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
    options: argparse.Namespace, micro_batch: str, compiled: str, backend: str, checkpointing: str
) -> dict[str, Any]:
    seq_len = options.seq_len or load_config(options.config, options.overrides).model.max_seq_len
    keys = {
        "model.vocab_size": options.vocab_size,
        "data.seq_len": seq_len,
        "train.micro_batch": micro_batch,
        "train.compile": compiled,
        "train.activation_checkpointing": checkpointing,
    }
    fixed = [f"{key}={value}" for key, value in keys.items() if value]
    config = load_config(options.config, [*options.overrides, *fixed])
    if backend:
        kernels.set_backend(backend)
    return measure(config, steps=options.steps, warmup=options.warmup, seconds=options.seconds)


if __name__ == "__main__":
    sys.exit(main())
