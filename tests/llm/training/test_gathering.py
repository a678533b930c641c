"""The copies of a state that a GPU makes after the host has gone on: they hold the state of their step."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from running import CONFIGS

from llm.config_file import load_config
from llm.model.checkpoint_path import saved
from llm.model.transformer import parameter_shapes
from llm.training import saving
from llm.training.engine import Engine
from llm.training.gathering import CopyStream, host_memory, in_blocks

WriteConfig = Callable[..., Path]
Llm = Callable[..., tuple[int, str, str]]


class LateCopies(CopyStream):
    """Makes the copies as late as a GPU may: when the engine's next update waits for them, or the end of the run."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._page_locks = say, True
        self._queue: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._made = threading.Event()

    @contextlib.contextmanager
    def queueing(self, engine: Engine) -> Iterator[None]:
        self._made.clear()
        yield
        event: Any = LateEvent(self)
        engine.copied = event

    def copy(self, held: torch.Tensor, value: torch.Tensor) -> None:
        self._queue.append((held, value))

    def make(self) -> None:
        for held, value in self._queue:
            held.copy_(value)
        self._queue.clear()
        self._made.set()

    def wait(self) -> None:
        assert self._made.wait(60), "no copy is made"


class LateEvent:
    def __init__(self, copies: LateCopies) -> None:
        self.wait = copies.make


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets saves make their copies late, in memory that cannot be page-locked."""
    made: list[LateCopies] = []
    close, empty = saving.Saver.close, torch.empty

    def copies_of(device: torch.device, say: Callable[[str], None]) -> LateCopies:
        made.append(LateCopies(say))
        return made[-1]

    def close_late(self: saving.Saver, *arguments: Any) -> None:
        for copies in made:
            copies.make()
        close(self, *arguments)

    def limited(*arguments: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")
        return empty(*arguments, **options)

    monkeypatch.setattr(saving, "copy_stream", copies_of)
    monkeypatch.setattr(saving.Saver, "close", close_late)
    monkeypatch.setattr(torch, "empty", limited)


def tensor_files(run: Path) -> dict[str, bytes]:
    """The tensors of every checkpoint: {path in the run's folder: bytes}."""
    files = (file for path in saved(run) for file in path.glob("*.safetensors"))
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


@pytest.mark.parametrize("changes", [{}, {"optimizer__kind": "muon"}, {"train__same_bits": True}], ids=str)
def test_copies_that_are_made_late_hold_the_state_of_their_step(
    write_config: WriteConfig,
    llm_here: Llm,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    changes: dict[str, Any],
) -> None:
    config = write_config(checkpoint__every_steps=3, checkpoint__keep_last=3, **changes)
    assert llm_here("train", "--config", config, f"checkpoint.dir={tmp_path / 'at once'}")[0] == 0
    request.getfixturevalue("late")
    code, _, err = llm_here("train", "--config", config, f"checkpoint.dir={tmp_path / 'late'}")
    assert code == 0, err
    at_once, made_late = tensor_files(tmp_path / "at once"), tensor_files(tmp_path / "late")
    assert len(made_late) == 3 * (5 if "muon" in changes.values() else 4)
    assert at_once.keys() == made_late.keys()
    assert [name for name in at_once if at_once[name] != made_late[name]] == []
    limited = "a save's host memory cannot be page-locked (CUDA error: out of memory); each save stops training"
    assert err.count(limited) == 1


def test_copies_that_fail_cost_a_checkpoint_and_the_run_if_it_is_the_last(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: None
) -> None:
    wait = LateCopies.wait
    saves = 0

    def fail(self: LateCopies) -> None:
        nonlocal saves
        wait(self)
        saves += 1
        if saves != 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(LateCopies, "wait", fail)
    code, _, err = llm_here("train", "--config", write_config(checkpoint__every_steps=3))
    failed = (
        "the checkpoint could not be written: RuntimeError: CUDA error: an illegal memory access was encountered; "
        "older ones are untouched"
    )
    assert f"step-00000003: {failed}" in err
    assert f"step-00000008: {failed}" in err
    assert code == 1
    assert [path.name for path in saved(tmp_path / "run")] == ["step-00000006"]
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "failed"


SHAPES = st.lists(st.lists(st.integers(1, 40), max_size=2).map(torch.Size), min_size=1, max_size=60)


@given(SHAPES)
def test_tensors_share_blocks_and_no_element(shapes: list[torch.Size]) -> None:
    blocks: list[torch.Tensor] = []

    def empty(elements: int) -> torch.Tensor:
        blocks.append(torch.zeros(elements))
        return blocks[-1]

    tensors = in_blocks(dict(enumerate(shapes)), empty)
    assert [tensors[i].shape for i in range(len(shapes))] == shapes
    for tensor in tensors.values():
        tensor += 1
    assert sum(block.count_nonzero() for block in blocks) == sum(shape.numel() for shape in shapes)
    assert all(block.max() <= 1 for block in blocks)
    assert all(len(block).bit_count() == 1 for block in blocks)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_blocks_of_a_shipped_model_take_little_more_than_its_tensors(path: Path) -> None:
    config = load_config(str(path), ["model.vocab_size=32000"])
    pieces: list[int] = []

    def empty(elements: int) -> torch.Tensor:
        pieces.append(elements)
        return torch.empty(elements, device="meta")

    memory = host_memory(config, list(parameter_shapes(config.model)), empty)
    needed = sum(tensor.numel() for named in memory.values() for tensor in named.values())
    assert needed <= sum(pieces) < 1.04 * needed
