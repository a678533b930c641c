"""Copies a run's state to the host memory of the ranks that write it.

On a GPU the host only queues the copies, to page-locked memory. Whole weights and moments that lie in place are copied
on a stream of their own, beside the forward and backward passes of the next step, which do not change them; its
`Engine.update` waits for the copies, on the device. Those that ZeRO puts together for a save are temporary, so that the
computing stream itself copies each before it uses its memory again. On a CPU the copies are made at once.
"""

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from kernels.launch import next_power_of_2
from llm.config import Config
from llm.model.checkpoint import OPTIMIZER_STEP
from llm.model.hf import hf_names, to_hf
from llm.model.transformer import parameter_shapes
from llm.training.engine import Engine
from llm.training.optim import all_moments, moments

K = TypeVar("K", bound=Hashable)

Tensors = dict[str, dict[str, torch.Tensor]]
"""{file stem: {Hugging Face name: tensor}}"""


@dataclass
class Gathered:
    """This rank's part of a checkpoint's tensors, in its host's memory after `wait`."""

    files: Tensors
    """Of the tensors that this rank writes."""
    parts: dict[str, dict[str, int]]
    """{file stem: {Hugging Face name: rank that writes it}} of all tensors."""
    sizes: dict[str, int]
    """{file stem: bytes} of all tensors."""
    copies: "CopyStream | None" = None

    def wait(self) -> None:
        """Waits until the copies are made. From any thread."""
        if self.copies is not None:
            self.copies.wait()


class CopyStream:
    """Copies from a GPU to page-locked host memory, which the host queues and does not wait for.

    Args:
        device: the GPU.
        say: shows a line to the user.
    """

    def __init__(self, device: torch.device, say: Callable[[str], None]) -> None:
        self._device, self._say, self._page_locks = device, say, True
        self._side = torch.cuda.Stream(device)
        # Blocking: a thread that waits for it leaves the processor to others.
        self._copied = torch.cuda.Event(blocking=True)

    def empty(self, elements: int) -> torch.Tensor:
        """Returns fp32 host memory, page-locked if the system allows it. Where it does not, the host waits for copies
        to it.
        """
        if self._page_locks:
            try:
                return torch.empty(elements, dtype=torch.float32, pin_memory=True)
            except RuntimeError as error:
                self._page_locks = False
                reason = str(error).splitlines()[0]
                self._say(
                    f"warning     a save's host memory cannot be page-locked ({reason}); each save stops training"
                )
        return torch.empty(elements, dtype=torch.float32)

    @contextlib.contextmanager
    def queueing(self, engine: Engine) -> Iterator[None]:
        """Copies queued in the block come after all that is computed so far, and before the engine's next update."""
        computing = torch.cuda.current_stream(self._device)
        stream = self._side if engine.reads_in_place else computing
        if stream is not computing:
            stream.wait_stream(computing)
        self._stream = stream
        yield
        self._copied.record(stream)
        engine.copied = self._copied

    def copy(self, held: torch.Tensor, value: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            held.copy_(value, non_blocking=True)
        if value.is_cuda:
            value.record_stream(self._stream)  # were it freed before the copy, its memory would be used again

    def wait(self) -> None:
        # A thread begins on the first GPU, and would set up a context there.
        with torch.cuda.device(self._device):
            self._copied.synchronize()


def copy_stream(device: torch.device, say: Callable[[str], None]) -> CopyStream | None:
    """Returns what queues copies from the device; None: they are made at once."""
    return CopyStream(device, say) if device.type == "cuda" else None


def gather(engine: Engine, config: Config, parts: int, memory: Tensors, copies: CopyStream | None = None) -> Gathered:
    """Copies tensors to the host of the rank that writes them: rank 0, or of several ranks one for each parameter.

    Collective.

    memory: the `files` of the previous save, which are overwritten; empty: there was none.
    copies: what queues the copies; None: they are made at once.
    """
    stems = ["model", *(f"optimizer-{name}" for name in (*all_moments(config.optimizer), OPTIMIZER_STEP))]
    gathered = Gathered({stem: {} for stem in stems}, {stem: {} for stem in stems}, dict.fromkeys(stems, 0), copies)
    writers = _writers({name: math.prod(shape) for name, shape in parameter_shapes(config.model).items()}, parts)
    if not memory:
        mine = [name for name, writer in writers.items() if writer == engine.world.rank]
        memory = host_memory(config, mine, None if copies is None else copies.empty)
    steps = engine.read_optimizer_steps()

    def take(stem: str, key: str, value: torch.Tensor, writer: int) -> None:
        gathered.parts[stem][key] = writer
        gathered.sizes[stem] += value.nbytes
        if writer == engine.world.rank:
            # Always a copy, because the value may be a view of data that the next step changes.
            held = gathered.files[stem][key] = memory[stem][key]
            if copies is None:
                held.copy_(value)
            else:
                copies.copy(held, value)

    with contextlib.nullcontext() if copies is None else copies.queueing(engine):
        # Every rank reads every tensor, because reading is collective; only its writer keeps it.
        for name in engine.parameters:
            values = {"model": engine.read_parameter(name)}
            for moment in moments(name, config.optimizer):
                values[f"optimizer-{moment}"] = engine.read_moment(name, moment)
            for stem, value in values.items():
                for key, part in to_hf(config.model, name, value).items():
                    take(stem, key, part, writers[name])
            for key in hf_names(name):
                take(f"optimizer-{OPTIMIZER_STEP}", key, steps, writers[name])
    return gathered


def _writers(sizes: dict[str, int], parts: int) -> dict[str, int]:
    """Chooses the rank that writes each parameter: the largest first, each to the rank with the fewest bytes so far."""
    loads, writers = [0] * parts, {}
    # The same on every rank, because sorting is stable: no communication is needed.
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        writers[name] = loads.index(min(loads))
        loads[writers[name]] += sizes[name]
    return writers


def host_memory(config: Config, names: list[str], empty: Callable[[int], torch.Tensor] | None) -> Tensors:
    """Returns fp32 tensors for the weights, moments and update counts of some parameters.

    empty: makes page-locked memory of so many elements, for `in_blocks`; None: each tensor has memory of its own.
    """
    shapes: dict[tuple[str, str], torch.Size] = {}
    for name in names:
        whole = torch.empty(parameter_shapes(config.model)[name], device="meta")
        for key, part in to_hf(config.model, name, whole).items():
            for stem in ("model", *(f"optimizer-{moment}" for moment in moments(name, config.optimizer))):
                shapes[stem, key] = part.shape
            shapes[f"optimizer-{OPTIMIZER_STEP}", key] = torch.Size()
    if empty is None:
        held = {place: torch.empty(shape, dtype=torch.float32) for place, shape in shapes.items()}
    else:
        held = in_blocks(shapes, empty)
    memory: Tensors = {}
    for (stem, key), tensor in held.items():
        memory.setdefault(stem, {})[key] = tensor
    return memory


def in_blocks(shapes: Mapping[K, torch.Size], empty: Callable[[int], torch.Tensor]) -> dict[K, torch.Tensor]:
    """Returns tensors of these shapes that share a few blocks of memory.

    The elements of a block are a power of two, because torch rounds each piece of page-locked memory up to one. That
    would take up to twice the memory for a tensor in a piece of its own.

    empty: makes a block of so many elements.
    """
    left = sum(shape.numel() for shape in shapes.values())
    usual = next_power_of_2(math.ceil(left / 16))
    blocks: list[torch.Tensor] = []
    used: list[int] = []
    tensors = {}
    # Small ones come last, and fill what large ones have left.
    for key in sorted(shapes, key=lambda key: -shapes[key].numel()):
        size = shapes[key].numel()
        found = next((i for i, block in enumerate(blocks) if used[i] + size <= len(block)), len(blocks))
        if found == len(blocks):
            blocks.append(empty(max(next_power_of_2(size), min(usual, next_power_of_2(left)))))
            used.append(0)
        tensors[key] = blocks[found][used[found] : used[found] + size].view(shapes[key])
        used[found] += size
        left -= size
    return tensors
