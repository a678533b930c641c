"""Calls the C++ of csrc/cpu/, the backend "cpp". The launchers use it if `covers` accepts their tensors.

Arguments are tensors of one dtype in DTYPES with a contiguous last dimension; the launchers have checked the shapes.
Outputs are written in place. All calls use torch's number of threads, but no bit of a result depends on it.
"""

import torch
from torch import Tensor

from kernels.launch import INTERPRETED

try:
    from kernels import _cpu  # after torch, because it shares torch's threads
except ImportError:  # not built, so torch computes
    _cpu = None  # type: ignore[assignment]

BUILT = _cpu is not None
DTYPES = (torch.float32, torch.bfloat16)


def covers(*tensors: Tensor | None) -> bool:
    """Whether the C++ can compute with these tensors: all are on a CPU and have one dtype in DTYPES."""
    first = next(x for x in tensors if x is not None)
    # Triton's interpreter takes CPU tensors too; if it is on, the launchers must use Triton.
    return BUILT and not INTERPRETED and first.is_cpu and first.dtype in DTYPES and mixture(*tensors) is None


def mixture(*tensors: Tensor | None) -> str | None:
    """Returns why the C++ cannot compute with these tensors (dtypes or devices differ), or None."""
    given = [x for x in tensors if x is not None]
    # The C++ gets addresses and one flag for the dtype, so it would misread the bytes of another dtype.
    if all(x.dtype == given[0].dtype and x.device == given[0].device for x in given):
        return None
    return "the tensors have several dtypes or devices"


def _common(x: Tensor) -> tuple[bool, int]:
    """Returns the first arguments of every call: whether the dtype is bf16, and the number of threads."""
    # Read at every call, because torch.set_num_threads may change it at any time.
    return x.dtype == torch.bfloat16, torch.get_num_threads()


def _packed(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Returns x in the dtype that the C++ assumes. The C++ gets an address, so the caller keeps the tensor alive."""
    return None if x is None else x.to(dtype).contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()  # for the C++, 0 is an absent argument


def _rows(x: Tensor) -> tuple[int, int, int, int]:
    """x [N, D]."""
    return x.data_ptr(), 1, x.stride(0), 0  # one head per row


def _heads(x: Tensor) -> tuple[int, int, int, int]:
    """x [B, S, H, D]."""
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)


def attention_forward(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None, causal: bool, scale: float
) -> None:
    (b, sq, hq, d), (sk, hkv) = q.shape, k.shape[1:3]
    # The variable keeps the converted doc_start alive until the call returns; an address does not.
    (bf16, threads), doc_start = _common(q), _packed(doc_start, torch.int32)
    _cpu.attention_forward(
        (b, sq, sk, hq, hkv, d),
        causal,
        bf16,
        scale,
        _address(doc_start),
        threads,
        _heads(q),
        _heads(k),
        _heads(v),
        # No strides, because the launcher has made out, lse and gradients contiguous.
        out.data_ptr(),
        lse.data_ptr(),
    )


def attention_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    doc_start: Tensor | None,
    causal: bool,
    scale: float,
) -> None:
    (b, sq, hq, d), (sk, hkv) = q.shape, k.shape[1:3]
    (bf16, threads), doc_start = _common(q), _packed(doc_start, torch.int32)
    _cpu.attention_backward(
        (b, sq, sk, hq, hkv, d),
        causal,
        bf16,
        scale,
        _address(doc_start),
        threads,
        _heads(dout),
        _heads(q),
        _heads(k),
        _heads(v),
        out.data_ptr(),
        lse.data_ptr(),
        dq.data_ptr(),
        dk.data_ptr(),
        dv.data_ptr(),
    )


def swiglu_forward(y: Tensor, gate: Tensor, up: Tensor) -> None:
    """gate, up: [N, F]; y: contiguous."""
    n_rows, f = gate.shape
    _cpu.swiglu_forward(*_common(y), n_rows, f, _rows(gate), _rows(up), y.data_ptr())


def swiglu_backward(dgate: Tensor, dup: Tensor, dy: Tensor, gate: Tensor, up: Tensor) -> None:
    """All [N, F]; dgate and dup have the same stride."""
    n_rows, f = gate.shape
    _cpu.swiglu_backward(
        *_common(dy),
        n_rows,
        f,
        _rows(dy),
        _rows(gate),
        _rows(up),
        dgate.data_ptr(),
        dup.data_ptr(),
        dgate.stride(0),
    )


def rms_norm_forward(
    y: Tensor,
    total: Tensor,
    rstd: Tensor,
    x: tuple[Tensor, int, int, int],
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
) -> None:
    """x: as rms_norm._layout returns it; the others are contiguous."""
    values, heads, outer, inner = x
    _cpu.rms_norm_forward(
        *_common(y),
        rstd.numel(),
        values.shape[-1],
        eps,
        (values.data_ptr(), heads, outer, inner),
        _address(residual),
        weight.data_ptr(),
        y.data_ptr(),
        total.data_ptr(),
        rstd.data_ptr(),
    )


def rms_norm_backward(
    dx: Tensor, dy: Tensor, dtotal: Tensor | None, x: tuple[Tensor, int, int, int], weight: Tensor, rstd: Tensor
) -> Tensor:
    """Returns dweight in fp32."""
    values, heads, outer, inner = x
    n_rows, width = rstd.numel(), values.shape[-1]
    # One share per NORM_ROWS rows, not per thread, so that the order of the sum does not depend on the threads.
    shares = torch.empty(-(-n_rows // _cpu.NORM_ROWS), width)
    _cpu.rms_norm_backward(
        *_common(dy),
        n_rows,
        width,
        (values.data_ptr(), heads, outer, inner),
        weight.data_ptr(),
        dy.data_ptr(),
        _address(dtotal),
        dx.data_ptr(),
        rstd.data_ptr(),
        shares.data_ptr(),
    )
    return shares.sum(dim=0)


def rope(q_out: Tensor, k_out: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    (b, s, q_heads, d), k_heads = q.shape, k.shape[2]
    # The list keeps the converted angles alive during the call.
    angles = [_packed(x, torch.float32) for x in (cos, sin)]
    _cpu.rope(
        *_common(q),
        inverse,
        (b, s),
        (q_heads, k_heads),
        d,
        _heads(q),
        _heads(k),
        _address(angles[0]),
        _address(angles[1]),
        q_out.data_ptr(),
        k_out.data_ptr(),
    )


def cross_entropy_in_place(
    loss: Tensor,
    lse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    factor: Tensor | None,
    vocab_size: int,
    ignore_index: int,
    z_loss: float,
) -> None:
    """Overwrites logits [N, V] with their gradient; lse is optional.

    Raises IndexError for a target outside the vocabulary.
    """
    n_rows, columns = logits.shape
    labels, factor = _packed(target, torch.int64), _packed(factor, torch.float32)
    # The C++ checks the labels before it writes, so after an IndexError the logits are unchanged.
    _cpu.cross_entropy_in_place(
        *_common(logits),
        n_rows,
        columns,
        logits.stride(0),
        vocab_size,
        ignore_index,
        z_loss,
        logits.data_ptr(),
        _address(labels),
        _address(factor),
        loss.data_ptr(),
        _address(lse),
    )


def covers_gram(x: Tensor) -> bool:
    """Whether `gram_polynomial` computes with the Gram matrices of x [N, rows, columns]."""
    return covers(x) and x.dtype == torch.float32 and x.shape[-2] % _cpu.GRAM_ROWS == 0


def gram_polynomial(gram: Tensor, coefficients: tuple[float, float, float], steps: int, polynomial: Tensor) -> None:
    """Writes the polynomial of llm.training.muon._gram_polynomial. Both: [N, M, M] fp32, contiguous, symmetric.

    Every product is of polynomials of one symmetric matrix and so symmetric: half of it is computed.
    """
    count, rows, _ = gram.shape
    threads = torch.get_num_threads()
    _cpu.gram_polynomial(threads, steps, count, rows, coefficients, gram.data_ptr(), polynomial.data_ptr())
