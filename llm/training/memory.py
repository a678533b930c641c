"""The memory of a run, before it begins.

The state is computed from the number of parameters (Rajbhandari et al. 2020, "ZeRO", with this project's dtypes).
Activations are traced: two and three blocks of the model, with its head, run forward and backward on tensors without
memory, and every storage is counted. Each further block adds as much as the third.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.dispatch import using
from kernels.linear import MasterWeights
from llm.config import Config
from llm.model.transformer import Transformer, parameter_shapes
from llm.training.engine import reduce_bucket, run_stage
from llm.training.muon import step_bytes
from llm.training.optim import matrix_shapes, moments
from llm.training.same_bits import CHUNK, PIECE, held_sums
from llm.training.storages import LiveStorages

Device = Literal["cpu", "cuda"]
LIVE_PARAMETERS = 10**9
"""ZeRO 3 keeps so many gathered weights: DeepSpeed's stage3_max_live_parameters."""
AUTO_MICRO_BATCH_TOKENS = {"cpu": 8_192, "cuda": 32_768}
"""The largest micro-batch in tokens if train.micro_batch is null."""
COPIED_GRADIENTS = 500_000_000
"""DeepSpeed's elements_per_buffer of stage 0."""

GLOO_BYTES = 1_900_000
"""What gloo's all-reduce allocates for a tensor of any size from 4 MB on, as measured (torch 2.13)."""
OBJECTS_BYTES = 2_500_000
"""What the objects and threads of a run add to a process on a CPU, as measured: 1.5 to 3 MB at every stage."""


@dataclass(frozen=True)
class State:
    """Bytes that one process holds between steps."""

    weights: int
    masters: int
    gradients: int
    moments: int
    buckets: int
    gathered: int
    """ZeRO 3's whole weights, which it keeps between forward, backward and the update."""
    passing: int
    """Only while gradients are reduced, when no activations are left: the copies that are sent."""
    update: int = 0
    """Only in Muon's update, when no activations are left: the copies of matrices, products and exchanged pieces."""
    partial_sums: int = 0
    """With train.same_bits: the gradients of finished subtrees of micro-batches."""
    host_gradients: int = 0
    """With deepspeed.offload=cpu on a CPU: the gradients that the update reads, and their buffers."""
    objects: int = 0
    """On a CPU, whose memory is measured by process: what is no tensor."""

    @property
    def total(self) -> int:
        """Bytes that are always held."""
        held = self.weights + self.masters + self.gradients + self.moments + self.buckets + self.gathered
        return held + self.partial_sums + self.host_gradients + self.objects

    def peak(self, activations: "Activations") -> int:
        """Returns the most bytes of a step."""
        return self.total + max(activations.peak, self.passing, self.update)


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
    objects = OBJECTS_BYTES if device == "cpu" else 0
    if config.train.same_bits:
        return State(
            objects=objects,
            weights=4 * parameters,
            masters=0,
            gradients=4 * parameters,
            moments=math.ceil(moment_bytes / processes) if stage == 1 else moment_bytes,
            buckets=0,
            gathered=0,
            passing=4 * min(CHUNK, parameters // 2) if processes > 1 else 0,
            update=_update(config, stage, processes, dtype, device),
            partial_sums=4 * parameters * held_sums(_micro_batches(config, processes, device)),
        )
    offload = config.deepspeed.offload == "cpu" and stage > 0
    # On a CPU the host's memory is that of the process.
    here = not offload or device == "cpu"
    # DeepSpeed pads the parameters so that all ranks have the same number.
    share = math.ceil(parameters / processes)
    buckets, passing = _reduction(config, stage, processes, dtype, device)
    # DeepSpeed's optimizer of stage 1 in bf16 keeps the gradients of a micro-batch beside their sums.
    kept = _sums_bf16(config, stage, dtype) and processes > 1 and _micro_batches(config, processes, device) > 1
    return State(
        objects=objects,
        weights=_weight_dtype(stage, dtype).itemsize * (share if stage == 3 else parameters),
        masters=4 * share * here if stage > 0 else 0,
        # At stage 3 offload takes the sums to the host.
        gradients=(4 + 2 * kept) * (share if stage > 1 else parameters) * (here or stage < 3),
        moments=moment_bytes if stage == 0 else math.ceil(moment_bytes / processes) * here,
        buckets=buckets,
        gathered=dtype.itemsize * min(parameters, LIVE_PARAMETERS) if stage == 3 and processes > 1 else 0,
        passing=passing,
        update=_update(config, stage, processes, dtype, device),
        host_gradients=_host_gradients(config, stage, processes, device) if offload else 0,
    )


def _sums_bf16(config: Config, stage: int, dtype: torch.dtype) -> bool:
    """Whether DeepSpeed takes its BF16_Optimizer, which reduces as stage 0 does."""
    return stage == 1 and dtype == torch.bfloat16 and config.deepspeed.offload == "none"


def _reduction(config: Config, stage: int, processes: int, dtype: torch.dtype, device: Device) -> tuple[int, int]:
    """Returns the bytes of the buffers that a process reduces gradients in: those always held, and those in passing.

    A bucket takes the place of the gradients that move into it. Then it is copied, to fp32 if it is not, and reduced.
    """
    shapes = parameter_shapes(config.model).values()
    within = GLOO_BYTES if device == "cpu" and processes > 1 else 0
    if stage == 0 or _sums_bf16(config, stage, dtype):
        # The rounded weights last until the update.
        rounded = _rounded_bytes(config, dtype) if stage == 0 and device == "cuda" else 0
        return 0, 4 * _largest_copy(shapes) + rounded + within if processes > 1 else 0
    bucket = reduce_bucket(stage, processes)
    # What gradients fill of it. One that is larger than the bucket is reduced without.
    filled = min(bucket, sum(shape.numel() for shape in shapes)) if processes > 1 or stage == 3 else 0
    if stage == 1:
        return (0 if device == "cpu" else 4 * bucket), 4 * filled + within
    if stage == 2:
        moved = dtype.itemsize * filled
        copied = moved + (0 if dtype == torch.float32 else 4 * filled)
        if device == "cuda":
            return dtype.itemsize * bucket, copied
        # A CPU has only the pages of a buffer that were written: the LM head's while activations are there, all of them
        # at the end of backward.
        head = 0 if config.model.tie_embeddings else dtype.itemsize * config.model.rows * config.model.d_model
        written = min(head, moved)
        return written, moved - written + copied + within
    # The reduction scatters a copy.
    return 4 * (filled if device == "cpu" else bucket), dtype.itemsize * (filled + filled // processes)


def _rounded_bytes(config: Config, dtype: torch.dtype) -> int:
    """Returns the bytes of a step's copies of the fp32 weights (kernels.linear.MasterWeights)."""
    if dtype == torch.float32:
        return 0
    kept = {"embed_tokens.weight"} if not config.model.tie_embeddings else set()
    return dtype.itemsize * sum(s.numel() for name, s in parameter_shapes(config.model).items() if name not in kept)


def _update(config: Config, stage: int, processes: int, dtype: torch.dtype, device: Device) -> int:
    """Returns the bytes that Muon's update of the matrices takes beside the state of this stage."""
    if config.optimizer.kind != "muon":
        return 0
    same_bits, offload, partitioned = config.train.same_bits, config.deepspeed.offload == "cpu", stage > 0
    shapes = matrix_shapes(config.model)
    elements = sum(rows * columns for rows, columns in shapes)
    partition = partition_length(elements, processes, same_bits=same_bits)
    taken = step_bytes(
        shapes,
        processes,
        dtype,
        partition=partition if partitioned else None,
        on_cpu=device == "cpu",
        at_once=1 if same_bits else None,
    )
    # Those of a block's matrices, weights and momentum, that FirstUpdate compares with.
    taken += 8 * elements // config.model.n_layers
    if offload and device == "cuda":
        taken += 4 * partition  # the host's momentum, which is orthogonalised on the GPU
    if offload and stage == 1:
        # DeepSpeed has copied the sums of gradients to the host and has freed them; on a GPU those of the last
        # micro-batch are left.
        left = dtype.itemsize if device == "cuda" else 0
        taken -= (4 - left) * sum(shape.numel() for shape in parameter_shapes(config.model).values())
    if not partitioned or same_bits or offload or _sums_bf16(config, stage, dtype):
        return max(0, taken)
    # DeepSpeed copies the gradients of this partition, and then frees those of all the matrices that this process has.
    copy, freed = 4 * partition, 4 * (elements if stage == 1 else partition)
    return max(copy + taken - freed, copy if stage > 1 else 0)


def partition_length(elements: int, processes: int, *, same_bits: bool) -> int:
    """Returns how many of a group's elements a process has at ZeRO 1 and 2, with those that fill up the last one."""
    unit = PIECE if same_bits else 2
    return math.ceil(elements / (unit * processes)) * unit


def _host_gradients(config: Config, stage: int, processes: int, device: Device) -> int:
    """Returns the bytes that deepspeed.offload=cpu adds on a CPU: the gradients that the update reads, and buffers."""
    if device == "cuda":
        return 0
    shapes = parameter_shapes(config.model).values()
    share = 4 * math.ceil(sum(shape.numel() for shape in shapes) / processes)
    if stage == 3:
        return share
    # Gradients of several micro-batches are summed in another place; two buffers hold the largest parameter.
    sums = share if _micro_batches(config, processes, device) > 1 else 0
    return share + sums + 8 * max(shape.numel() for shape in shapes)


def _micro_batches(config: Config, processes: int, device: Device) -> int:
    """Returns how many micro-batches of a step a process computes, if the memory allows training's own choice."""
    seq_len = config.data.seq_len or config.model.max_seq_len
    sequences = math.ceil(config.train.batch // seq_len / processes)
    largest = config.train.micro_batch or max(1, AUTO_MICRO_BATCH_TOKENS[device] // seq_len)
    return math.ceil(sequences / largest)


def _largest_copy(shapes: Iterable[torch.Size]) -> int:
    """Returns how many gradients DeepSpeed copies to one tensor at stage 0: it ends one after COPIED_GRADIENTS."""
    largest = copied = 0
    for shape in shapes:
        copied += shape.numel()
        largest = max(largest, copied)
        if copied > COPIED_GRADIENTS:
            copied = 0
    return largest


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
    config: Config,
    processes: int,
    micro_batch: int,
    seq_len: int,
    dtype: torch.dtype,
    device: Device = "cuda",
    *,
    triton: bool = True,
) -> Activations:
    """Traces a micro-batch with the kernels of the device: Triton on a GPU (or the reference), C++ on a CPU."""
    stage = run_stage(config.deepspeed.zero_stage, config.deepspeed.offload, processes, dtype)

    def traced(layers: int) -> Activations:
        model = config.model.model_copy(update={"n_layers": layers})
        checkpointing = config.train.activation_checkpointing
        # A fake CPU tensor uses the same backend and code as a real one; a meta tensor does not.
        place = torch.device("meta") if device == "cuda" else FakeTensorMode()
        backend = "auto" if device == "cpu" else "triton" if triton else "torch"
        with using(backend), place:
            # With same_bits weights are fp32 at every stage.
            with _default_dtype(
                _weight_dtype(0 if config.train.same_bits else stage, dtype)
            ):  # fake weights cannot be converted
                transformer = Transformer(model, activation_checkpointing=checkpointing, compute_dtype=dtype)
            # As in the engine: at other stages DeepSpeed has the masters.
            masters = transformer.master_weights() if stage == 0 or config.train.same_bits else None
            ids = torch.empty(micro_batch, seq_len, dtype=torch.int64)
            doc_start = torch.empty(micro_batch, seq_len, dtype=torch.int32)
            # Any labels are right, because only shapes are traced.
            return traced_step(transformer, lambda: transformer(ids, labels=ids, doc_start=doc_start), masters)

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


def traced_step(
    model: torch.nn.Module, forward: Callable[[], torch.Tensor], masters: MasterWeights | None = None
) -> Activations:
    """Counts forward() and its backward, without the gradients of parameters, which State counts.

    masters: the weights that are rounded before, and whose gradients are there already, because products add to them.
    """
    masters = masters or MasterWeights([], None)

    # Freed at once; otherwise a gradient would be counted here and in State.
    def let_go(parameter: torch.Tensor) -> None:
        parameter.grad = None

    hooks = [parameter.register_post_accumulate_grad_hook(let_go) for parameter in model.parameters()]
    for weight in masters.weights:
        weight.grad = torch.empty_like(weight)
    gradients = [weight.grad for weight in masters.weights if weight.grad is not None]
    with LiveStorages([*model.parameters(), *model.buffers(), *gradients]) as count, masters:
        loss = forward()
        held = count.bytes
        loss.backward()
    for hook in hooks:
        hook.remove()
    return Activations(held, count.peak)


def largest_micro_batch(state: State, activations: Callable[[int], Activations], size: int, room: float) -> int:
    """Returns `size`, halved until a step takes at most `room` bytes; 0: not even one sequence fits.

    activations: of a micro-batch of so many sequences.
    """
    while state.peak(found := activations(size)) > room:
        left = room - state.total
        if size == 1 or left <= 0:
            return 0
        # Halved as often as a peak in proportion to the size needs, because each trace takes time. A peak falls more
        # slowly than that, so no size that fits is passed over.
        size = max(1, size >> max(1, math.ceil(math.log2(found.peak / left))))
    return size
