"""train.same_bits: sums along one binary tree, whichever processes share its leaves (trained in test_parallel.py)."""

import json
import math
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import environment
from torch import Tensor

from llm.config_file import load_config
from llm.errors import UserError
from llm.metrics import exact_sum
from llm.training import same_bits
from llm.training.batch_plan import check_tree
from llm.training.same_bits import TreeSum, all_gather, block_size, held_sums, micro_batch_order, reduce_scatter

WIDTH = 8


class Line:
    """Stands for torch.distributed among threads, each of which is a process."""

    def __init__(self, size: int) -> None:
        self.mine = threading.local()
        self.sent = {(a, b): queue.Queue() for a in range(size) for b in range(size)}

    def exchange(self, sent: Tensor, received: Tensor, other: int) -> None:
        self.sent[self.mine.rank, other].put(sent.clone())
        received.copy_(self.sent[other, self.mine.rank].get(timeout=10))


def summed(micro_batches: Tensor, processes: int) -> list[Tensor]:
    """What each process holds of the sum of micro_batches [n, WIDTH] that the processes have taken in turn."""
    line, results = Line(processes), [torch.empty(0)] * processes
    errors: list[BaseException] = []

    def process(rank: int) -> None:
        try:
            line.mine.rank = rank
            own = micro_batches[rank::processes]
            block = block_size(len(own))
            made: list[Tensor] = []
            tree = TreeSum(len(own) // block, lambda: made.append(torch.zeros(WIDTH)) or made[-1])
            for number, taken in enumerate(micro_batch_order(len(own)), 1):
                tree.current += own[taken]
                if number % block == 0:
                    tree.close()
            assert len(made) <= 1 + held_sums(len(own))
            reduce_scatter(tree.current, rank, processes)
            all_gather(tree.current, rank, processes)
            results[rank] = tree.current
        except BaseException as error:
            errors.append(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(same_bits, "_exchange", line.exchange)
        threads = [threading.Thread(target=process, args=(rank,)) for rank in range(processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors, errors
    return results


def tree_of(micro_batches: list[Tensor]) -> Tensor:
    """The sum as the documentation defines it."""
    if len(micro_batches) % 2:
        total = torch.zeros(WIDTH)
        for gradient in micro_batches:
            total = total + gradient
        return total
    return tree_of(micro_batches[0::2]) + tree_of(micro_batches[1::2])


counts = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 40])


@settings(max_examples=20, deadline=None)
@given(count=counts, seed=st.integers(0, 2**32), scale=st.integers(0, 30))
def test_the_sum_has_the_same_bits_for_any_split_and_is_right(count: int, seed: int, scale: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.rand(count, WIDTH, generator=generator) * scale
    micro_batches = torch.randn(count, WIDTH, generator=generator) * 2.0**exponents
    expected = tree_of(list(micro_batches))
    processes = 1
    while count % processes == 0 and processes <= WIDTH:
        for found in summed(micro_batches, processes):
            assert torch.equal(found.view(torch.int32), expected.view(torch.int32)), processes
        processes *= 2
    for column, result in zip(micro_batches.T.tolist(), expected.tolist(), strict=True):
        exact = sum(map(Fraction, column))
        # Higham 2002, section 4.2: each number takes part in at most so many additions.
        additions = math.log2(same_bits.lanes(count)) + count // same_bits.lanes(count)
        assert abs(Fraction(result) - exact) <= additions * 2.0**-24 * 1.01 * sum(map(abs, column))


@settings(max_examples=20, deadline=None)
@given(count=counts, data=st.data())
def test_of_whole_numbers_the_sum_is_exact(count: int, data: st.DataObject) -> None:
    """So each micro-batch is in it, once."""
    numbers = data.draw(st.lists(st.integers(-(2**17), 2**17), min_size=count, max_size=count))
    processes = data.draw(st.sampled_from([2**power for power in range(4) if count % 2**power == 0]))
    micro_batches = torch.tensor(numbers, dtype=torch.float32)[:, None].expand(count, WIDTH)
    for found in summed(micro_batches, processes):
        assert found.tolist() == [sum(numbers)] * WIDTH


def test_few_partial_sums_are_held() -> None:
    assert [held_sums(count) for count in (1, 2, 3, 4, 6, 8, 16, 24, 64)] == [0, 0, 0, 1, 1, 2, 3, 3, 5]


def test_a_tree_starts_again_after_a_step_that_was_left_out() -> None:
    tree = TreeSum(4, lambda: torch.zeros(1))
    for values in ([1.0, 2.0, 4.0], [8.0, 16.0, 32.0, 64.0]):
        tree.restart()
        for value in values:
            tree.current += value
            tree.close()
    assert tree.current.item() == 120


@given(st.lists(st.floats(-1e300, 1e300), max_size=20), st.randoms())
def test_an_exact_sum_depends_on_no_order(values: list[float], chance: Any) -> None:
    shuffled = chance.sample(values, len(values))
    assert exact_sum(shuffled) == exact_sum(values) == pytest.approx(float(sum(map(Fraction, values))), rel=1e-15)


def test_an_exact_sum_keeps_what_is_not_finite() -> None:
    assert math.isnan(exact_sum([1.0, math.nan]))
    assert math.isnan(exact_sum([math.inf, -math.inf]))
    assert exact_sum([1.0, math.inf]) == math.inf


def test_processes_that_are_no_subtree_are_refused_with_the_way_out(write_config: Callable[..., Path]) -> None:
    def check(processes: int, micro_batch: int, same: bool = True) -> None:
        path = write_config(train__same_bits=same, data__seq_len=64)  # 8 sequences a step
        check_tree(load_config(path), processes, micro_batch)

    for processes, micro_batch in ((1, 8), (8, 1), (4, 2), (2, 3), (1, 5)):
        if (processes, micro_batch) != (2, 3):
            check(processes, micro_batch)
    with pytest.raises(UserError, match=r"2 processes cannot share the 3 micro-batches .* start 1, or .*micro_batch=2"):
        check(2, 3)
    with pytest.raises(UserError, match=r"3 processes .* start 1 or 2 or 4 or 8, or set"):
        check(3, 1)
    check(3, 1, same=False)


@pytest.mark.parametrize(
    ("setting", "way_out"),
    [
        ("deepspeed.zero_stage=2", "deepspeed.zero_stage=1"),
        ("train.precision=fp16", "train.precision=bf16"),
        ("deepspeed.offload=cpu", "deepspeed.offload=none"),
    ],
)
def test_what_cannot_keep_the_bits_is_an_error(write_config: Callable[..., Path], setting: str, way_out: str) -> None:
    path = write_config(train__same_bits=True)
    with pytest.raises(UserError, match=f"train.same_bits=true does not train .*{way_out}"):
        load_config(path, [setting])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "precision"), [("adamw", "fp32"), ("muon", "bf16"), ("adamw", "bf16")])
def test_kills_and_other_processes_and_stages_change_no_bit(
    write_config: Callable[..., Path], tmp_path: Path, kind: str, precision: str
) -> None:
    config = write_config(
        optimizer__kind=kind,
        train__precision=precision,
        train__same_bits=True,
        train__micro_batch=1,
        train__total_tokens=24 * 512,
        train__eval_every_steps=8,
        checkpoint__every_steps=3,
        checkpoint__keep_last=100,
    )
    command = [sys.executable, Path(__file__).parent / "kills.py", "processes", config, tmp_path, "9", "11"]
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3_000:]
    done = json.loads((tmp_path / "kills.json").read_text())
    print(done)
    assert {killed["processes"] for killed in done} == {1, 2, 4}
    assert {killed["stage"] for killed in done} == {0, 1}
