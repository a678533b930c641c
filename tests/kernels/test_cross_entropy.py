"""Cross-entropy of logits: the reference against torch's own, backends and in-place kernels against the reference."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from losses import ALONE_AND_IN_PAIRS, SETTINGS, any_strides, targets
from machines import CPU, CUDA, EVERYWHERE, EXACT, INTERPRETER, ONE_DTYPE, TRITON, Machine
from mutation import mutated
from torch import Tensor

import kernels
from kernels import reference
from kernels.cross_entropy import Options, cross_entropy_gradient, cross_entropy_in_place, cross_entropy_loss
from kernels.launch import ARCHITECTURES, force_tile, rows
from kernels.parity import Parity, check, compare, disagreements

TOGETHER = {"z_loss": 0.01, "reduction": "none"}
HELD, REREAD = ({"HELD": held, "BLOCK_V": 1024, "num_warps": 4} for held in (1, 0))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def in_place(overwrite: Callable[..., Tensor] = cross_entropy_in_place) -> Callable[..., Tensor]:
    """cross_entropy for reduction "none", by the kernel that writes the gradient over its logits: copies, here."""

    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits, target, options):
            ctx.save_for_backward(logits, target)
            ctx.options = options
            return overwrite(logits.clone(), target, None, *options)[0]

        @staticmethod
        def backward(ctx, dloss):
            logits, target = ctx.saved_tensors
            gradient = logits.clone()
            overwrite(gradient, target, dloss, *ctx.options)
            return gradient, None, None

    def call(logits, target, *, vocab_size=None, ignore_index=-100, z_loss=0.0, reduction="none"):
        assert reduction == "none"
        options = Options(vocab_size or logits.shape[1], ignore_index, z_loss)
        return InPlace.apply(logits, target, options)

    return call


def parity(
    function: Callable[..., Tensor], logits: Tensor, target: Tensor, gradient_layout=torch.clone, **options
) -> list[Parity]:
    target = target.to(logits.device)
    return check(
        partial(function, target=target, **options),
        partial(reference.cross_entropy, target=target, **options),
        [logits],
        rows={"output 0": max(1, logits.shape[0])},
        gradient_layout=gradient_layout,
    )


def assert_parity(*arguments, **options) -> None:
    results = parity(*arguments, **options)
    assert all(result.agrees for result in results), disagreements(results)


def public(machine: Machine) -> Callable[..., Tensor]:
    return partial(kernels.cross_entropy, backend=machine.backend)


def losses_and_gradient(function: Callable[..., Tensor], logits: Tensor, target: Tensor, **options):
    """(loss of each row, gradient of their sum)."""
    logits = logits.detach().clone().requires_grad_()
    loss = function(logits, target.to(logits.device), reduction="none", **options)
    loss.sum().backward()
    return loss.detach(), logits.grad


@contextmanager
def form_of(machine: Machine, form: str) -> Iterator[Callable[..., Tensor]]:
    """cross_entropy as the public function, or in place with its kernel for rows that are held or that are reread."""
    if form == "public":
        yield public(machine)
    else:
        with force_tile("cross_entropy.in_place", HELD if form == "held" else REREAD):
            yield in_place()


@pytest.mark.parametrize("vocab_size", [None, 31])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_reference_is_torchs_own_plus_the_z_loss(vocab_size: int | None, z_loss: float, ignored: str) -> None:
    logits, target = torch.randn(10, 40, dtype=torch.float64), targets(10, 31, ignored)
    kept = logits[:, :vocab_size]
    each = F.cross_entropy(kept, target, reduction="none")
    each = each + z_loss * kept.exp().sum(-1).log().square() * (target != -100)
    for reduction, expected in (
        ("none", each),
        ("sum", each.sum()),
        ("mean", each.sum() / (target != -100).sum()),
    ):
        ours = reference.cross_entropy(
            logits,
            target,
            vocab_size=vocab_size,
            z_loss=z_loss,
            reduction=reduction,
        )
        torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.parametrize("machine", EVERYWHERE)
@pytest.mark.parametrize("options", ALONE_AND_IN_PAIRS, ids=str)
def test_options_alone_and_in_pairs(machine: Machine, options: dict) -> None:
    assert_parity(public(machine), machine.randn(7, 40), targets(7, 31), **options)


@pytest.mark.parametrize("machine", TRITON)
@pytest.mark.parametrize("options", [o for o in ALONE_AND_IN_PAIRS if o.get("reduction") == "none"], ids=str)
@pytest.mark.parametrize("form", ["held", "reread"])
def test_options_of_the_kernels_in_place(machine: Machine, form: str, options: dict) -> None:
    with form_of(machine, form) as function:
        assert_parity(function, machine.randn(5, 40), targets(5, 31), **options)


SIZES = [(0, 31), (1, 1000), (3, 32000), (2, 50257), (2, 50304)]
MANY_ROWS = [(127, 31), (128, 31), (129, 31)]
WIDE = [(2, 128256), (2, 151936)]


@pytest.mark.parametrize(
    ("machine", "n_rows", "v"),
    [
        pytest.param(*machine.values, *size, id=f"{machine.id}-{size}", marks=machine.marks)
        for machines, sizes in (
            (CPU, SIZES + MANY_ROWS),
            (INTERPRETER, SIZES + WIDE[1:]),
            (INTERPRETER[:1], [(33, 31)]),
            (CUDA, SIZES + MANY_ROWS + WIDE + [(300, 50304)]),
        )
        for machine in machines
        for size in sizes
    ],
)
def test_sizes(machine: Machine, n_rows: int, v: int) -> None:
    logits, target = machine.randn(n_rows, v), targets(n_rows, v - 1)
    assert_parity(public(machine), logits, target, vocab_size=v - 1, **TOGETHER)
    if machine.backend == "triton":
        assert_parity(in_place(), logits, target, vocab_size=v - 1, **TOGETHER)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_common_vocabularies_are_held_in_registers(architecture: str) -> None:
    """One read and one write: a held row is loaded as a whole before any of it is written."""

    def held(element_bytes: int, v: int) -> int:
        table = rows("cross_entropy.in_place", architecture)
        return next(row for row in table if row["bytes"] == element_bytes and (row["width"] or v) >= v)["HELD"]

    # On an H200 two passes are faster, because the second one reads the cache.
    assert held(2, 32000) == (architecture != "sm_90")
    assert held(4, 32000)
    assert held(2, 50304) == (architecture in ("sm_80", "sm_86", "sm_89"))  # it spills on Blackwell
    assert not held(2, 128256)


@pytest.mark.parametrize("machine", EVERYWHERE)
@any_strides
def test_any_strides_of_logits_and_gradients(machine: Machine, layout) -> None:
    assert_parity(public(machine), layout(machine.randn(5, 24)), targets(5, 24), layout, reduction="none")


@pytest.mark.parametrize("machine", TRITON)
@pytest.mark.parametrize("form", ["held", "reread"])
def test_in_place_writes_nothing_between_rows_that_lie_apart(machine: Machine, form: str) -> None:
    whole = machine.randn(5, 64)
    before, target = whole.clone(), targets(5, 24).to(whole.device)
    with form_of(machine, form):
        cross_entropy_in_place(whole[:, 8:32], target, None, 24, -100, 0.0)
    assert torch.equal(whole[:, :8], before[:, :8])
    assert torch.equal(whole[:, 32:], before[:, 32:])
    logits = before[:, 8:32].clone().requires_grad_()
    kernels.cross_entropy(logits, target, reduction="sum", backend="torch").backward()
    assert compare("logits", whole[:, 8:32], logits.grad, logits.grad, logits.grad, gradient=True).agrees


@pytest.mark.parametrize(
    ("machine", "form"),
    [pytest.param(*m.values, "public", id=f"{m.id}-public", marks=m.marks) for m in EVERYWHERE]
    + [pytest.param(*m.values, f, id=f"{m.id}-{f}", marks=m.marks) for m in TRITON for f in ("held", "reread")],
)
def test_logits_far_from_zero(machine: Machine, form: str) -> None:
    far = 6e4 if machine.dtype == torch.float16 else 1e4
    logits = (machine.randn(4, 300).float() + torch.tensor([[far], [-far], [0], [0]], device=machine.device)).to(
        machine.dtype
    )
    logits[3, ::2], logits[3, 1::2] = far, -far
    target = targets(4, 300, "none")
    # Naive torch overflows in fp16, so the reference measures the error that is allowed.
    with form_of(machine, form) as function:
        actual = losses_and_gradient(function, logits, target)
    same = losses_and_gradient(reference.cross_entropy, logits, target)
    exact = losses_and_gradient(reference.cross_entropy, logits.double(), target)
    for name, got, rounded, wanted in zip(("loss", "gradient"), actual, same, exact, strict=True):
        result = compare(name, got, rounded, rounded, wanted, gradient=name == "gradient")
        assert result.agrees, result


@pytest.mark.parametrize("machine", EXACT)
@pytest.mark.parametrize("form", ["public", "held", "reread"])
def test_a_shift_of_all_logits_costs_no_accuracy(machine: Machine, form: str) -> None:
    """Why lse is kept in two parts: in one, its rounding at 8192 would be in every probability."""
    logits = (machine.randn(4, 300) * 256).round() / 256  # so that adding 8192 is exact
    target = targets(4, 300, "none")
    with form_of(machine, form) as function:
        _, shifted = losses_and_gradient(function, logits + 8192, target)
    _, unshifted = losses_and_gradient(reference.cross_entropy, logits, target)
    _, exact = losses_and_gradient(reference.cross_entropy, logits.double(), target)
    result = compare("gradient", shifted, unshifted, unshifted, exact, gradient=True)
    assert result.agrees, result


@pytest.mark.parametrize("machine", TRITON)
@pytest.mark.parametrize("form", ["public", "held", "reread"])
@pytest.mark.parametrize("nothing", [float("nan"), float("inf"), float("-inf")])
def test_what_takes_no_part_may_be_anything(machine: Machine, form: str, nothing: float) -> None:
    logits, target = machine.randn(6, 24), targets(6, 20)
    dirty = logits.clone()
    dirty[:, 20:] = nothing
    dirty[1::3] = nothing
    with form_of(machine, form) as function:
        clean, loss_and_gradient = (losses_and_gradient(function, x, target, vocab_size=20) for x in (logits, dirty))
    for got, expected in zip(loss_and_gradient, clean, strict=True):
        assert torch.equal(got, expected)
        assert not got[1::3].any()
    assert not got[:, 20:].any()
    assert got[0, :20].all()


@pytest.mark.parametrize("machine", EXACT)
@pytest.mark.parametrize("form", ["public", "held", "reread"])
def test_a_logit_of_minus_infinity_has_probability_zero(machine: Machine, form: str) -> None:
    logits = machine.randn(3, 24)
    kept = torch.cat((logits[:, :5], logits[:, 9:]), 1)
    logits[:, 5:9] = float("-inf")
    with form_of(machine, form) as function:
        loss, gradient = losses_and_gradient(function, logits, torch.tensor([0, 10, 23]))
        expected_loss, expected = losses_and_gradient(function, kept, torch.tensor([0, 6, 19]))
    assert not gradient[:, 5:9].any()
    gradient = torch.cat((gradient[:, :5], gradient[:, 9:]), 1)
    assert compare("loss", loss, expected_loss, expected_loss, expected_loss).agrees
    assert compare("gradient", gradient, expected, expected, expected, gradient=True).agrees


@pytest.mark.parametrize("machine", EXACT)
@pytest.mark.parametrize("form", ["public", "held", "reread"])
def test_not_a_number_reaches_the_loss(machine: Machine, form: str) -> None:
    logits, target = machine.randn(4, 24), torch.tensor([1, 24, -1, 3])
    logits[0, 7] = float("nan")
    with form_of(machine, form) as function:
        loss, _ = losses_and_gradient(function, logits, target)
    assert loss.isnan().tolist() == [True, True, True, False]  # a NaN logit, and targets beyond the vocabulary


@pytest.mark.parametrize("machine", EXACT)
@pytest.mark.parametrize("form", ["held", "reread"])
def test_without_a_factor_it_is_one(machine: Machine, form: str) -> None:
    first, target = machine.randn(3, 24), targets(3, 24).to(machine.device)
    second = first.clone()
    with form_of(machine, form):
        for logits, factor in ((first, None), (second, torch.ones(3, device=machine.device))):
            cross_entropy_in_place(logits, target, factor, 24, -100, 0.01)
    assert torch.equal(first, second)


@pytest.mark.parametrize("machine", ONE_DTYPE)
@pytest.mark.parametrize(("reduction", "value"), [("sum", 0.0), ("mean", float("nan"))])
def test_no_target_at_all_is_a_sum_of_zero_and_a_mean_of_nan_with_gradient_zero(
    machine: Machine, reduction: str, value: float
) -> None:
    logits = machine.randn(5, 7).requires_grad_()
    target = targets(5, 7, "all").to(machine.device)
    ours = public(machine)(logits, target, reduction=reduction)
    torchs = F.cross_entropy(logits.detach(), target, reduction=reduction)
    for loss in (ours, torchs):
        torch.testing.assert_close(loss.detach().cpu(), torch.tensor(value), equal_nan=True)
    ours.backward()
    assert not logits.grad.any()


@pytest.mark.parametrize("machine", EVERYWHERE)
@pytest.mark.parametrize("ignored", ["none", "all"])
def test_ignored_rows(machine: Machine, ignored: str) -> None:
    assert_parity(public(machine), machine.randn(4, 9), targets(4, 9, ignored), reduction="sum")


@pytest.mark.parametrize("machine", ONE_DTYPE)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_another_ignore_index(machine: Machine, reduction: str) -> None:
    logits, target = machine.randn(9, 20), targets(9, 20, "some", ignore_index=3).to(machine.device)
    torch.testing.assert_close(
        public(machine)(logits, target, ignore_index=3, reduction=reduction),
        F.cross_entropy(logits, target, ignore_index=3, reduction=reduction),
    )
    assert_parity(public(machine), logits, target, ignore_index=3, reduction=reduction)


@pytest.mark.parametrize("machine", ONE_DTYPE)
def test_backward_may_run_twice(machine: Machine) -> None:
    logits = machine.randn(4, 9).requires_grad_()
    loss = public(machine)(logits, targets(4, 9).to(machine.device))
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("options", ALONE_AND_IN_PAIRS, ids=str)
def test_gradcheck(options: dict) -> None:
    logits, target = torch.randn(5, 33, dtype=torch.float64, requires_grad=True), targets(5, 31)
    for function in (reference.cross_entropy, kernels.cross_entropy):
        assert torch.autograd.gradcheck(lambda z, f=function: f(z, target, **options), (logits,), fast_mode=True)


@pytest.mark.parametrize("machine", EXACT)
def test_registered_ops_pass_opcheck(machine: Machine) -> None:
    logits, target = machine.randn(3, 24), targets(3, 20).to(machine.device)
    options = (20, -100, 0.01)
    loss, lse, lse_low = cross_entropy_loss(logits, target, *options)
    torch.library.opcheck(cross_entropy_loss.op, (logits, target, *options))
    torch.library.opcheck(cross_entropy_gradient.op, (loss, logits, target, lse, lse_low, *options))
    for factor in (None, loss):
        torch.library.opcheck(cross_entropy_in_place.op, (logits.clone(), target, factor, *options))


@pytest.mark.parametrize("machine", ONE_DTYPE)
@pytest.mark.parametrize("options", [*({key: value} for key, value in SETTINGS), {"ignore_index": 3}], ids=str)
def test_compiled_whole_it_is_the_same(machine: Machine, options: dict) -> None:
    torch.compiler.reset()
    target = targets(4, 31, ignore_index=options.get("ignore_index", -100)).to(machine.device)
    function = partial(public(machine), target=target, **options)
    logits = machine.randn(4, 40)
    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        loss = run(leaf)
        loss.sum().backward()
        results.append((loss.detach(), leaf.grad))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize("machine", EXACT)
@pytest.mark.parametrize("form", ["loss", "public", "held", "reread"])
def test_rows_beyond_32_bit_offsets(machine: Machine, form: str) -> None:
    # Memory that is never touched is never committed: the rows lie 2^30 elements apart.
    apart = torch.empty(3 * 2**30 + 8, dtype=torch.float16, device=machine.device).as_strided((4, 8), (2**30, 1))
    logits, target = torch.randn(4, 8).to(apart), torch.tensor([0, 3, -100, 7], device=machine.device)
    apart.copy_(logits)
    options = (8, -100, 0.0)
    statistics = cross_entropy_loss(logits, target, *options)
    if form == "loss":
        for got, expected in zip(cross_entropy_loss(apart, target, *options), statistics, strict=True):
            assert torch.equal(got, expected)
    elif form == "public":
        assert torch.equal(
            *(cross_entropy_gradient(statistics[0], x, target, *statistics[1:], *options) for x in (apart, logits))
        )
    else:
        with form_of(machine, form):
            assert torch.equal(*(cross_entropy_in_place(x, target, None, *options)[0] for x in (apart, logits)))
        assert torch.equal(apart.contiguous(), logits)


@pytest.mark.parametrize("machine", EXACT)
@pytest.mark.parametrize(
    ("form", "old", "new"),
    [
        ("public", "row = tl.program_id(0).to(tl.int64)\n    label", "row = tl.program_id(0) * 0\n    label"),
        ("public", "valid = label != ignore_index\n    known", "valid = label == label\n    known"),
        ("public", "valid = label != ignore_index\n    row_lse", "valid = label == label\n    row_lse"),
        ("public", "return lse, (maximum - lse) + log_total", "return -lse, (maximum - lse) + log_total"),
        ("public", "+ z_loss * lse * lse", "+ z_loss * lse"),
        ("public", "(1.0 + 2.0 * z_loss * lse)", "(1.0 + z_loss * lse)"),
        ("public", "tl.where(valid, factor, 0.0)", "tl.where(valid, 1.0, 0.0)"),
        ("public", "tl.where(column == label, c, 0.0)\n    gradient = tl.where(column < vocab_size", None),
        ("public", 'tl.where(column < vocab_size, values, float("-inf")), VECTOR)', None),
        ("public", "total = total * tl.exp(peak - higher) +", "total = total +"),
        ("public", "column = tl.program_id(1) * BLOCK_V", "column = tl.program_id(1) * BLOCK_V // 2"),
        ("reread", "tl.where(column < vocab_size, a * tl.exp", None),
        ("reread", "range(0, columns, BLOCK_V)", "range(0, columns - BLOCK_V, BLOCK_V)"),
        ("reread", "a * tl.exp(target_logit - lse) - c", "a * tl.exp(target_logit - lse)"),
        ("held", "column = i * BLOCK_V + tl.arange(0, BLOCK_V)\n        # Loads", None),
        ("held", 'values = tl.where(column < vocab_size, values, float("-inf"))\n', None),
        ("held", "total += tl.sum(_by_vector(tl.exp(blocks[i]", "total += tl.sum(_by_vector(tl.exp(blocks[0]"),
        ("held", "tl.store(pointers + i * BLOCK_V, gradient", "tl.store(pointers, gradient"),
        ("held", "a * tl.exp(blocks[i].to", "tl.exp(blocks[i].to"),
    ],
)
def test_a_changed_kernel_disagrees(machine: Machine, form: str, old: str, new: str | None, tmp_path: Path) -> None:
    changes = {"< vocab_size": "<= vocab_size", "i * BLOCK_V +": "i * BLOCK_V + 1 +"}
    if new is None:
        [(wrong, right)] = [(a, b) for a, b in changes.items() if old.count(a) == 1]
        new = old.replace(wrong, right)
    logits, target = machine.randn(3, 40), torch.tensor([38, -100, 5])
    logits[0] += 3
    tiles = {"public": ("cross_entropy.gradient", {"BLOCK_V": 16, "num_warps": 4})}
    kernel, tile = tiles.get(form, ("cross_entropy.in_place", {"HELD": form == "held", "BLOCK_V": 16, "num_warps": 4}))
    with force_tile(kernel, tile), force_tile("cross_entropy.loss", {"BLOCK_V": 16, "num_warps": 4}):
        module = mutated("cross_entropy", old, new, tmp_path)
        function = (
            partial(module.cross_entropy, backend="triton")
            if form == "public"
            else in_place(module.cross_entropy_in_place)
        )
        results = parity(function, logits, target, vocab_size=39, **TOGETHER)
    assert not all(result.agrees for result in results)


@pytest.mark.parametrize(
    "call",
    [
        lambda: kernels.cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), reduction="average"),
        lambda: kernels.cross_entropy(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long)),
        lambda: kernels.cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), vocab_size=4),
        lambda: cross_entropy_in_place(torch.zeros(3, 2).T, torch.zeros(2, dtype=torch.long), None, 3, -100, 0.0),
    ],
)
def test_what_cannot_be_computed_is_refused(call) -> None:
    with pytest.raises(ValueError, match=r"kernels\.cross_entropy"):
        call()
