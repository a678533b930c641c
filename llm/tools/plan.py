"""`llm plan`: estimates what a run needs: memory by part, the micro-batch, speed and hours.

The state is computed from the number of parameters (Rajbhandari et al. 2020, "ZeRO", with this project's dtypes).
Activations are traced: two and three blocks of the model, with its head, run forward and backward on tensors without
memory, and every storage is counted. Each further block adds as much as the third.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.dispatch import using
from llm import metrics
from llm.config import ActivationCheckpointing, Config, load_config
from llm.errors import UserError
from llm.model.flops import flops_per_token
from llm.model.transformer import Transformer, parameter_count, parameter_shapes
from llm.tools.storages import LiveStorages
from llm.training.batch_plan import AUTO_MICRO_BATCH_TOKENS
from llm.training.engine import reduce_bucket, run_stage
from llm.training.optim import moments
from llm.training.resolve import find_data, missing_data, resolve
from llm.training.rules import EPOCHS, describe
from llm.world import DTYPES, pick_dtype

USABLE = 0.9
"""The fraction of a device's memory that a plan fills; the rest is for context, libraries and fragmentation."""
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class State:
    """Bytes that one process holds between steps."""

    weights: int
    masters: int
    gradients: int
    moments: int
    buckets: int

    @property
    def total(self) -> int:
        return self.weights + self.masters + self.gradients + self.moments + self.buckets


def state_bytes(config: Config, stage: int, processes: int, dtype: torch.dtype, device: Device = "cuda") -> State:
    """Returns the state of one process if the config has this ZeRO stage and computes in `dtype`.

    Stage 0 updates the weights themselves, always in fp32; the others update fp32 masters, and sum gradients in fp32.
    With deepspeed.offload=cpu masters and moments are on the host.
    """
    # The actual stage may differ from the one in the config.
    stage = run_stage(stage, config.deepspeed.offload, processes, dtype)
    shapes = parameter_shapes(config.model)
    parameters = sum(shape.numel() for shape in shapes.values())
    moment_bytes = sum(4 * shape.numel() * len(moments(name, config.optimizer)) for name, shape in shapes.items())
    here = 0 if config.deepspeed.offload == "cpu" and stage > 0 else 1
    # A buffer that ZeRO 2 and 3, and 1 in fp32, allocate.
    bucketed = stage > 1 or (stage == 1 and dtype == torch.float32)
    bucket_bytes = 4 * reduce_bucket(stage, processes) if bucketed else 0
    # DeepSpeed pads the parameters so that all ranks have the same number.
    share = math.ceil(parameters / processes)
    return State(
        weights=_weight_dtype(stage, dtype).itemsize * (share if stage == 3 else parameters),
        masters=0 if stage == 0 else 4 * share * here,
        gradients=4 * (share if stage > 1 else parameters),
        moments=moment_bytes if stage == 0 else math.ceil(moment_bytes / processes) * here,
        buckets=bucket_bytes if device == "cuda" else min(bucket_bytes, 4 * parameters),
    )


def _weight_dtype(stage: int, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if stage == 0 else dtype


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch."""

    held: int
    """Held between forward and backward: what the blocks keep, and the head's gradients."""
    peak: int
    """The most at any time of both passes: a chunk's logits, or the block that backward works on, beside what is held.
    """


def activation_bytes(
    config: Config, processes: int, micro_batch: int, seq_len: int, dtype: torch.dtype, device: Device = "cuda"
) -> Activations:
    """Traces a micro-batch with the kernels of the device: Triton on a GPU, C++ on a CPU."""
    stage = run_stage(config.deepspeed.zero_stage, config.deepspeed.offload, processes, dtype)

    def traced(layers: int) -> Activations:
        model = config.model.model_copy(update={"n_layers": layers})
        checkpointing = config.train.activation_checkpointing
        # A fake CPU tensor uses the same backend and code as a real one; a meta tensor does not.
        place = torch.device("meta") if device == "cuda" else FakeTensorMode()
        with using("triton" if device == "cuda" else "auto"), place:
            with _default_dtype(_weight_dtype(stage, dtype)):  # fake weights cannot be converted
                transformer = Transformer(model, activation_checkpointing=checkpointing, compute_dtype=dtype)
            ids = torch.empty(micro_batch, seq_len, dtype=torch.int64)
            doc_start = torch.empty(micro_batch, seq_len, dtype=torch.int32)
            # Any labels are right, because only shapes are traced.
            return traced_step(transformer, lambda: transformer(ids, labels=ids, doc_start=doc_start))

    layers = config.model.n_layers
    # As many blocks as the extrapolation traces.
    if layers <= 3:
        return traced(layers)
    two, three, further = traced(2), traced(3), layers - 3
    return Activations(three.held + further * (three.held - two.held), three.peak + further * (three.peak - two.peak))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def traced_step(model: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> Activations:
    """Counts forward() and its backward, without the gradients of parameters, which State counts."""

    # Freed at once; otherwise a gradient would be counted here and in State.
    def let_go(parameter: torch.Tensor) -> None:
        parameter.grad = None

    hooks = [parameter.register_post_accumulate_grad_hook(let_go) for parameter in model.parameters()]
    with LiveStorages([*model.parameters(), *model.buffers()]) as count:
        loss = forward()
        held = count.bytes
        loss.backward()
    for hook in hooks:
        hook.remove()
    return Activations(held, count.peak)


def forecast(
    path: str,
    overrides: list[str],
    *,
    gpus: int,
    memory_gb: float | None,
    device_name: str | None,
    mfu: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Returns the result of `llm plan`, and shows its lines with `say`.

    Args:
        path, overrides: the config.
        gpus: number of processes, one per device.
        memory_gb: of one device, in GB of 10^9 bytes; None: the micro-batch is training's own choice, whether or not it
            fits.
        device_name: one of metrics.PEAK_BF16_FLOPS; None: the matmul rate is measured on this machine.
        mfu: assumed fraction of that rate in training.

    Raises UserError if nothing fits or the device is unknown.
    """
    asked = load_config(path, overrides)
    data = find_data(asked.data)
    config, followed = resolve(asked, data)
    if data is None:
        for line in _assumptions(asked, config):
            say(line)
    for line in describe(followed):
        say(line)
    model, train = config.model, config.train
    assert config.data.seq_len is not None
    seq_len, stage = config.data.seq_len, config.deepspeed.zero_stage
    on_gpu = device_name is not None or (train.device != "cpu" and torch.cuda.is_available())
    device: Device = "cuda" if on_gpu else "cpu"
    if device_name is None:
        dtype = pick_dtype(config, torch.device(device))
    else:
        # The named GPU cannot be asked here, but all GPUs in PEAK_BF16_FLOPS have bf16.
        dtype = DTYPES["bf16" if train.precision == "auto" else train.precision]
    rate, source = _rate(device_name, device, dtype)
    states = {other: state_bytes(config, other, gpus, dtype, device) for other in range(4)}
    state = states[stage]
    sequences = math.ceil(train.batch / seq_len / gpus)
    micro_batch = train.micro_batch or min(sequences, max(1, AUTO_MICRO_BATCH_TOKENS[device] // seq_len))

    def activations(micro_batch: int, checkpointing: ActivationCheckpointing) -> Activations:
        changed = train.model_copy(update={"activation_checkpointing": checkpointing})
        return activation_bytes(config.model_copy(update={"train": changed}), gpus, micro_batch, seq_len, dtype, device)

    used = activations(micro_batch, train.activation_checkpointing)
    room = math.inf if memory_gb is None else USABLE * memory_gb * 1e9
    while state.total + used.peak > room:
        # A micro-batch from the config is not lowered.
        if micro_batch == 1 or train.micro_batch is not None:
            raise UserError(
                f"{path}: {(state.total + used.peak) / 1e9:.1f} GB with train.micro_batch={micro_batch} do not fit "
                f"into {USABLE:.0%} of {memory_gb:g} GB; set train.activation_checkpointing=selective or full, a lower "
                "train.micro_batch, a higher deepspeed.zero_stage over more --gpus, or a shorter data.seq_len"
            )
        micro_batch //= 2
        used = activations(micro_batch, train.activation_checkpointing)
    # MFU uses the usual count (Flops.usual), so the speed must use the same.
    flops = flops_per_token(model, seq_len)
    speed = rate * mfu * gpus / flops.usual
    parameters, hours = parameter_count(model), train.horizon / speed / 3600
    # The same micro-batch for all, so that the table compares only checkpointing.
    choices = {choice: activations(micro_batch, choice) for choice in get_args(ActivationCheckpointing)}

    say(f"model       {parameters:,} parameters")
    say(f"flops       {flops.usual / 1e9:.3f} GFLOP a token, 6N + 12 L d S ({flops.causal / 1e9:.3f} causal-exact)")
    precision = "fp32" if dtype == torch.float32 else f"{str(dtype).removeprefix('torch.')} with fp32 masters"
    say(f"precision   {precision}")
    for line in _memory_table(states, stage, choices, train.activation_checkpointing):
        say(line)
    within = "" if memory_gb is None else f", within {USABLE:.0%} of {memory_gb:g}"
    total = state.total + used.peak
    say(f"memory      {total / 1e9:.2f} GB a process{within}, without a GPU's context (0.5 to 1 GB)")
    accumulation = math.ceil(sequences / micro_batch)
    say(f"step        {sequences} sequences a process: {accumulation} x train.micro_batch={micro_batch}")
    say(f"speed       {speed:,.0f} tokens/s, assuming {mfu:.0%} of {rate / 1e12:.4g} TFLOP/s ({source}) x {gpus}")
    say(
        f"run         {train.horizon:,} tokens in {_duration(hours)}, without validation and saving; "
        f"{train.horizon / parameters:.1f} tokens per parameter"
    )
    return {
        "parameters": parameters,
        "memory_bytes": total,
        "micro_batch": micro_batch,
        "tokens_per_second": speed,
        "hours": hours,
        "state_bytes": asdict(state),
        "activation_bytes": {name: asdict(found) for name, found in choices.items()},
        "flops_per_token": asdict(flops),
        "assumed": {"mfu": mfu, "flops": rate, "source": source},
    }


def _assumptions(asked: Config, config: Config) -> Iterator[str]:
    """Yields what `resolve` has assumed because the data do not exist."""
    if asked.model.vocab_size is None:
        yield (
            f"assumed     a vocabulary of {config.model.vocab_size:,}: {missing_data(asked.data)} is not there "
            "(model.vocab_size states another)"
        )
    if asked.data.seq_len is None:
        length = f"{config.data.seq_len:,} tokens"
        yield f"assumed     sequences of {length}, model.max_seq_len (data.seq_len states another)"
    if asked.train.total_tokens is None:
        yield f"assumed     as much text as a run needs; where the shards exist, at most {EPOCHS} epochs of them"


def _duration(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def _memory_table(
    states: dict[int, State], stage: int, choices: dict[ActivationCheckpointing, Activations], chosen: str
) -> Iterator[str]:
    """In GB of 10^9 bytes per process; an arrow marks the values of the config."""
    names = [*asdict(states[stage]), "total"]
    yield "state, GB   " + " " * 9 + "".join(f"{name:>11}" for name in names)
    for other, parts in states.items():
        numbers = "".join(f"{number / 1e9:>11.2f}" for number in (*asdict(parts).values(), parts.total))
        yield f"            ZeRO {other:<4}{numbers}{'  <- this config' if other == stage else ''}"
    yield "activations, GB      " + "".join(f"{name:>11}" for name in ("held", "peak"))
    for choice, found in choices.items():
        numbers = f"{found.held / 1e9:>11.2f}{found.peak / 1e9:>11.2f}"
        yield f"            {choice:<9}{numbers}{'  <- this config' if choice == chosen else ''}"


def _rate(device_name: str | None, device: Device, dtype: torch.dtype) -> tuple[float, str]:
    """Returns (FLOP/s of one device, its source)."""
    if device_name is None:
        return metrics.measure_matmul_flops(torch.device(device), dtype), "matmul measured on this machine"
    for name, peak in metrics.PEAK_BF16_FLOPS:
        if name == device_name:
            return peak, f"{name}'s datasheet, dense bf16"
    known = ", ".join(name for name, _ in metrics.PEAK_BF16_FLOPS)
    raise UserError(f"--device {device_name}: no datasheet peak is known for it; choose from {known}")
