"""Attention: the twin against a loop over queries, the torch backend against the twin."""

from functools import partial

import pytest
import torch
from torch import Tensor

import kernels
from kernels import reference
from kernels.parity import check


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# (B, Sq, Sk, Hq, Hkv, D)
SHAPES = {
    "one token": (1, 1, 1, 1, 1, 16),
    "decoding": (2, 1, 129, 4, 1, 32),
    "few against a cache": (2, 3, 130, 4, 2, 16),
    "long prefill against a cache": (1, 129, 200, 2, 1, 16),
    "MHA": (2, 65, 65, 3, 3, 16),
    "GQA 3:1": (1, 127, 127, 3, 1, 48),
    "GQA 4:1": (2, 128, 128, 8, 2, 16),
    "MQA, more than one query block": (1, 300, 300, 4, 1, 64),
}


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


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    b, sq, sk, hq, hkv, d = shape
    return [torch.randn(size).to(dtype) for size in ((b, sq, hq, d), (b, sk, hkv, d), (b, sk, hkv, d))]


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
def test_twin_is_the_definition(documents: list[int] | None, sq: int, sk: int, hq: int, hkv: int) -> None:
    q, k, v = inputs((2, sq, sk, hq, hkv, 16), torch.float64)
    doc_start = None if documents is None else document_starts(documents, 2, sq, sk)
    torch.testing.assert_close(
        reference.attention(q, k, v, doc_start=doc_start), looped(q, k, v, True, doc_start, 16**-0.5)
    )


def test_twin_without_causality_and_with_a_scale() -> None:
    q, k, v = inputs((2, 3, 5, 2, 1, 16), torch.float64)
    torch.testing.assert_close(reference.attention(q, k, v, causal=False, scale=0.3), looped(q, k, v, False, None, 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_backend_agrees_with_the_twin(shape: str, documents: str, dtype: torch.dtype) -> None:
    b, sq, sk, *_ = size = SHAPES[shape]
    lengths = DOCUMENTS[documents]
    doc_start = None if lengths is None else document_starts(lengths, b, sq, sk)
    results = check(
        partial(kernels.attention, doc_start=doc_start, backend="torch"),
        partial(reference.attention, doc_start=doc_start),
        inputs(size, dtype),
        rows={"gradient 1": sq, "gradient 2": sq},
    )
    assert all(result.agrees for result in results), results


@pytest.mark.parametrize(
    "options",
    [{"causal": False}, {"scale": 0.3}, {"causal": False, "scale": 1.0}, {"scale": 0.3, "documents": [5, 40]}],
)
@pytest.mark.parametrize("shape", ["few against a cache", "GQA 3:1", "decoding"])
def test_torch_backend_with_options(shape: str, options: dict) -> None:
    b, sq, sk, *_ = SHAPES[shape]
    options = dict(options)
    if "documents" in options:
        options["doc_start"] = document_starts(options.pop("documents"), b, sq, sk)
    results = check(
        partial(kernels.attention, backend="torch", **options),
        partial(reference.attention, **options),
        inputs(SHAPES[shape], torch.float32),
        rows={"gradient 1": 130, "gradient 2": 130},
    )
    assert all(result.agrees for result in results), results


def test_a_shared_mask_changes_nothing() -> None:
    b, sq, sk, *_ = SHAPES["GQA 4:1"]
    q, k, v = inputs(SHAPES["GQA 4:1"], torch.float32)
    doc_start = document_starts([5, 9, 40], b, sq, sk)
    mask = kernels.attention_mask(doc_start, sk, q.dtype)
    own = kernels.attention(q, k, v, doc_start=doc_start)
    assert torch.equal(kernels.attention(q, k, v, doc_start=doc_start, mask=mask), own)
    assert kernels.attention_mask(None, sk, q.dtype) is None


def test_strided_inputs() -> None:
    packed = torch.randn(2, 40, 4, 48)
    q, k, v = packed[..., :16], packed[:, :, :2, 16:32], packed.transpose(0, 1)[:, :, 2:, 32:].transpose(0, 1)
    results = check(kernels.attention, reference.attention, [q, k, v], rows={"gradient 1": 40, "gradient 2": 40})
    assert all(result.agrees for result in results), results


@pytest.mark.parametrize("function", [reference.attention, kernels.attention])
def test_left_padding_is_a_document_start(function) -> None:
    """A prompt padded on the left gives what it gives alone."""
    q, k, v = inputs((1, 9, 9, 2, 1, 16), torch.float64)
    doc_start = torch.tensor([[0, 0, 0, 0, 4, 4, 4, 4, 4]], dtype=torch.int32)
    padded = function(q, k, v, doc_start=doc_start)[:, 4:]
    torch.testing.assert_close(padded, function(q[:, 4:], k[:, 4:], v[:, 4:]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [reference.attention, kernels.attention])
def test_a_query_that_sees_no_key_gives_zeros_and_no_gradient(function, dtype: torch.dtype) -> None:
    leaves = [x.requires_grad_() for x in inputs((1, 4, 4, 2, 1, 16), dtype)]
    out = function(*leaves, doc_start=torch.tensor([[0, 2, 2, 2]], dtype=torch.int32))
    assert not out[0, 1].any()
    out.sum().backward()
    assert not leaves[0].grad[0, 1].any()
    assert all(x.grad.isfinite().all() for x in leaves)


@pytest.mark.parametrize("function", [reference.attention, kernels.attention])
@pytest.mark.parametrize("documents", [None, [2, 3]])
def test_gradcheck(function, documents: list[int] | None) -> None:
    doc_start = None if documents is None else document_starts(documents, 1, 4, 5)
    leaves = [x.requires_grad_() for x in inputs((1, 4, 5, 4, 2, 16), torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: function(*x, doc_start=doc_start), leaves, fast_mode=True)


@pytest.mark.parametrize("documents", [None, [130, 50]])
def test_nothing_outside_is_seen_bit_for_bit(documents: list[int] | None) -> None:
    """Changing keys and values at j changes no output before j, and none in another document."""
    q, k, v = inputs((2, 300, 300, 4, 2, 16), torch.float32)
    doc_start = None if documents is None else document_starts(documents, 2, 300, 300)
    before = kernels.attention(q, k, v, doc_start=doc_start)
    k2, v2 = k.clone(), v.clone()
    k2[:, 150], v2[:, 150] = 7.0, -9.0
    after = kernels.attention(q, k2, v2, doc_start=doc_start)
    seen = [i for i in range(300) if i >= 150 and (documents is None or i < 180)]
    changed = (before != after).flatten(2).any(-1).any(0).nonzero()[:, 0].tolist()
    assert changed == seen


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
