"""Attention: the reference against a loop over queries, the backends against the reference, and what no query sees."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from machines import CPU, CUDA, EVERYWHERE, EXACT, INTERPRETER, ONE_DTYPE, TRITON, Machine
from mutation import mutated
from torch import Tensor

import kernels
from kernels import reference
from kernels.attention import attention_backward, attention_forward
from kernels.launch import force_tile
from kernels.parity import Parity, check, disagreements


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# (B, Sq, Sk, Hq, Hkv, D)
SHAPES = {
    "one token": (1, 1, 1, 1, 1, 16),
    "decoding": (2, 1, 129, 4, 1, 32),
    "few against a cache": (1, 3, 130, 4, 2, 16),
    "long prefill against a cache": (1, 129, 200, 2, 1, 16),
    "MHA": (1, 65, 65, 3, 3, 16),
    "GQA 3:1": (1, 127, 127, 3, 1, 48),
    "GQA 4:1": (2, 128, 128, 8, 2, 16),
    "MQA, more than one query block": (1, 300, 300, 4, 1, 64),
    "head dimension 80": (1, 65, 65, 1, 1, 80),
    "head dimension 128": (1, 70, 70, 2, 1, 128),
}
SMALL = (1, 33, 70, 2, 1, 16)


def document_starts(lengths: list[int], b: int, sq: int, sk: int) -> Tensor:
    """doc_start of the last sq positions of rows of sk tokens, with documents of these lengths over and over."""
    starts: list[int] = []
    while len(starts) < sk:
        for length in lengths:
            starts += [len(starts)] * length
    return torch.tensor(starts[:sk][sk - sq :], dtype=torch.int32).repeat(b, 1)


DOCUMENTS = {
    "none": None,
    "of length 1": [1],
    "of 63, 64 and 65": [63, 64, 65],
    "of mixed lengths": [1, 5, 2, 40, 1],
    "a whole row": [10_000],
}


# What the interpreter has the time for.
PAIRS = [
    ("one token", "none"),
    ("decoding", "of mixed lengths"),
    ("few against a cache", "of 63, 64 and 65"),
    ("long prefill against a cache", "of 63, 64 and 65"),
    ("long prefill against a cache", "none"),
    ("MHA", "of length 1"),
    ("GQA 3:1", "of mixed lengths"),
    ("GQA 3:1", "a whole row"),
    ("head dimension 80", "none"),
    ("head dimension 128", "of mixed lengths"),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    b, sq, sk, hq, hkv, d = shape
    sizes = ((b, sq, hq, d), (b, sk, hkv, d), (b, sk, hkv, d))
    return [torch.randn(size).to(device, dtype) for size in sizes]


def parity(
    machine: Machine,
    leaves: list[Tensor],
    doc_start: Tensor | None = None,
    tiles: tuple[int, int] | None = None,
    attention=kernels.attention,
    gradient_layout=torch.clone,
    **options,
) -> list[Parity]:
    """Forward and backward against the reference, on tiles of the table or of (queries, keys)."""
    if doc_start is not None:
        options["doc_start"] = doc_start.to(machine.device)
    sq = leaves[0].shape[1]
    with on_tiles(tiles):
        return check(
            partial(attention, backend=machine.backend, **options),
            partial(reference.attention, **options),
            leaves,
            rows={"gradient 1": sq, "gradient 2": sq},
            gradient_layout=gradient_layout,
        )


def assert_parity(*arguments, **options) -> None:
    results = parity(*arguments, **options)
    assert all(result.agrees for result in results), disagreements(results)


def on_tiles(tiles: tuple[int, int] | None) -> ExitStack:
    stack = ExitStack()
    if tiles is not None:
        chosen = {"BLOCK_Q": tiles[0], "BLOCK_K": tiles[1], "num_warps": 4, "num_stages": 2}
        for kernel in ("forward", "decode", "dq", "dkdv"):
            stack.enter_context(force_tile(f"attention.{kernel}", chosen))
    return stack


def gradients(out: Tensor, dout: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def looped(q: Tensor, k: Tensor, v: Tensor, causal: bool, doc_start: Tensor | None, scale: float) -> Tensor:
    """The definition, one query at a time."""
    (b, sq, hq, _), (_, sk, hkv, _) = q.shape, k.shape
    out = torch.zeros_like(q)
    for row in range(b):
        for i in range(sq):
            first = 0 if doc_start is None else int(doc_start[row, i])
            end = sk - sq + i + 1 if causal else sk
            for head in range(hq):
                group = head // (hq // hkv)
                weights = torch.exp(scale * k[row, first:end, group] @ q[row, i, head])
                out[row, i, head] = weights @ v[row, first:end, group] / weights.sum()
    return out


@pytest.mark.parametrize("documents", [None, [1], [3, 1, 4]])
@pytest.mark.parametrize(("sq", "sk"), [(1, 1), (7, 7), (3, 9), (1, 6)])
@pytest.mark.parametrize(("hq", "hkv"), [(2, 2), (4, 1)])
def test_reference_is_the_definition(documents: list[int] | None, sq: int, sk: int, hq: int, hkv: int) -> None:
    q, k, v = inputs((2, sq, sk, hq, hkv, 16), torch.float64)
    doc_start = None if documents is None else document_starts(documents, 2, sq, sk)
    torch.testing.assert_close(
        reference.attention(q, k, v, doc_start=doc_start), looped(q, k, v, True, doc_start, 16**-0.5)
    )


def test_reference_without_causality_and_with_a_scale() -> None:
    q, k, v = inputs((2, 3, 5, 2, 1, 16), torch.float64)
    torch.testing.assert_close(reference.attention(q, k, v, causal=False, scale=0.3), looped(q, k, v, False, None, 0.3))


@pytest.mark.parametrize("machine", CPU + CUDA)
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_backends_agree_with_the_reference(machine: Machine, shape: str, documents: str) -> None:
    assert_agreement(machine, SHAPES[shape], documents)


@pytest.mark.parametrize("machine", INTERPRETER)
@pytest.mark.parametrize(("shape", "documents"), PAIRS)
def test_the_interpreter_agrees_with_the_reference(machine: Machine, shape: str, documents: str) -> None:
    assert_agreement(machine, SHAPES[shape], documents, tiles=(64, 64))


@pytest.mark.parametrize("machine", CUDA)
@pytest.mark.parametrize("d", [16, 32, 48, 64, 80, 96, 128, 160, 256])
def test_every_head_dimension(machine: Machine, d: int) -> None:
    assert_agreement(machine, (2, 513, 1025, 4, 2, d), "of 63, 64 and 65")


def assert_agreement(machine: Machine, shape: tuple[int, ...], documents: str, **options) -> None:
    b, sq, sk, *_ = shape
    lengths = DOCUMENTS[documents]
    doc_start = None if lengths is None else document_starts(lengths, b, sq, sk)
    assert_parity(machine, inputs(shape, machine.dtype, machine.device), doc_start, **options)


@pytest.mark.parametrize("machine", EVERYWHERE)
@pytest.mark.parametrize(
    "options",
    [{"causal": False}, {"scale": 0.3}, {"causal": False, "scale": 1.0}, {"scale": 0.3, "documents": [5, 40]}],
)
@pytest.mark.parametrize("shape", [SMALL, (1, 1, 70, 2, 1, 32)], ids=["small", "decoding"])
def test_options(machine: Machine, shape: tuple[int, ...], options: dict) -> None:
    b, sq, sk, *_ = shape
    options = dict(options)
    documents = options.pop("documents", None)
    doc_start = None if documents is None else document_starts(documents, b, sq, sk)
    assert_parity(machine, inputs(shape, machine.dtype, machine.device), doc_start, tiles=(32, 64), **options)


@pytest.mark.parametrize("machine", EXACT)
@pytest.mark.parametrize("tiles", [(16, 16), (16, 32), (32, 16)])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_blocks_that_any_documents_cut(machine: Machine, tiles: tuple[int, int], seed: int) -> None:
    """Small tiles, so that blocks are skipped, cut and full; rows begin in an earlier document or with padding."""
    generator = torch.Generator().manual_seed(seed)
    sq, ahead, padding = (int(torch.randint(n, (), generator=generator)) for n in (45, 20, 12))
    sq, sk = sq + 4, sq + 4 + ahead
    rows = []
    for density in (0.02, 0.3):
        begins = torch.rand(sk, generator=generator) < density
        starts = torch.where(begins, torch.arange(sk), 0).cummax(0).values[ahead:]
        rows.append(starts.clamp(min=padding + ahead).int())
    assert_parity(machine, inputs((2, sq, sk, 2, 1, 16), machine.dtype, machine.device), torch.stack(rows), tiles)


@pytest.mark.parametrize("machine", EXACT)
def test_blocks_of_other_documents_are_never_read(machine: Machine) -> None:
    """Not even as a product with zero: NaN in the queries, keys and values of one document stays there."""
    doc_start = document_starts([32, 32, 16], 1, 80, 80).to(machine.device)
    clean = inputs((1, 80, 80, 2, 1, 16), machine.dtype, machine.device)
    dout = machine.randn(1, 80, 2, 16)
    poisoned = [x.clone() for x in (*clean, dout)]
    for x in poisoned:
        x[:, 32:64] = torch.nan
    results = []
    with on_tiles((16, 16)):
        for *leaves, behind in ([*clean, dout], poisoned):
            leaves = [x.requires_grad_() for x in leaves]
            out = kernels.attention(*leaves, doc_start=doc_start, backend="triton")
            results.append(gradients(out, behind, leaves))
    for ours, theirs in zip(*results, strict=True):
        assert theirs[:, 32:64].isnan().all()
        assert torch.equal(ours[:, :32], theirs[:, :32])
        assert torch.equal(ours[:, 64:], theirs[:, 64:])


@pytest.mark.parametrize("machine", EVERYWHERE)
def test_a_shared_mask_changes_nothing(machine: Machine) -> None:
    leaves = [x.requires_grad_() for x in inputs(SMALL, machine.dtype, machine.device)]
    doc_start = document_starts([5, 9, 40], 1, 33, 70).to(machine.device)
    dout = torch.ones_like(leaves[0])
    attend = partial(kernels.attention, *leaves, doc_start=doc_start, backend=machine.backend)
    own = gradients(attend(), dout, leaves)
    for backend in {machine.backend, "torch"}:  # one made for another backend is not used
        mask = kernels.attention_mask(doc_start, 70, machine.dtype, backend=backend)
        assert (mask is None) == (backend == "cpp")
        shared = gradients(attend(mask=mask), dout, leaves)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(own, shared, strict=True))
    assert kernels.attention_mask(None, 70, machine.dtype, backend=machine.backend) is None


@pytest.mark.parametrize("machine", TRITON)
def test_a_mask_is_for_gradients_only(machine: Machine) -> None:
    doc_start = torch.tensor([[1, 1, 4]], dtype=torch.int32, device=machine.device)
    mask = kernels.attention_mask(doc_start, 5, machine.dtype, backend="triton")
    assert mask is not None
    assert mask.tolist() == [[0, 2, 2, 2, 3]]
    with torch.no_grad():
        assert kernels.attention_mask(doc_start, 5, machine.dtype, backend="triton") is None


@pytest.mark.parametrize("machine", EVERYWHERE)
@pytest.mark.parametrize(
    "gradient_layout",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x[:, :, :1, :1].expand(x.shape),
        lambda x: x[:, :1].expand(x.shape),
        lambda x: torch.cat((x, x), -1)[..., 8:24],
    ],
    ids=["transposed", "expanded", "expanded along the row", "slice of each head"],
)
def test_any_strides_of_inputs_and_gradients(machine: Machine, gradient_layout) -> None:
    """q, k and v are slices of one projection, or have columns that do not lie side by side."""
    packed = machine.randn(2, 21, 4, 16)
    q, k, v = packed.split((2, 1, 1), dim=2)
    spread = torch.cat((packed, packed), -1).transpose(0, 1)[..., ::2].transpose(0, 1)
    for leaves in ([q, k, v], [spread[:, 4:, :2], spread[:, :, 2:3], v]):
        assert_parity(machine, leaves, None, (32, 32), gradient_layout=gradient_layout)


@pytest.mark.parametrize("machine", EVERYWHERE)
def test_left_padding_is_a_document_start(machine: Machine) -> None:
    """A prompt padded on the left gives what it gives alone."""
    leaves = inputs((1, 9, 9, 2, 1, 16), machine.dtype, machine.device)
    doc_start = torch.full((1, 9), 4, dtype=torch.int32, device=machine.device)
    out = kernels.attention(*leaves, doc_start=doc_start, backend=machine.backend)
    assert not out[:, :4].any()
    alone = kernels.attention(*(x[:, 4:] for x in leaves), backend=machine.backend)
    torch.testing.assert_close(out[:, 4:], alone)


@pytest.mark.parametrize("machine", EVERYWHERE)
def test_a_query_that_sees_no_key_gives_zeros_and_no_gradient(machine: Machine) -> None:
    leaves = [x.requires_grad_() for x in inputs((1, 20, 20, 2, 1, 16), machine.dtype, machine.device)]
    doc_start = torch.tensor([[0, 2] + [2] * 15 + [19] * 3], dtype=torch.int32, device=machine.device)
    with on_tiles((16, 16)):
        out = kernels.attention(*leaves, doc_start=doc_start, backend=machine.backend)
        out.sum().backward()
    none = [1, 17, 18]
    assert not out[0, none].any()
    assert not any(leaf.grad[0, none].any() for leaf in leaves)
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("function", [reference.attention, kernels.attention])
@pytest.mark.parametrize("documents", [None, [2, 3]])
def test_gradcheck(function, documents: list[int] | None) -> None:
    doc_start = None if documents is None else document_starts(documents, 1, 4, 5)
    leaves = [x.requires_grad_() for x in inputs((1, 4, 5, 4, 2, 16), torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: function(*x, doc_start=doc_start), leaves, fast_mode=True)


def window_starts(window: int, documents: list[int], b: int, sq: int, sk: int) -> Tensor:
    """doc_start of a sliding window within documents, as Transformer.forward makes it."""
    oldest = torch.arange(sk - sq, sk, dtype=torch.int32) - (window - 1)
    return torch.maximum(document_starts(documents, b, sq, sk), oldest)


@pytest.mark.parametrize("documents", [[10_000], [40, 1, 70]])
@pytest.mark.parametrize("window", [1, 7, 32, 64])
@pytest.mark.parametrize("machine", ONE_DTYPE)
def test_a_sliding_window_is_a_document_start(machine: Machine, window: int, documents: list[int]) -> None:
    """Forward and backward, and also against the definition of a window."""
    shape = (1, 100, 130, 2, 1, 16)
    doc_start = window_starts(window, documents, 1, 100, 130)
    leaves = [x.requires_grad_() for x in inputs(shape, machine.dtype, machine.device)]
    assert_parity(machine, leaves, doc_start, tiles=(32, 32))
    key, query = torch.arange(130), torch.arange(30, 130)[:, None]
    banded = (key <= query) & (key > query - window) & (key >= document_starts(documents, 1, 100, 130)[0][:, None])
    assert torch.equal(reference.attention_allowed(doc_start, 100, 130, True, torch.device("cpu"))[0], banded)


@pytest.mark.parametrize("function", [reference.attention, kernels.attention])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_gradcheck_of_a_sliding_window(function, window: int) -> None:
    doc_start = window_starts(window, [4, 3], 1, 6, 7)
    leaves = [x.requires_grad_() for x in inputs((1, 6, 7, 2, 1, 16), torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: function(*x, doc_start=doc_start), leaves, fast_mode=True)


@pytest.mark.parametrize("machine", EVERYWHERE)
@pytest.mark.parametrize("documents", [None, [40, 30]])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_nothing_outside_is_seen_bit_for_bit(machine: Machine, documents: list[int] | None, compiled: bool) -> None:
    """Changing keys and values at j changes no output before j, and none in another document."""
    q, k, v = inputs((1, 70, 70, 2, 1, 16), machine.dtype, machine.device)
    doc_start = None if documents is None else document_starts(documents, 1, 70, 70).to(machine.device)
    attend = partial(kernels.attention, doc_start=doc_start, backend=machine.backend)
    if compiled:
        torch.compiler.reset()  # or the machines together reach the limit of recompilations
        attend = torch.compile(attend, fullgraph=True, backend="aot_eager")
    k2, v2 = k.clone(), v.clone()
    k2[:, 20], v2[:, 20] = 7.0, -9.0
    with on_tiles((32, 32)):
        before, after = attend(q, k, v), attend(q, k2, v2)
    changed = (before != after).flatten(2).any(-1).any(0).nonzero()[:, 0].tolist()
    assert changed == list(range(20, 70 if documents is None else 40))


@pytest.mark.parametrize("machine", ONE_DTYPE)
@pytest.mark.parametrize(
    "options", [{}, {"documents": [5, 20]}, {"causal": False, "scale": 0.3}], ids=["causal", "documents", "not causal"]
)
def test_compiled_forward_and_backward_equal_eager(machine: Machine, options: dict) -> None:
    documents = options.get("documents")
    options = {key: value for key, value in options.items() if key != "documents"}
    doc_start = None if documents is None else document_starts(documents, 1, 33, 70).to(machine.device)
    leaves = [x.requires_grad_() for x in inputs(SMALL, machine.dtype, machine.device)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = kernels.attention_mask(doc_start, 70, q.dtype, backend=machine.backend)
        return kernels.attention(q, k, v, doc_start=doc_start, mask=mask, backend=machine.backend, **options)

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        results.append(gradients(function(*leaves), torch.ones_like(leaves[0]), leaves))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("machine", TRITON)
def test_the_same_bits_every_time(machine: Machine) -> None:
    leaves = [x.requires_grad_() for x in inputs(SMALL, machine.dtype, machine.device)]
    doc_start = document_starts([5, 20], 1, 33, 70).to(machine.device)
    dout = machine.randn(*leaves[0].shape)
    first, second = (
        gradients(kernels.attention(*leaves, doc_start=doc_start, backend="triton"), dout, leaves) for _ in range(2)
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))


@pytest.mark.parametrize("machine", EXACT)
def test_registered_ops_pass_opcheck(machine: Machine) -> None:
    q, k, v = inputs((1, 5, 7, 2, 1, 16), machine.dtype, machine.device)
    doc_start = document_starts([3], 1, 5, 7).to(machine.device)
    doc_end = kernels.attention_mask(doc_start, 7, machine.dtype, backend="triton")
    for start, end, causal in ((doc_start, doc_end, True), (None, None, False)):
        out, lse = attention_forward(q, k, v, start, causal, 0.25)
        torch.library.opcheck(attention_forward.op, (q, k, v, start, causal, 0.25))
        torch.library.opcheck(attention_backward.op, (out, q, k, v, out, lse, start, end, causal, 0.25))


@pytest.mark.parametrize("machine", EXACT)
@pytest.mark.parametrize(("b", "s", "strides"), [(1, 24, (0, 2**27)), (4, 2, (2**30, 96))], ids=["rows", "batch"])
def test_offsets_beyond_32_bits(machine: Machine, b: int, s: int, strides: tuple[int, int]) -> None:
    # Memory that is never touched is never committed.
    memory = torch.empty(3 * 2**30 + 2 * 96, dtype=torch.float16, device=machine.device)
    far = memory.as_strided((b, s, 6, 16), (*strides, 16, 1))
    far.copy_(torch.randn(far.shape))
    results = []
    for packed in (far, far.contiguous()):
        q, k, v, dout = packed.split((2, 1, 1, 2), dim=2)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        with on_tiles((16, 16)):
            results.append(gradients(kernels.attention(*leaves, backend="triton"), dout, leaves))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("machine", TRITON)
@pytest.mark.parametrize(
    ("d", "options", "message"),
    [
        (24, {}, "head dimension 24 is not a multiple of 16 up to 256"),
        (272, {}, "head dimension 272 is not a multiple of 16 up to 256"),
        (16, {"scale": 0.0}, "scale 0.0 is not positive"),
    ],
)
def test_what_the_kernels_do_not_cover_is_refused_by_name(machine: Machine, d: int, options: dict, message) -> None:
    x = machine.randn(1, 2, 1, d)
    with pytest.raises(RuntimeError, match=message):
        kernels.attention(x, x, x, backend="triton", **options)


@pytest.mark.parametrize("machine", EXACT)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("scores * scale_log2 - new_top", "scores * (1.01 * scale_log2) - new_top"),
        ("sums * scale, query", "sums, query"),
        ("dk_sums * scale", "dk_sums"),
        ("key[None, :] <= (sk - sq + query)[:, None]", "key[None, :] < (sk - sq + query)[:, None]"),
        ("key[:, None] <= (sk - sq + query)[None, :]", "key[:, None] < (sk - sq + query)[None, :]"),
        ("seen &= key[None, :] >=", "seen &= key[None, :] >"),
        ("query[None, :] < tl.load(doc_end", "query[None, :] <= tl.load(doc_end"),
        ("+ kv_head * group * q_head", "+ kv_head * q_head"),
        ("delta_tile = tl.sum(", "delta_tile = 0.0 * tl.sum("),
        ("(sk - sq + first + 1) // BLOCK_K", "(sk - sq + first + BLOCK_Q) // BLOCK_K"),
        ("full = tl.cdiv(tl.maximum(last", "full = tl.cdiv(tl.maximum(first"),
        ("sums * shrink[:, None]", "sums"),
        ("seen = (key < sk)[None, :]", "seen = (key <= sk)[None, :]"),
        ("end = tl.load(doc_end + last)", "end = tl.load(doc_end + first)"),
    ],
)
def test_a_changed_kernel_disagrees(machine: Machine, old: str, new: str, tmp_path: Path) -> None:
    changed = mutated("attention", old, new, tmp_path).attention
    leaves = inputs((1, 20, 25, 4, 2, 16), machine.dtype, machine.device)
    cases = ({"doc_start": document_starts([14, 9], 1, 20, 25)}, {}, {"causal": False})
    results = (parity(machine, leaves, tiles=(16, 16), attention=changed, **options) for options in cases)
    assert any(not result.agrees for case in results for result in case)


@pytest.mark.parametrize(
    ("q", "k", "v", "doc_start"),
    [
        ((1, 4, 3, 16), (1, 4, 2, 16), (1, 4, 2, 16), None),  # heads do not divide
        ((1, 5, 2, 16), (1, 4, 2, 16), (1, 4, 2, 16), None),  # more queries than keys
        ((1, 4, 2, 16), (2, 4, 2, 16), (2, 4, 2, 16), None),  # other rows
        ((1, 4, 2, 16), (1, 4, 2, 16), (1, 3, 2, 16), None),  # k and v differ
        ((1, 3, 2, 16), (1, 4, 2, 16), (1, 4, 2, 16), (1, 4)),  # doc_start is of the queries
    ],
)
def test_shapes_that_do_not_fit_are_refused(q, k, v, doc_start) -> None:
    with pytest.raises(ValueError, match=r"kernels\.attention"):
        kernels.attention(
            torch.zeros(q),
            torch.zeros(k),
            torch.zeros(v),
            doc_start=None if doc_start is None else torch.zeros(doc_start, dtype=torch.int32),
        )


def test_documents_without_causality_are_refused() -> None:
    x = torch.zeros(1, 2, 1, 16)
    with pytest.raises(ValueError, match="causal=True"):
        kernels.attention(x, x, x, causal=False, doc_start=torch.zeros(1, 2, dtype=torch.int32))


@pytest.mark.gpu
def test_a_masked_call_does_not_take_cudnn() -> None:
    """torch would prefer it; it plans anew for each number of keys, and wrong gradients under a mask were reported."""
    q, k, v = (torch.randn(1, 1, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    mask = torch.zeros(1, 1, 1, 1, device="cuda", dtype=torch.bfloat16)
    with torch.profiler.profile() as profiler:
        kernels.attention(q, k, v, mask=mask, backend="torch")
    names = {event.key for event in profiler.key_averages()}
    assert any("efficient" in name for name in names), names
    assert not any("cudnn" in name for name in names), names
