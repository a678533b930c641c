"""RMSNorm alone and with the residual addition: the reference against the formula, the backends against it."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from machines import CUDA, EVERY_DTYPE, EVERYWHERE, EXACT, TRITON, Machine
from mutation import mutated
from torch import Tensor

import kernels
from kernels import reference
from kernels.parity import Parity, check, disagreements
from kernels.rms_norm import MAX_WIDTH, rms_norm_backward, rms_norm_forward


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def parity(
    machine: Machine, x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, module=kernels, **options
) -> list[Parity]:
    rows = x.numel() // max(1, x.shape[-1])
    return check(
        partial(module.rms_norm, eps=eps, backend=machine.backend),
        partial(reference.rms_norm, eps=eps),
        [x, weight],
        rows={"gradient 1": rows},
        **options,
    ) + check(
        partial(module.add_rms_norm, eps=eps, backend=machine.backend),
        partial(reference.add_rms_norm, eps=eps),
        [x, residual, weight],
        rows={"gradient 2": rows},
        **options,
    )


def assert_parity(*arguments, **options) -> None:
    results = parity(*arguments, **options)
    assert all(result.agrees for result in results), disagreements(results)


def test_reference_is_the_formula() -> None:
    x, weight = torch.randn(5, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    expected = [[v / math.sqrt(sum(u * u for u in row) / 7 + 0.1) for v in row] for row in x.tolist()]
    torch.testing.assert_close(reference.rms_norm(x, weight, 0.1), torch.tensor(expected).double() * weight)


@pytest.mark.parametrize("machine", EVERY_DTYPE)
@pytest.mark.parametrize(
    ("rows", "d"),
    [(0, 8), (1, 1), (3, 17), (129, 64), (127, 127), (1023, 128), (3, 1000), (128, 768), (2, 4097), (1, 8192)],
)
def test_backends_agree_with_the_reference(machine: Machine, rows: int, d: int) -> None:
    assert_parity(machine, machine.randn(rows, d), machine.randn(rows, d), machine.randn(d))


@pytest.mark.parametrize("machine", CUDA)
def test_more_rows_than_the_programs_of_a_gpu_take_at_once(machine: Machine) -> None:
    assert_parity(machine, machine.randn(20_000, 64), machine.randn(20_000, 64), machine.randn(64))


@pytest.mark.parametrize("machine", EVERYWHERE)
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat((x, x), -1)[..., :20],
        lambda x: torch.cat((x, x), -1)[..., ::2],
        lambda x: torch.cat((x, x), 2)[:, :, 1:4],
        lambda x: torch.cat((x.flatten(), x.flatten()))[3 : 3 + x.numel()].view(x.shape),
        lambda x: x[:1, :1].expand(x.shape),
    ],
    ids=["transposed", "slice of each row", "every other column", "slice of the heads", "offset", "expanded"],
)
def test_any_strides_of_inputs_and_gradients(machine: Machine, layout) -> None:
    x, residual = (layout(machine.randn(2, 5, 3, 20)) for _ in range(2))
    assert_parity(machine, x, residual, machine.randn(40)[::2], gradient_layout=layout)


@pytest.mark.parametrize("machine", EVERYWHERE)
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_eps(machine: Machine, eps: float) -> None:
    x = machine.randn(4, 6) * 1e-2
    assert_parity(machine, x, x, machine.randn(6), eps)


def test_torch_backend_is_torch_rms_norm() -> None:
    x, weight = torch.randn(4, 6, dtype=torch.float64) * 1e-3, torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-2), F.rms_norm(x, (6,), weight, 1e-2))
    y, total = kernels.add_rms_norm(x, x, weight, 1e-2)
    torch.testing.assert_close(total, 2 * x)
    torch.testing.assert_close(y, F.rms_norm(2 * x, (6,), weight, 1e-2))


@pytest.mark.parametrize("module", [reference, kernels])
def test_gradcheck(module) -> None:
    x, r, w = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((3, 5), (3, 5), (5,)))
    assert torch.autograd.gradcheck(module.rms_norm, (x, w))
    assert torch.autograd.gradcheck(module.add_rms_norm, (x, r, w))


@pytest.mark.parametrize("machine", EXACT)
def test_registered_ops_pass_opcheck(machine: Machine) -> None:
    x, residual, weight = machine.randn(5, 24), machine.randn(5, 24), machine.randn(24)
    y, total, rstd = rms_norm_forward(x, residual, weight, 1e-6)
    torch.library.opcheck(rms_norm_forward.op, (x, residual, weight, 1e-6))
    torch.library.opcheck(rms_norm_forward.op, (x, None, weight, 1e-6))
    torch.library.opcheck(rms_norm_backward.op, (y, residual, total, weight, rstd))
    torch.library.opcheck(rms_norm_backward.op, (y, None, total, weight, rstd))


@pytest.mark.parametrize("machine", EXACT)
def test_rows_beyond_32_bit_offsets(machine: Machine) -> None:
    # Memory that is never touched is never committed: the rows lie 2^30 elements apart.
    x = torch.empty(3 * 2**30 + 8, dtype=torch.float16, device=machine.device).as_strided((4, 8), (2**30, 1))
    x.copy_(torch.randn(4, 8))
    weight = torch.randn(8).to(x)
    y = kernels.rms_norm(x, weight, backend="triton")
    assert torch.equal(y, kernels.rms_norm(x.contiguous(), weight, backend="triton"))


@pytest.mark.parametrize("machine", TRITON)
def test_a_row_that_no_program_holds_is_refused_by_name(machine: Machine) -> None:
    with pytest.raises(RuntimeError, match=f"width {MAX_WIDTH + 1} is above {MAX_WIDTH}"):
        kernels.rms_norm(machine.randn(1, MAX_WIDTH + 1), machine.randn(MAX_WIDTH + 1), backend="triton")


@pytest.mark.parametrize("machine", EXACT)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("axis=1) / d + eps)", "axis=1) / d)"),
        ("axis=1) / d + eps)", "axis=1) / BLOCK_D + eps)"),
        ("inverse[:, None] * w[None, :]", "inverse[:, None]"),
        ("share += tl.sum", "share = tl.sum"),
        ("values += tl.load(dtotal", "values -= tl.load(dtotal"),
        ("tl.num_programs(0) * ROWS)", "tl.num_programs(0) * ROWS * 2)"),
        ("dnormal * normal, axis=1) / d", "dnormal, axis=1) / d"),
        ("row % heads * inner_stride\n    values", "row % heads\n    values"),
    ],
)
def test_a_changed_kernel_disagrees(machine: Machine, old: str, new: str, tmp_path: Path) -> None:
    x, residual, weight = machine.randn(150, 2, 40)[..., :20], machine.randn(150, 2, 20), machine.randn(20)
    module = mutated("rms_norm", old, new, tmp_path)
    # So that each program of backward has several groups of rows, also on a GPU with a hundred processors.
    vars(module)["processors"] = lambda device: 1
    results = parity(machine, x, residual, weight, 0.1, module)
    assert not all(result.agrees for result in results)


def test_shapes_that_do_not_fit_are_refused() -> None:
    """A kernel would read past the end of a shorter weight or residual."""
    x = torch.zeros(3, 8)
    with pytest.raises(ValueError, match=r"kernels\.rms_norm: .*\[3, 8\] and weight \[D\] \[7\] do not fit"):
        kernels.rms_norm(x, torch.ones(7))
    with pytest.raises(ValueError, match=r"kernels\.add_rms_norm: .*\[1\] do not fit"):
        kernels.add_rms_norm(x, x, torch.ones(1))
    with pytest.raises(ValueError, match=r"x \[3, 8\] and residual \[8\] differ in shape"):
        kernels.add_rms_norm(x, torch.zeros(8), torch.ones(8))
