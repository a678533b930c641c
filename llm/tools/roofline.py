"""The time of a training step on a GPU from the work of its ops (a roofline), for `llm plan` and benchmarks.model.

The work of an op is exact (kernels.work): every input read once, every output written once, and its products. It takes
the longer of its FLOPs over the rate of a large product and its bytes over the rate of a copy, each times the share of
this rate that the op reaches. Not in it: the time of a launch. Where kernels are short, because the model is narrow or
the micro-batch small, the GPU waits for the host, and a step takes longer than this.
"""

from dataclasses import dataclass

import torch

from kernels.work import Work
from llm.config import ActivationCheckpointing, Config
from llm.hardware import Hardware
from llm.model.flops import model_work, recomputed_work
from llm.model.transformer import parameter_count
from llm.training.engine import run_stage
from llm.training.optim import matrix_shapes

Works = dict[tuple[str, str], Work]
"""{(phase, op): its work}. Phases: forward, backward, recomputed, optimizer."""


@dataclass(frozen=True)
class Rates:
    """The limits of a device."""

    products: float
    """FLOP/s of a product of large square matrices."""
    copy: float
    """Bytes/s of a copy in its memory, read plus written."""


MEASURED = {"H200": Rates(794e12, 4.15e12), "H100": Rates(798e12, 3.0e12)}
"""On one GPU of each kind, with bf16 products of 8,192 cubed."""
PRODUCTS_SHARE, COPY_SHARE = 0.8, 0.9
"""Of the datasheet's rates, where nothing is measured."""

# What `llm profile` measured on one H200 (125m.json, 16 sequences of 2,048: benchmarks/results/nvidia-h200), of its
# rates. Attention, RMSNorm's backward pass and the loss have better tiles since, which no profile has measured yet.
PRODUCT_SHARES = {
    ("forward", "matmul"): 0.90,
    ("backward", "matmul"): 0.94,
    ("forward", "linear_cross_entropy"): 0.97,
    ("backward", "linear_cross_entropy"): 0.97,
    ("forward", "attention"): 0.48,
    # Seven products in two kernels where five would do; the FLOPs count five.
    ("backward", "attention"): 0.37,
    ("optimizer", "Muon"): 0.73,
}
COPY_SHARES = {
    ("forward", "loss"): 0.58,
    ("backward", "add_rms_norm"): 0.31,
    ("backward", "rms_norm"): 0.31,
    ("forward", "norm_rope"): 0.85,  # RoPE alone
    ("backward", "norm_rope"): 0.85,
    ("backward", "embedding"): 0.05,  # adds the rows of equal tokens by atomic operations
    ("optimizer", "update"): 0.32,  # many small kernels
}
OTHER_COPY = 0.97
"""For all other ops: their kernels only move bytes."""
BUSY = 0.92
"""The times of a profile's kernels over the time of the step without the profiler. The rest are the gaps between
kernels, and the lower clocks of a GPU that never waits."""


def nominal_rates(hardware: Hardware) -> tuple[Rates, str]:
    """Returns the rates of a kind of GPU, and their source: measured on one, else shares of the datasheet's."""
    if hardware.name in MEASURED:
        return MEASURED[hardware.name], f"measured on one {hardware.name}"
    rates = Rates(PRODUCTS_SHARE * hardware.flops, COPY_SHARE * 1e9 * hardware.bandwidth_gbs)
    return rates, f"{PRODUCTS_SHARE:.0%} and {COPY_SHARE:.0%} of {hardware.name}'s datasheet"


def op_seconds(phase: str, op: str, work: Work, limits: Rates) -> dict[str, float]:
    """Returns the time by each limit, {"matmul": seconds, "copy": seconds}; the op takes the longer one."""
    key = ("forward" if phase == "recomputed" else phase, op)
    return {
        "matmul": work.flops / (limits.products * PRODUCT_SHARES.get(key, 1.0)),
        "copy": work.moved / (limits.copy * COPY_SHARES.get(key, OTHER_COPY)),
    }


def seconds(works: Works, limits: Rates) -> float:
    """Returns the time of all these ops, with the gaps between them."""
    return sum(max(op_seconds(phase, op, work, limits).values()) for (phase, op), work in works.items()) / BUSY


def passes_work(
    config: Config, micro_batch: int, dtype: torch.dtype, checkpointing: ActivationCheckpointing = "none"
) -> Works:
    """Returns the work of forward and backward of one micro-batch of full sequences, each one document."""
    seq_len, model, item = config.data.seq_len, config.model, dtype.itemsize
    assert seq_len is not None
    assert model.vocab_size is not None
    window = min(seq_len, model.sliding_window or seq_len)
    tokens = micro_batch * seq_len
    # A token attends to itself and those before it, at most the window.
    pairs = micro_batch * (window * (window + 1) / 2 + (seq_len - window) * window)
    works = model_work(model, tokens, pairs, item)
    # The loss reads each logit and overwrites it by its gradient.
    works["forward", "loss"] = Work(2 * item * tokens * model.vocab_size)
    for op, work in recomputed_work(model, tokens, pairs, item, checkpointing).items():
        works["recomputed", op] = work
    return works


def update_work(config: Config, processes: int, dtype: torch.dtype) -> Works:
    """Returns the work of one update on one process, where the optimizer is on the GPU."""
    parameters = parameter_count(config.model)
    works = {("optimizer", "update"): adamw_work(config, processes, dtype)}
    if processes == 1 and dtype != torch.float32:
        # The fp32 weights are read, and rounded copies written, once a step.
        works["optimizer", "rounding"] = Work((4 + dtype.itemsize) * parameters)
    if config.optimizer.kind == "muon":
        flops = 0.0
        for shape in matrix_shapes(config.model):
            rows, columns = sorted(shape)
            # Five steps of two products of [rows, columns] and one of [rows, rows].
            flops += 5 * (4 * rows * rows * columns + 2 * rows**3)
        works["optimizer", "Muon"] = Work(flops=flops / processes)  # each orthogonalises some of the matrices
    return works


def adamw_work(config: Config, processes: int, dtype: torch.dtype) -> Work:
    """Returns the least work of one update on one process, for the actual ZeRO stage."""
    stage = run_stage(config.deepspeed.zero_stage, config.deepspeed.offload, processes, dtype)
    parameters = parameter_count(config.model) / (processes if stage else 1)
    # In fp32: reads weight, gradient and two moments, writes weight and moments. The norm reads the gradient once
    # more, and clipping reads and writes it. Above stage 0 a copy of the weights in `dtype` is written too.
    copy = dtype.itemsize if stage and dtype != torch.float32 else 0
    return Work(moved=parameters * ((4 + 3 + 1 + 2) * 4 + copy))
