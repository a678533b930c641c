"""`llm profile`: how long each part of a training step takes, and the least time that this machine allows for it."""

import contextlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import count, repeat
from pathlib import Path
from typing import Any

import torch

from kernels.work import Work
from llm import device_rates, metrics
from llm.atomic import atomic_file, atomic_text
from llm.config import Config
from llm.data.object_store import is_copied
from llm.data.shards import Batch
from llm.display import Display
from llm.errors import UserError
from llm.locks import locked
from llm.model.flops import model_work
from llm.model.transformer import check_backend
from llm.tools import step_trace
from llm.tools.charts import Chart, Line, png
from llm.tools.roofline import adamw_work
from llm.training.batch_plan import Plan, make_plan, ways_out_of_memory
from llm.training.engine import Engine, start, stop
from llm.training.meter import PHASES, Meter
from llm.training.resolve import find_data, missing_data, resolve
from llm.training.setup import build_engine, on_device, open_loader
from llm.world import World, oom_as_user_error

WARMUP_STEPS = 3  # compile kernels and fill the allocator
TRACED_STEPS = 3
TOP = 6  # operators shown per phase
GAPS = 3

Say = Callable[[str], None]


def profile(config: Config, *, steps: int, out_dir: str | Path, say: Say) -> dict[str, Any]:
    """Times some training steps, runs a few more under torch's profiler, and shows how long each part takes.

    It does not read or write a run: the weights are new, and the sequences come from data.path, or are random tokens if
    that does not exist.

    Args:
        steps: number of steps to time without the profiler.
        out_dir: folder for trace.json.gz (open it at ui.perfetto.dev), memory.png and profile.json.
        say: called with each line to show.

    Returns what `llm profile --json` prints; {} on ranks other than 0. Raises UserError as `train` does.
    """
    if steps < 1:
        raise UserError(f"--steps {steps}: must be at least 1")
    world = start(config)
    check_backend(world.device)
    shown: Say = say if world.rank == 0 else lambda line: None
    resolved = config
    way_out = lambda: ways_out_of_memory(resolved, world.size, world.device, dtype=world.dtype)  # noqa: E731
    with oom_as_user_error(way_out), _batches(config, world) as (config, plan, batches, source):
        resolved = config
        engine = build_engine(config, world, plan, None)
        for line in (f"data        {source}", *plan.describe(config.train.horizon, None)):
            shown(line)
        result, profiler, pairs, plan = _measure(config, world, plan, engine, batches, steps)
    out = Path(out_dir)
    if world.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out, "another profile is writing here"):
            found = _analyse(config, world, plan, profiler, pairs, result["profiled_step_ms"], out)
            result |= {"data": source, **found}
            atomic_text(out / "profile.json", json.dumps(result, indent=2) + "\n")
        _show(result, world, shown)
        shown(
            f"\nwritten     {result['trace']} (open it at ui.perfetto.dev), {result['memory_png']}, {out}/profile.json"
        )
    stop()
    return result if world.rank == 0 else {}


@contextlib.contextmanager
def _batches(config: Config, world: World) -> Iterator[tuple[Config, Plan, Iterator[Batch], str]]:
    """Returns (resolved config, plan, batches on the device, description of the batches)."""
    data = find_data(config.data)
    config, _ = resolve(config, data)
    missing = f"{missing_data(config.data)} does not exist"
    if data is not None and not is_copied(data.sources):
        missing = f"{data.name} is not copied yet, as `llm train` does it"
        data = None
    plan = make_plan(config, world.size, world.device, dtype=world.dtype)
    if data is not None:
        with open_loader(config, data, plan, world, "train") as loader:
            yield config, plan, on_device(loader, world.device), data.name
        return
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    # Each rank has other tokens, as in training.
    generator = torch.Generator().manual_seed(world.rank)
    # One token more than a sequence, because the labels are the inputs shifted by one.
    tokens = torch.randint(vocab_size, (plan.micro_batch, plan.seq_len + 1), generator=generator).to(world.device)
    ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    batch = Batch(input_ids=ids, labels=labels, doc_start=torch.zeros_like(ids, dtype=torch.int32))
    source = f"random tokens, a vocabulary of {vocab_size:,}, each sequence one document: {missing}"
    yield config, plan, repeat(batch), source


def _measure(
    config: Config, world: World, plan: Plan, engine: Engine, batches: Iterator[Batch], steps: int
) -> tuple[dict[str, Any], torch.profiler.profile, float, Plan]:
    """Returns (times without profiler, times with it, the profiler, pairs of a traced step as for model_work, plan with
    the better of two measured matmul rates)."""
    meter = Meter(plan.tokens_per_step, world.device)
    pairs: list[torch.Tensor] = []
    display = Display("profiling", WARMUP_STEPS + steps + TRACED_STEPS, silent=world.rank > 0)
    done = count(1)

    def counted() -> Iterator[Batch]:
        for batch in batches:
            # A token attends to itself and to the earlier tokens of its document and window.
            seen = 1 + torch.arange(plan.seq_len, device=batch.doc_start.device) - batch.doc_start
            seen.clamp_(max=config.model.sliding_window or plan.seq_len)
            # The sum stays on the device, because reading it would make the host wait during a traced step.
            pairs.append(seen.sum(dtype=torch.int64))
            yield batch

    def run(count: int, source: Iterator[Batch]) -> dict[str, float]:
        # Earlier work that is still queued must not count.
        device_rates.synchronize(world.device)
        meter.start()
        for _ in range(count):
            for _ in range(plan.accumulation):
                with meter.waiting():
                    batch = next(source)
                # The number of targets only scales the gradient, so the number of a step without padding is enough.
                engine.backward(batch._asdict(), plan.tokens_per_step)
            engine.update(config.optimizer.peak_lr)
            meter.count_step()
            display.update(next(done))
        return meter.window()

    with engine.metered(meter.phase), display:
        # Outside the timed window, so that the mean does not include compilation.
        run(WARMUP_STEPS, batches)
        window = run(steps, batches)

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        with meter.phase(name), step_trace.marked_phase(name):
            yield

    activities = [torch.profiler.ProfilerActivity.CPU]
    if world.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with (
        engine.metered(phase),
        display,
        step_trace.marked_ops(),
        torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler,
    ):
        traced = run(TRACED_STEPS, counted())
        # The profiler must stay open until the GPU has run its last kernel.
        device_rates.synchronize(world.device)
    # A busy machine measures a rate that is too low, so the rate is measured twice.
    plan = plan.measured_again(world.device, world.dtype)
    speed = window["tokens_per_second"]
    kept = ("step_ms", "data_wait_ms", *(f"{name}_ms" for name in PHASES))
    result = {
        "tokens_per_second": speed,
        "mfu": plan.mfu(speed),
        "mfu_causal": plan.mfu(speed, causal=True),
        "matmul_fraction": plan.matmul_fraction(speed),
        **{key: window[key] for key in kept},
        "profiled_step_ms": traced["step_ms"],
        "steps": steps,
        "profiled_steps": TRACED_STEPS,
    }
    return result, profiler, float(sum(pairs)) / TRACED_STEPS, plan


def _analyse(
    config: Config,
    world: World,
    plan: Plan,
    profiler: torch.profiler.profile,
    pairs: float,
    step_ms: float,
    out: Path,
) -> dict[str, Any]:
    on_gpu = world.device.type == "cuda"
    events = list(profiler.events())
    attribution = step_trace.Attribution(events, on_device=on_gpu)
    kinds, operators = attribution.milliseconds()
    copy_rate = device_rates.measure_copy_bytes(world.device)
    least = _least_work(config, world, plan, pairs)

    def share(phase: str, kind: str, ms: float) -> dict[str, Any]:
        least_ms: dict[str, float] = {}  # {rate: ms}; empty if the amount of work is unknown
        if (phase, kind) in least:
            found = least[phase, kind]
            least_ms = {"copy": 1e3 * found.moved / copy_rate, "matmul": 1e3 * found.flops / plan.matmul_flops}
        # A call needs its bytes and its FLOPs, so the longer of the two times is the minimum (roofline).
        bound = max(least_ms, key=least_ms.__getitem__, default=None)
        needed = None if bound is None else least_ms[bound]
        row = {"phase": phase, "kind": kind, "ms": ms, "least_ms": needed, "bound": bound}
        # If the least time is unknown, all of the time counts as gap.
        return {**row, "gap_ms": ms - (needed or 0.0)}

    shares = [share(phase, kind, ms / TRACED_STEPS) for (phase, kind), ms in kinds.items()]
    shares.sort(key=lambda share: -share["ms"])
    busy, span = step_trace.device_busy(events) if on_gpu else (0.0, 0.0)
    trace_file, memory_file = out / "trace.json.gz", out / "memory.png"
    profiler.export_chrome_trace(str(trace_file))
    _draw_memory(trace_file, memory_file, on_device=on_gpu)
    idle = max(0.0, (span - busy) / TRACED_STEPS if on_gpu else step_ms - sum(share["ms"] for share in shares))
    name = "the GPU idle between kernels" if on_gpu else "Python, waits and the profiler itself"
    gaps = [(f"{share['kind']}, {share['phase']}", share["ms"], share["least_ms"], share["gap_ms"]) for share in shares]
    gaps = sorted([*gaps, (name, idle, 0.0, idle)], key=lambda gap: -gap[3])[:GAPS]
    tops = sorted(operators.items(), key=lambda entry: -entry[1][0])
    return {
        "copy_bytes_per_second": copy_rate,
        "matmul_flops": plan.matmul_flops,
        "work": shares,
        "operators": [
            {"phase": phase, "name": name, "ms": ms / TRACED_STEPS, "calls": calls / TRACED_STEPS}
            for wanted in PHASES
            for (phase, name), (ms, calls) in [entry for entry in tops if entry[0][0] == wanted][:TOP]
        ],
        "gaps": [dict(zip(("what", "ms", "least_ms", "saves_ms"), gap, strict=True)) for gap in gaps],
        "idle_ms": idle,
        "gpu_busy": busy / span if span else None,
        "our_kernels": attribution.our_kernels() / busy if busy else None,
        "trace": str(trace_file),
        "memory_png": str(memory_file),
    }


def _least_work(config: Config, world: World, plan: Plan, pairs: float) -> dict[tuple[str, str], Work]:
    """Returns the least work of a step on this rank, by phase and kind. pairs: per step, as for model_work."""
    item, count = world.dtype.itemsize, plan.accumulation
    found: dict[tuple[str, str], Work] = defaultdict(Work)
    # Each micro-batch reads the weights again.
    for (phase, op), least in model_work(config.model, plan.micro_batch * plan.seq_len, pairs / count, item).items():
        phase = "forward" if op == "linear_cross_entropy" else phase  # it computes its gradients with the loss
        found[phase, step_trace.KINDS.get(op, op)] += least * count
    if config.optimizer.kind == "adamw":
        found["optimizer", "optimizer"] = adamw_work(config, world.size, world.dtype)
    return found


def _draw_memory(trace_file: Path, picture: Path, *, on_device: bool) -> None:
    x, y = step_trace.memory_timeline(trace_file, on_device=on_device)
    title = f"Memory that torch's allocator holds, {TRACED_STEPS} steps"
    note = "Beyond the least of these steps: weights, gradients and moments are not in it."
    # Written atomically, because a repeated profile replaces the picture.
    with atomic_file(picture) as file:
        file.write(png(Chart("memory", title, "ms", "bytes", (Line(x, y),), note=note)))


def _show(result: dict[str, Any], world: World, say: Say) -> None:
    step_ms = result["step_ms"]
    split = ", ".join(f"{key.removesuffix('_ms').replace('_', ' ')} {result[key]:.1f}" for key in _SPLIT)
    rest = step_ms - sum(result[key] for key in _SPLIT)
    overhead = result["profiled_step_ms"] / step_ms - 1
    say(
        f"\na step      {step_ms:,.1f} ms, mean of {result['steps']}: "
        f"{result['tokens_per_second']:,.0f} tokens/s, MFU {metrics.percent(result['mfu'])}, "
        f"{metrics.percent(result['matmul_fraction'])} of the matmul rate"
    )
    say(f"split, ms   {split}, the rest {rest:.1f}")
    say(
        f"profiled    {result['profiled_step_ms']:,.1f} ms a step ({100 * overhead:+.0f} %): the tables below are of "
        f"{result['profiled_steps']} such steps"
    )
    say(
        f"limits      copy {result['copy_bytes_per_second'] / 1e9:,.1f} GB/s, matmul "
        f"{result['matmul_flops'] / 1e12:,.2f} TFLOP/s, both measured now"
    )
    if result["gpu_busy"] is None:
        say("the GPU     none: kernels' share and launch gaps say nothing of a CPU")
    else:
        say(
            f"the GPU     busy {100 * result['gpu_busy']:.1f} % of the time, {result['idle_ms']:.1f} ms a step idle "
            f"between kernels; {100 * result['our_kernels']:.1f} % of the busy time in this project's kernels"
        )
    say(f"\n{'phase':14}{'work':16}{'ms':>10}{'least ms':>10}{'reached':>10}  {'bound':8}{'gap ms':>10}")
    for share in result["work"]:
        least = share["least_ms"]
        reached = "" if least is None else f"{100 * least / share['ms']:.1f} %"
        say(
            f"{share['phase']:14}{share['kind']:16}{share['ms']:>10.2f}{'' if least is None else f'{least:.2f}':>10}"
            f"{reached:>10}  {share['bound'] or '':8}{share['gap_ms']:>10.2f}"
        )
    say(f"\n{'phase':14}{'operator':48}{'ms':>10}{'calls':>8}")
    for operator in result["operators"]:
        say(f"{operator['phase']:14}{operator['name'][:46]:48}{operator['ms']:>10.2f}{operator['calls']:>8.0f}")
    say("\nthe largest gaps between a step and what this machine could do")
    for gap in result["gaps"]:
        least = "" if gap["least_ms"] is None else f" (least {gap['least_ms']:.1f})"
        say(f"  {gap['what']}: {gap['ms']:.1f} ms{least}; closing it would save {gap['saves_ms']:.1f} ms a step")


_SPLIT = ("data_wait_ms", *(f"{name}_ms" for name in PHASES))
