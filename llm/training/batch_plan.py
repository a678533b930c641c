"""The arithmetic of a run: sequences and micro-batches per step, parameters, FLOPs per token, hardware limits."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from llm import device_rates
from llm.config import ActivationCheckpointing, Config
from llm.errors import UserError
from llm.model.flops import Flops, flops_per_token
from llm.model.transformer import parameter_count
from llm.training.memory import (
    AUTO_MICRO_BATCH_TOKENS,
    Activations,
    activation_bytes,
    largest_micro_batch,
    state_bytes,
)
from llm.training.same_bits import lanes

FILLED = 0.92
"""The fraction of a GPU's memory that an automatic micro-batch may fill, by prediction."""
CONTEXT_BYTES = 2**30
"""A CUDA context takes up to so much of a GPU."""


@dataclass(frozen=True)
class Plan:
    """Quantities derived from the config, the data and the number of processes."""

    seq_len: int
    sequences_per_step: int
    micro_batch: int
    accumulation: int
    world_size: int
    parameters: int
    flops: Flops
    peak_flops: float | None
    """Datasheet FLOP/s of one device; None if unknown."""
    matmul_flops: float
    """FLOP/s of a matrix product, measured on this device in the run's precision."""
    device: str

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.seq_len

    def mfu(self, tokens_per_second: float, *, causal: bool = False) -> float | None:
        """Returns the model FLOPs utilisation (Chowdhery et al. 2022) relative to the datasheet; None if unknown.

        causal: count only the half of attention that a causal model needs.
        """
        return None if self.peak_flops is None else self._flops(tokens_per_second, causal) / self.peak_flops

    def matmul_fraction(self, tokens_per_second: float, *, causal: bool = False) -> float:
        """As `mfu`, relative to the matmul rate measured on this machine."""
        return self._flops(tokens_per_second, causal) / self.matmul_flops

    def _flops(self, tokens_per_second: float, causal: bool) -> float:
        """Returns FLOP/s of one device, from the speed of all devices."""
        # The speed is of all devices, but the peaks are of one.
        return tokens_per_second * (self.flops.causal if causal else self.flops.usual) / self.world_size

    def measured_again(self, device: torch.device, dtype: torch.dtype) -> "Plan":
        """Returns the plan with its matmul rate or one measured now, whichever is higher.

        Other programs may have slowed down the first measurement; a step could then seem to reach more than 100 %.
        """
        return replace(self, matmul_flops=max(self.matmul_flops, device_rates.measure_matmul_flops(device, dtype)))

    def describe(self, total_tokens: int, train_tokens: int | None) -> Iterator[str]:
        """Yields lines that describe the run. train_tokens: tokens per epoch; None for a mixture (no epochs)."""
        yield (
            f"model       {self.parameters:,} parameters, {self.flops.usual / 1e9:.3f} GFLOP a token"
            f" ({self.flops.causal / 1e9:.3f} with the causal half of attention only)"
        )
        empty = self.accumulation * self.micro_batch * self.world_size - self.sequences_per_step
        yield (
            f"step        {self.tokens_per_step:,} tokens = {self.sequences_per_step} sequences: "
            f"{self.accumulation} micro-batches x {self.micro_batch} sequences x {self.world_size} processes"
            + (f", of which {empty} slots stay empty" if empty else "")
        )
        ratio = total_tokens / self.parameters
        epochs = "" if train_tokens is None else f"{total_tokens / train_tokens:.2f} epochs, "
        yield (
            f"run         {math.ceil(total_tokens / self.tokens_per_step):,} steps, {total_tokens:,} tokens: "
            f"{epochs}{ratio:{'.1f' if ratio >= 0.1 else '.2g'}} tokens a parameter"
        )
        peak = f"{self.peak_flops / 1e12:.1f} TFLOP/s" if self.peak_flops else "unknown"
        yield (
            f"hardware    {self.world_size} x {self.device}: matmul {self.matmul_flops / 1e12:.2f} TFLOP/s measured, "
            f"datasheet peak {peak}"
        )


def choose_micro_batch(config: Config, world_size: int, device: torch.device, *, dtype: torch.dtype) -> int:
    """Returns the micro-batch of a run of this many processes, in sequences: the config's, or one that fits.

    On a GPU the predicted memory of a step decides, so that a run which does not fit ends before its first step. All
    ranks need the same number, so one decides for all.

    Raises UserError if nothing fits.
    """
    assert config.data.seq_len is not None
    seq_len, stated = config.data.seq_len, config.train.micro_batch
    # A micro-batch above a rank's share of the step would only add empty slots.
    share = math.ceil(config.train.batch // seq_len / world_size)
    # At least one, because a single sequence may be longer than the limit.
    size = stated or min(share, max(1, AUTO_MICRO_BATCH_TOKENS[device.type] // seq_len))
    memory = device_rates.device_memory(device)
    if memory is None:
        check_tree(config, world_size, size)
        return size
    state = state_bytes(config, config.deepspeed.zero_stage, world_size, dtype, "cuda")

    def activations(size: int) -> Activations:
        return activation_bytes(config, world_size, size, seq_len, dtype, "cuda")

    if stated is None:
        fits = largest_micro_batch(state, activations, size, FILLED * memory)
    else:
        # Refused only where it cannot fit, because a prediction may be wrong by a few per cent.
        fits = stated if state.peak(activations(stated)) <= memory else 0
    if fits == 0:
        size = stated or 1
        raise UserError(
            f"train.micro_batch={size} needs about {state.peak(activations(size)) / 1e9:.1f} GB and the GPU has "
            f"{memory / 1e9:.1f}; `llm plan` with this config lists what fits: a lower train.micro_batch, "
            "train.activation_checkpointing=selective or full, or deepspeed.zero_stage=2 or 3 on several GPUs"
        )
    check_tree(config, world_size, fits)
    return fits


def ways_out_of_memory(config: Config, world_size: int, device: torch.device, *, dtype: torch.dtype) -> str:
    """Returns what a run may change whose memory was full; on a GPU with the sizes that were predicted.

    config: from `resolve`; before it, nothing is predicted.
    """
    total = device_rates.device_memory(device)
    if total is None or config.data.seq_len is None:
        return "lower train.micro_batch or set train.activation_checkpointing=selective or full"
    seq_len, stage = config.data.seq_len, config.deepspeed.zero_stage
    state = state_bytes(config, stage, world_size, dtype, "cuda")

    def peak(micro_batch: int, checkpointing: ActivationCheckpointing) -> int:
        changed = config.train.model_copy(update={"activation_checkpointing": checkpointing})
        other = config.model_copy(update={"train": changed})
        return state.peak(activation_bytes(other, world_size, micro_batch, seq_len, dtype, "cuda"))

    own, size = config.train.activation_checkpointing, choose_micro_batch(config, world_size, device, dtype=dtype)
    needed, changes = peak(size, own), list[str]()
    if size > 1:
        changes.append(f"train.micro_batch={size // 2} needs {peak(size // 2, own) / 1e9:.1f} GB")
    if own != "full":
        changes.append(f"train.activation_checkpointing=full needs {peak(size, 'full') / 1e9:.1f} GB")
    if world_size == 1 and config.deepspeed.offload == "none" and stage > 0:
        changes.append("deepspeed.offload=cpu keeps the optimizer in the host's memory")
    if world_size > 1 and stage < 3:
        changes.append(f"deepspeed.zero_stage={stage + 1} divides more of the state among the GPUs")
    free, _ = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    held = f"; other programs and the CUDA context hold {others / 1e9:.1f} GB" if others > CONTEXT_BYTES else ""
    return f"train.micro_batch={size} was predicted to need {needed / 1e9:.1f} of its {total / 1e9:.1f} GB{held}; " + (
        "; ".join(changes) or "take a smaller model or more GPUs"
    )


def check_tree(config: Config, world_size: int, micro_batch: int) -> None:
    """Raises UserError if train.same_bits is set and a process's part of a step is no subtree of its micro-batches."""
    if not config.train.same_bits:
        return
    assert config.data.seq_len is not None
    sequences = config.train.batch // config.data.seq_len
    count = math.ceil(sequences / micro_batch)
    if lanes(count) % world_size == 0:
        return
    # A power of two that does not divide the micro-batches may divide those of a smaller size.
    smaller = (size for size in range(micro_batch, 0, -1) if lanes(math.ceil(sequences / size)) % world_size == 0)
    way_out = "" if (size := next(smaller, None)) is None else f", or train.micro_batch={size} in another run"
    raise UserError(
        f"train.same_bits=true: {world_size} processes cannot share the {count} micro-batches of a step "
        f"({sequences} sequences, train.micro_batch={micro_batch}); start {process_counts(count)}{way_out}, or set "
        "train.same_bits=false"
    )


def process_counts(micro_batches: int) -> str:
    """Lists the numbers of processes that can share a step's micro-batches with train.same_bits."""
    return " or ".join(str(2**power) for power in range(lanes(micro_batches).bit_length()))


def make_plan(
    config: Config,
    world_size: int,
    device: torch.device,
    *,
    dtype: torch.dtype,
    micro_batch: int | None = None,
) -> Plan:
    """Plans a run of this many processes.

    config: from `resolve`. micro_batch: of `choose_micro_batch`, where ranks must agree; None: it is called here.
    """
    # `resolve` has set it, but its type allows None.
    assert config.data.seq_len is not None
    seq_len = config.data.seq_len
    sequences = config.train.batch // seq_len
    micro_batch = micro_batch or choose_micro_batch(config, world_size, device, dtype=dtype)
    return Plan(
        seq_len=seq_len,
        sequences_per_step=sequences,
        micro_batch=micro_batch,
        # Rounded up: slots of the last micro-batches may stay empty.
        accumulation=math.ceil(sequences / (micro_batch * world_size)),
        world_size=world_size,
        parameters=parameter_count(config.model),
        flops=flops_per_token(config.model, seq_len),
        peak_flops=device_rates.peak_flops(device),
        matmul_flops=device_rates.measure_matmul_flops(device, dtype),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
    )
