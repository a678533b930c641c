"""The C++ of csrc/cpu/, beyond the tests of each op, which compare it with the reference implementation."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kernels
from kernels import cpu, reference
from kernels.attention import attention_backward, attention_forward
from kernels.cross_entropy import cross_entropy_in_place
from kernels.parity import check, disagreements
from kernels.rms_norm import rms_norm_backward, rms_norm_forward
from kernels.rope import rope_rotate
from kernels.swiglu import swiglu_backward, swiglu_forward

HERE = Path(__file__).parent
DIRECTIONS = ("forward", "backward")
FILES = ("attention", "rms_norm", "rope", "swiglu", "linear_cross_entropy")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def documents(b: int, s: int, density: float) -> Tensor:
    begins = torch.rand(b, s) < density
    return torch.where(begins, torch.arange(s, dtype=torch.int32), 0).cummax(1).values


def calls(dtype: torch.dtype) -> dict[str, tuple[Callable[..., Tensor | tuple[Tensor, ...]], list[Tensor]]]:
    """Each op at a size of several units of work, with its inputs."""
    packed = torch.randn(2, 150, 8, 48, dtype=dtype)
    target = torch.randint(-1, 301, (90,))
    return {
        "attention": (partial(kernels.attention, doc_start=documents(2, 150, 0.03)), list(packed.split((4, 2, 2), 2))),
        "rms_norm": (kernels.rms_norm, [packed, torch.randn(48, dtype=dtype)]),
        "add_rms_norm": (
            kernels.add_rms_norm,
            [*torch.randn(2, 150, 70, dtype=dtype), torch.randn(70, dtype=dtype)],
        ),
        "rope": (
            lambda q, k: kernels.rope(q, k, *kernels.rope_cos_sin(3, 150, 48, 1e4)),
            list(packed.split((6, 2), 2)),
        ),
        "norm_rope": (
            lambda qkv, *weights: kernels.norm_rope(qkv, *weights, *kernels.rope_cos_sin(3, 150, 48, 1e4), n_heads=4),
            [packed.flatten(2), *torch.randn(2, 48, dtype=dtype)],
        ),
        "swiglu": (kernels.swiglu, [torch.randn(100, 90, dtype=dtype)]),
        "cross_entropy": (
            partial(kernels.cross_entropy, target=target, ignore_index=-1, vocab_size=301),
            [torch.randn(90, 320, dtype=dtype)],
        ),
        "linear_cross_entropy": (
            partial(kernels.linear_cross_entropy, target=target, ignore_index=-1, vocab_size=301, chunk_rows=40),
            [torch.randn(90, 16, dtype=dtype), torch.randn(320, 16, dtype=dtype)],
        ),
    }


OPS = pytest.mark.parametrize("op", calls(torch.float32))


def run(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = function(*leaves)
    outputs = result if isinstance(result, tuple) else (result,)
    generator = torch.Generator().manual_seed(1)
    behind = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, behind)]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_it_is_built_and_computes_fp32_and_bf16_alone() -> None:
    assert cpu.BUILT
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert cpu.covers(torch.zeros(2, dtype=dtype)) == (dtype in cpu.DTYPES)
    assert not cpu.covers(torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16))
    assert not cpu.covers(torch.zeros(2, device="meta"))


@OPS
@DTYPES
@pytest.mark.parametrize("backend", ["auto", "cpp", "torch"])
def test_every_op_runs_in_it_but_where_torch_is_asked_for(
    op: str, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []

    def watched(name: str, function: Callable) -> Callable:
        return lambda *arguments: (called.append(name), function(*arguments))[1]

    both = [f"{name}_{direction}" for name in ("attention", "swiglu", "rms_norm") for direction in DIRECTIONS]
    for name in (*both, "rope", "cross_entropy_in_place"):
        monkeypatch.setattr(cpu, name, watched(name, getattr(cpu, name)))
    with kernels.dispatch.using(backend):
        run(*calls(dtype)[op])
    expected = {
        "rope": ["rope", "rope"],
        "norm_rope": ["rms_norm_forward"] * 2 + ["rope"] * 2 + ["rms_norm_backward"] * 2,
        "cross_entropy": ["cross_entropy_in_place"] * 2,
        "linear_cross_entropy": ["cross_entropy_in_place"] * 3,
        "add_rms_norm": ["rms_norm_forward", "rms_norm_backward"],
    }
    assert called == ([] if backend == "torch" else expected.get(op, [f"{op}_forward", f"{op}_backward"]))


@OPS
@DTYPES
def test_no_bit_depends_on_the_number_of_threads(op: str, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    function, inputs = calls(dtype)[op]
    if op == "linear_cross_entropy":  # its products are torch's own
        logits, target = torch.randn(90, 320, dtype=dtype), torch.randint(301, (90,))

        def function() -> tuple[Tensor, Tensor]:
            gradient = logits.clone()
            return cross_entropy_in_place(gradient, target, None, 301, -1, 0.01)[0], gradient

        results = [(threads(n), function())[1] for n in (1, 2, 5)]
    else:
        results = [(threads(n), run(function, inputs))[1] for n in (1, 2, 5)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", ["portable", "avx2"])
def test_every_instruction_set_agrees_with_the_reference(instruction_set: str) -> None:
    files = [HERE / f"test_{name}.py" for name in FILES]
    chosen = "cpp and (agree_with_the_reference or sizes)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", chosen, *files]
    environment = os.environ | {"LLM_INSTRUCTION_SET": instruction_set}
    if cannot := _refused(instruction_set):
        pytest.skip(cannot)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parent.parent)
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 100


def _refused(instruction_set: str) -> str | None:
    """Why this machine cannot run it."""
    program = "import torch, kernels; kernels.swiglu(torch.zeros(1, 2))"
    environment = os.environ | {"LLM_INSTRUCTION_SET": instruction_set}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=HERE.parent.parent
    )
    return done.stderr.splitlines()[-1] if done.returncode else None


def test_an_instruction_set_that_is_not_there_is_refused_by_name() -> None:
    message = _refused("avx1024")
    assert message is not None
    assert message.startswith("ValueError: LLM_INSTRUCTION_SET=avx1024: this machine has portable")


@DTYPES
@pytest.mark.parametrize("seed", range(6))
def test_tiles_that_any_documents_cut(dtype: torch.dtype, seed: int) -> None:
    """Tiles and groups of them are skipped, cut and full; rows begin in an earlier document or with padding, and end
    within a tile.
    """
    generator = torch.Generator().manual_seed(seed)
    sq, ahead, padding = (int(torch.randint(n, (), generator=generator)) for n in (700, 90, 40))
    sq, sk = sq + cpu_queries(), sq + cpu_queries() + ahead
    rows = []
    for density in (0.0, 0.01, 0.2):
        begins = torch.rand(sk, generator=generator) < density
        starts = torch.where(begins, torch.arange(sk), 0).cummax(0).values[ahead:]
        rows.append(starts.clamp(min=padding).int())
    leaves = [torch.randn(3, n, h, 32, dtype=dtype) for n, h in ((sq, 4), (sk, 2), (sk, 2))]
    results = check(
        partial(kernels.attention, doc_start=torch.stack(rows)),
        partial(reference.attention, doc_start=torch.stack(rows)),
        leaves,
        rows={"gradient 1": sq, "gradient 2": sq},
    )
    assert all(result.agrees for result in results), disagreements(results)


def cpu_queries() -> int:
    from kernels.attention import CPU_QUERIES

    return CPU_QUERIES


def test_tiles_of_other_documents_are_never_read() -> None:
    """Not even as a product with zero: NaN in the queries, keys and values of one document stays there."""
    doc_start = torch.tensor([0] * 64 + [64] * 128 + [192] * 58, dtype=torch.int32)[None]
    clean = [torch.randn(1, 250, h, 32) for h in (2, 1, 1, 2)]
    poisoned = [x.clone() for x in clean]
    for x in poisoned:
        x[:, 64:192] = torch.nan
    results = []
    for q, k, v, dout in (clean, poisoned):
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = kernels.attention(*leaves, doc_start=doc_start)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, dout)])
    for ours, theirs in zip(*results, strict=True):
        assert theirs[:, 64:192].isnan().all()
        assert torch.equal(ours[:, :64], theirs[:, :64])
        assert torch.equal(ours[:, 192:], theirs[:, 192:])


@DTYPES
def test_nan_and_infinity_reach_the_result(dtype: torch.dtype) -> None:
    x = torch.randn(5, 40, dtype=dtype)
    x[1, 3], x[2, 33], x[3, 7] = torch.nan, torch.inf, -torch.inf
    ones = torch.ones(40, dtype=dtype)
    for ours, expected in (
        (kernels.swiglu(x, x), reference.swiglu(x, x)),
        (kernels.rms_norm(x, ones), reference.rms_norm(x, ones)),
    ):
        assert torch.equal(ours.isnan(), expected.isnan())
        assert torch.equal(ours.isinf(), expected.isinf())
    logits = x.clone()
    loss, _ = cross_entropy_in_place(logits, torch.tensor([0, 0, 0, 7, 0]), None, 40, -100, 0.0)
    assert loss.isfinite().tolist() == [True, False, False, False, True]
    q = x[:, None, None, :32].transpose(0, 1).repeat(1, 4, 1, 1)
    assert kernels.attention(q, q, q)[0, 1].isnan().any()


def test_the_exponential_is_exact_to_a_few_units() -> None:
    gate = torch.linspace(-87, 87, 400_001)
    exact = torch.sigmoid(gate.double())
    ours = kernels.swiglu(gate / gate.abs().clamp(min=1e-3), torch.ones_like(gate))
    assert ours.isfinite().all()
    silu = kernels.swiglu(gate, torch.ones_like(gate)).double()
    assert ((silu - gate * exact).abs() <= 1e-5 * (gate * exact).abs() + 1e-37).all()
    near = gate.abs() < 10  # where a rounding of x log2(e) is small beside the result's own
    assert ((silu - gate * exact).abs() <= 2e-6 * (gate * exact).abs())[near].all()


@DTYPES
def test_rounding_to_bf16_is_torchs(dtype: torch.dtype) -> None:
    """Ties go to even; every finite result is the nearest number."""
    cos, sin = torch.ones(1, 512), torch.zeros(1, 512)
    x = torch.randn(1, 1, 1, 1024)
    angles = torch.full_like(cos, 1.0 + 2**-8)
    turned, _ = kernels.rope(x.to(dtype), x.to(dtype), angles, sin)
    expected, _ = reference.rope(x.to(dtype), x.to(dtype), angles, sin)
    assert torch.equal(turned, expected)
    assert torch.equal(kernels.rope(x.to(dtype), x.to(dtype), cos, sin)[0], x.to(dtype))


def test_a_target_outside_the_vocabulary_is_an_index_error() -> None:
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(16, 8)
    for wrong in (-1, 12, 16):
        with pytest.raises(IndexError, match=f"target {wrong} of row 1 is not in 0 .. 11"):
            kernels.linear_cross_entropy(x, weight, torch.tensor([0, wrong, 5]), vocab_size=12)


def test_documents_targets_and_angles_of_another_dtype_mean_the_same() -> None:
    q, k, v = (torch.randn(1, 40, h, 16) for h in (2, 1, 1))
    doc_start = documents(1, 40, 0.1)
    expected = kernels.attention(q, k, v, doc_start=doc_start)
    assert torch.equal(kernels.attention(q, k, v, doc_start=doc_start.long()), expected)
    cos, sin = kernels.rope_cos_sin(0, 40, 16, 1e4)
    for wide, narrow in zip(kernels.rope(q, k, cos.double(), sin.double()), kernels.rope(q, k, cos, sin), strict=True):
        assert torch.equal(wide, narrow)
    results = []
    for dtype in (torch.int64, torch.int32):
        logits = q.flatten(0, 2).clone()
        target = torch.arange(80).remainder(16).to(dtype)
        results.append((cross_entropy_in_place(logits, target, None, 16, -100, 0.0)[0], logits))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_slice_of_wider_logits_is_written_in_place() -> None:
    wide = torch.randn(6, 50)
    before, target = wide.clone(), torch.randint(40, (6,))
    loss, _ = cross_entropy_in_place(wide[:, :40], target, None, 40, -100, 0.0)
    leaf = before[:, :40].clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf, target, reduction="none")
    expected.sum().backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(wide[:, :40], leaf.grad)
    assert torch.equal(wide[:, 40:], before[:, 40:])


def test_registered_ops_pass_opcheck() -> None:
    q, k, v = (torch.randn(1, 20, h, 16) for h in (2, 1, 1))
    doc_start = documents(1, 20, 0.2)
    out, lse = attention_forward(q, k, v, doc_start, True, 0.25)
    opcheck = torch.library.opcheck
    opcheck(attention_forward.op, (q, k, v, doc_start, True, 0.25))
    opcheck(attention_backward.op, (out, q, k, v, out, lse, doc_start, None, True, 0.25))
    x, weight = torch.randn(6, 10), torch.randn(10)
    opcheck(rms_norm_forward.op, (x, x.flip(0), weight, 1e-6))
    opcheck(rms_norm_backward.op, (x, None, x, weight, torch.ones(6)))
    opcheck(swiglu_forward.op, (x, None))
    opcheck(swiglu_backward.op, (torch.randn(6, 5), x, None))
    opcheck(rope_rotate.op, (q, k, *kernels.rope_cos_sin(0, 20, 16, 1e4), True))
    opcheck(cross_entropy_in_place.op, (x.clone(), torch.zeros(6, dtype=torch.long), None, 9, -100, 0.1))
