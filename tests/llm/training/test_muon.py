"""Muon's update against the paper's, how ZeRO's partitions are exchanged for it, and the check of a run's first one."""

import math
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import SMALL_MODEL, newton_schulz
from torch import Tensor, nn

from llm.config import ModelConfig, OptimizerConfig
from llm.metrics import read_metrics
from llm.model.checkpoint import read_state
from llm.model.hf import to_hf
from llm.model.transformer import Transformer
from llm.training import muon
from llm.training.first_update import what_is_wrong
from llm.training.muon import orthogonalise, orthogonalise_all
from llm.training.optim import make_optimizer
from llm.training.storages import LiveStorages

SPECTRA: dict[str, Tensor] = {
    "even": torch.ones(32),
    "condition 1e3": torch.logspace(0, -3, 32),
    "condition 1e10": torch.logspace(0, -10, 32),
    "rank 1": (torch.arange(32) < 1).float(),
    "rank 4": (torch.arange(32) < 4).float(),
    "one large": torch.where(torch.arange(32) < 1, 1.0, 1e-4),
}


def with_spectrum(values: Tensor, columns: int) -> Tensor:
    """A matrix [values, columns], fp32, of these singular values."""
    generator = torch.Generator().manual_seed(5)

    def rotation(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(size, len(values), dtype=torch.double, generator=generator))[0]

    return ((rotation(len(values)) * values) @ rotation(columns).T).float()


@pytest.mark.parametrize("columns", [48, 96])
def test_orthogonalising_leaves_the_directions_and_evens_the_singular_values(columns: int) -> None:
    matrices = torch.randn(3, 32, columns, generator=torch.Generator().manual_seed(0))
    for matrix, result in zip(matrices, orthogonalise(matrices.clone(), torch.float32), strict=True):
        assert result == pytest.approx(newton_schulz(matrix).float(), abs=1e-4)
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        values = (u.T @ result @ v.T).diagonal()
        assert 0.6 < values.min() < values.max() < 1.3


@pytest.mark.parametrize("in_cpp", [True, False])
@pytest.mark.parametrize("columns", [32, 48, 96, 320])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_badly_conditioned_matrices_come_out_as_from_the_plain_iteration(
    spectrum: str, columns: int, in_cpp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the Gram matrix in C++, and in torch from 1.5 columns a row on.

    What differs are directions in which the matrix has nearly nothing. C++ leaks a little there, as it takes half of
    each product for the whole; bf16's plain iteration errs there by as much as all the rest is.
    """
    monkeypatch.setattr(muon.cpu, "covers_gram", lambda x: in_cpp)
    matrix = with_spectrum(SPECTRA[spectrum], columns)
    expected = newton_schulz(matrix)
    found = orthogonalise(matrix[None].clone(), torch.float32)[0].double()
    # In torch 1e-3 is what the products of one processor differ by from those of another.
    assert (found - expected).norm() < (5e-2 if in_cpp else 2e-3) * expected.norm()
    assert (matrix * (found - expected)).sum().abs() < 1e-3 * (matrix * expected).sum()
    assert torch.linalg.svdvals(found)[0] < 1.21


def test_a_zero_gradient_moves_nothing() -> None:
    assert not orthogonalise(torch.zeros(1, 8, 24), torch.float32).any()


def test_tall_and_wide_matrices_of_one_shape_are_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Size] = []

    def noted(matrices: Tensor, dtype: torch.dtype) -> Tensor:
        seen.append(matrices.shape)
        return orthogonalise(matrices, dtype)

    monkeypatch.setattr(muon, "orthogonalise", noted)
    matrices = [torch.randn(8, 24), torch.randn(24, 8), torch.randn(8, 8), torch.randn(24, 8)]
    expected = [0.2 * math.sqrt(max(matrix.shape)) * newton_schulz(matrix).float() for matrix in matrices]
    orthogonalise_all(matrices, torch.float32, shared=False)
    assert seen == [(3, 8, 24), (1, 8, 8)]
    for matrix, wanted in zip(matrices, expected, strict=True):
        torch.testing.assert_close(matrix, wanted, rtol=0, atol=1e-4)
    monkeypatch.setattr(muon, "BATCH_ELEMENTS", 400)
    orthogonalise_all([torch.randn(8, 24) for _ in range(5)], torch.float32, shared=False)
    assert seen[2:] == [(2, 8, 24), (2, 8, 24), (1, 8, 24)]


@pytest.mark.parametrize("muon_lr", [None, 0.05])
def test_muon_updates_each_matrix_for_itself_and_adamw_the_rest(muon_lr: float | None) -> None:
    """Two updates: q, k, v, gate and up are matrices of their own; embeddings, head and norms are AdamW's."""
    shape = ModelConfig(**SMALL_MODEL, vocab_size=100, qk_norm=True)
    model, other = Transformer(shape), Transformer(shape)
    chosen = OptimizerConfig(kind="muon", lr=0.02, muon_lr=muon_lr, muon_momentum=0.9, beta2=0.95, weight_decay=0.1)
    optimizer = make_optimizer(model, chosen)
    adamw = make_optimizer(other, OptimizerConfig(kind="adamw", lr=0.02, beta2=0.95, weight_decay=0.1))
    for some in (model, other):
        some.init_weights(3)
    expected = {
        key: part.clone() for name, p in model.named_parameters() for key, part in to_hf(shape, name, p).items()
    }
    momentum = {key: torch.zeros_like(part) for key, part in expected.items()}
    rate = muon_lr or 0.02
    generator = torch.Generator().manual_seed(4)
    for _ in range(2):
        for (name, parameter), by_adamw in zip(model.named_parameters(), other.parameters(), strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            by_adamw.grad = parameter.grad.clone()
            for key, gradient in to_hf(shape, name, parameter.grad).items():
                momentum[key] = 0.9 * momentum[key] + 0.1 * gradient
                direction = newton_schulz(0.9 * momentum[key] + 0.1 * gradient) if gradient.ndim == 2 else gradient
                scale = 0.2 * math.sqrt(max(gradient.shape))
                expected[key] = (1 - rate * 0.1) * expected[key] - rate * scale * direction
        optimizer.step()
        adamw.step()
    for (name, parameter), by_adamw in zip(model.named_parameters(), other.parameters(), strict=True):
        assert parameter.grad is not None
        if parameter.ndim == 1 or not name.startswith("layers."):
            assert torch.equal(parameter, by_adamw), name
            continue
        for key, part in to_hf(shape, name, parameter.detach()).items():
            torch.testing.assert_close(part.double(), expected[key], rtol=0, atol=1e-5, msg=key)


class Exchange:
    """Stands for torch.distributed among threads, each of which is a process."""

    def __init__(self, size: int) -> None:
        self.size, self.mine, self.posted = size, threading.local(), {}
        self.barrier = threading.Barrier(size, timeout=10)

    def all_to_all_single(self, received: Tensor, sent: Tensor, to_receive: list[int], to_send: list[int]) -> None:
        rank = self.mine.rank
        self.posted[rank] = sent.clone().split(to_send)
        self.barrier.wait()
        pieces = [self.posted[other][rank] for other in range(self.size)]
        assert [piece.numel() for piece in pieces] == to_receive
        received.copy_(torch.cat(pieces))
        self.barrier.wait()

    def run(self, process: Callable[[int], None]) -> None:
        errors: list[BaseException] = []

        def caught(rank: int) -> None:
            self.mine.rank = rank
            try:
                process(rank)
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=caught, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(1, 5),
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6),
    padding=st.integers(0, 3),
)
def test_a_partition_changes_as_if_each_matrix_were_changed_whole(
    size: int, shapes: list[tuple[int, int]], padding: int
) -> None:
    """Whatever the boundaries cut, and however small the partitions are."""
    total = sum(rows * columns for rows, columns in shapes)
    length = math.ceil((total + padding) / size)
    flat = torch.zeros(size * length)
    flat[:total] = torch.arange(1.0, total + 1)
    expected = flat.clone()
    for piece in expected[:total].split([rows * columns for rows, columns in shapes]):
        piece += piece.sum()
    exchange, changed = Exchange(size), []
    parts = [part.clone() for part in flat.split(length)]

    def process(rank: int) -> None:
        owned = muon._whole_matrices(parts[rank], shapes)
        for matrix in next(owned):
            changed.append(tuple(matrix.shape))
            matrix += matrix.sum()
        assert next(owned, None) is None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "_world_size", lambda: size)
        patch.setattr(muon, "_rank", lambda: exchange.mine.rank)
        patch.setattr(muon, "dist", SimpleNamespace(all_to_all_single=exchange.all_to_all_single))
        exchange.run(process)
    assert sorted(changed) == sorted(shapes), "each matrix is one process's"
    assert torch.equal(torch.cat(parts), expected)


@settings(max_examples=40, deadline=None)
@given(
    processes=st.integers(1, 4),
    # Few heights, so that some matrices are one batch.
    shapes=st.lists(st.tuples(st.integers(2, 4), st.integers(2, 9)), min_size=1, max_size=8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    partitioned=st.booleans(),
    at_once=st.sampled_from([None, 1]),
)
def test_a_step_takes_the_memory_that_is_computed(
    processes: int, shapes: list[tuple[int, int]], dtype: torch.dtype, partitioned: bool, at_once: int | None
) -> None:
    """On the process that takes most. The matrices are so large that what norms and rates take is little beside them.

    As on a GPU: without C++, whose scratch torch does not see, and without gloo's copy of what it gathers.
    """
    shapes = [(16 * rows, 16 * columns) for rows, columns in shapes]
    total = sum(rows * columns for rows, columns in shapes)
    partition = math.ceil(total / processes)
    computed = muon.step_bytes(
        shapes, processes, dtype, partition=partition if partitioned else None, on_cpu=False, at_once=at_once
    )
    peaks = []
    with pytest.MonkeyPatch.context() as patch:
        silent = SimpleNamespace(all_to_all_single=lambda *_: None, all_gather_into_tensor=lambda *_: None)
        patch.setattr(muon, "dist", silent)
        patch.setattr(muon.cpu, "covers_gram", lambda x: False)
        patch.setattr(muon, "_world_size", lambda: processes)
        for rank in range(processes):
            patch.setattr(muon, "_rank", lambda rank=rank: rank)
            sizes = [(partition,)] if partitioned else [(total,)] if at_once else shapes
            parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
            group = {"params": parameters, "momentum": 0.95, "dtype": dtype, "weight_decay": 0.1}
            group["shapes"] = [shapes] if len(sizes[0]) == 1 else [[shape] for shape in shapes]
            if at_once:
                group |= {"at_once": at_once, "whole": not partitioned}
            optimizer = muon.Muon([group], lr=0.1, fused=True)
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            held = [x for p in parameters for x in (p, p.grad, optimizer.state[p]["momentum_buffer"])]
            with LiveStorages(held) as count:
                optimizer.step()
            peaks.append(count.peak)
    assert computed == pytest.approx(max(peaks), rel=0.03)


def test_the_memory_of_cpp_and_gloo_comes_on_top(monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ has four matrices [rows, rows] a thread; gloo gathers into a copy of what it writes."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)

    def taken(processes: int, *, on_cpu: bool) -> int:
        return muon.step_bytes([(32, 64)] * 8, processes, torch.float32, partition=None, on_cpu=on_cpu)

    matrices, grams = 8 * 4 * 32 * 64, 8 * 4 * 32 * 32
    assert taken(1, on_cpu=True) == matrices + 2 * grams + 3 * 4 * 4 * 32 * 32
    assert taken(4, on_cpu=True) == matrices + matrices // 4 + 2 * matrices
    assert taken(4, on_cpu=False) == matrices + matrices // 4 + matrices


# The check of the first update.

RATE, DECAY = 5e-3, 0.1


def moved(weight: Tensor, update: Tensor, rate: float = RATE) -> tuple[Tensor, Tensor]:
    """(how far Muon's update has moved a weight, the weight after it), both rounded as in training."""
    scaled = update.float() * 0.2 * math.sqrt(max(update.shape))
    after = weight.clone().mul_(1 - rate * DECAY).add_(scaled, alpha=-rate)
    return (1 - rate * DECAY) * weight - after, after


def complaint(momentum: Tensor, update: Tensor, rate: float = RATE) -> str:
    weight = 0.02 * torch.randn(momentum.shape, generator=torch.Generator().manual_seed(1))
    change, after = moved(weight, update, rate)
    return what_is_wrong(change, momentum, after, rate=rate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rate", [5e-3, 1e-6, 1e-10, 0.0])
def test_a_right_update_passes_whatever_its_rank_its_rate_and_its_precision(
    spectrum: str, dtype: torch.dtype, rate: float
) -> None:
    for columns in (32, 96):
        matrix = 1e-6 * with_spectrum(SPECTRA[spectrum], columns)
        assert not complaint(matrix, orthogonalise(matrix[None], dtype)[0], rate)
        assert not complaint(matrix.mT, orthogonalise(matrix[None], dtype)[0].mT, rate)


def test_a_zero_update_of_a_zero_momentum_passes() -> None:
    assert not complaint(torch.zeros(8, 24), torch.zeros(8, 24))


def halves(m: Tensor) -> Tensor:
    return torch.cat([newton_schulz(half) for half in m.chunk(2)])


def above_others(m: Tensor) -> Tensor:
    return newton_schulz(torch.cat([m, m.flip(1), -m.flip(0)]))[: len(m)]


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(halves, id="its flat halves"),
        pytest.param(above_others, id="q, k and v as one matrix"),
        pytest.param(lambda m: m / m.norm() * math.sqrt(len(m)), id="the gradient"),
        pytest.param(lambda m: m.sign() / math.sqrt(m.shape[1]), id="its sign"),
        pytest.param(lambda m: -newton_schulz(m), id="uphill"),
        pytest.param(lambda m: 1.1 * newton_schulz(m), id="another scale"),
        pytest.param(lambda m: newton_schulz(m + 0.5 * m.std() * torch.randn_like(m)), id="of something else"),
        pytest.param(torch.zeros_like, id="nothing"),
        pytest.param(lambda m: m * math.nan, id="nan"),
    ],
)
@pytest.mark.parametrize("columns", [32, 96])
def test_a_wrong_update_fails(wrong: Callable[[Tensor], Tensor], columns: int) -> None:
    torch.manual_seed(2)
    matrix = with_spectrum(torch.logspace(0, -1.5, 32), columns)
    assert complaint(matrix, wrong(matrix))
    assert not complaint(matrix, newton_schulz(matrix))


@pytest.mark.parametrize(("name", "value"), [("A", 2.9), ("B", -4.2), ("C", 1.7), ("STEPS", 2)])
def test_a_wrong_coefficient_fails(monkeypatch: pytest.MonkeyPatch, name: str, value: float) -> None:
    matrices = [with_spectrum(torch.logspace(0, -1.5, 32), columns) for columns in (32, 96)]
    monkeypatch.setattr(muon, name, value)
    assert any(complaint(matrix, orthogonalise(matrix[None], torch.float32)[0]) for matrix in matrices)


def test_a_run_whose_muon_is_wrong_ends_after_its_first_step(
    write_config: Any, llm_here: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = write_config(optimizer__kind="muon", optimizer__muon_lr=6e-3, checkpoint__every_steps=4)
    assert llm_here("train", "--config", config)[0] == 0
    lines = [line for line in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert [line["muon_lr"] for line in lines] == pytest.approx([2 * line["lr"] for line in lines])
    optimizer = read_state(tmp_path / "run/latest")[1].optimizer
    for key in ("embed_lr", "head_lr", "norm_lr"):
        ratio = getattr(optimizer, key) / optimizer.peak_lr
        assert [line[key] for line in lines] == pytest.approx([ratio * line["lr"] for line in lines]), key
    monkeypatch.setattr(
        muon, "orthogonalise", lambda matrices, dtype: matrices / matrices.norm(dim=(1, 2), keepdim=True)
    )
    for more, step in ((["--resume", tmp_path / "run/step-00000004"], 5), ([], 1)):
        code, _, err = llm_here("train", "--config", config, f"checkpoint.dir={tmp_path / str(step)}", *more)
        (line,) = [line for line in err.splitlines() if "Muon" in line]
        assert code == 1
        assert f"step {step}: model.layers.0.self_attn.q_proj.weight has not moved as Muon moves it: the update" in line
        assert "optimizer.kind=adamw" in line
        assert not list((tmp_path / str(step)).glob("step-*"))
