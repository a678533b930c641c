"""The calls of the C++ in csrc/cpu/, the backend "cpp": the launchers come here where `covers` accepts their tensors.

Arguments are tensors of one dtype out of DTYPES whose last dimension is contiguous; the launchers have checked the
shapes. Outputs are written in place. Everything runs on torch's number of threads, and no bit depends on it.
"""

import torch
from torch import Tensor

from kernels.launch import INTERPRETED

try:
    from kernels import _cpu  # after torch, whose threads it shares
except ImportError:  # not built: torch computes
    _cpu = None  # type: ignore[assignment]

BUILT = _cpu is not None
DTYPES = (torch.float32, torch.bfloat16)


def covers(*tensors: Tensor | None) -> bool:
    """Whether the C++ computes these tensors together: all on a CPU and of one dtype out of DTYPES."""
    first = next(x for x in tensors if x is not None)
    # Triton's interpreter takes CPU tensors too: when it is on, a launcher has to leave them to Triton.
    return BUILT and not INTERPRETED and first.is_cpu and first.dtype in DTYPES and mixture(*tensors) is None


def mixture(*tensors: Tensor | None) -> str | None:
    """Why the C++ cannot compute these tensors together: their dtypes or devices differ; None where they do not."""
    given = [x for x in tensors if x is not None]
    # The C++ gets addresses and one flag for the dtype: it would read another dtype's bytes as its own.
    if all(x.dtype == given[0].dtype and x.device == given[0].device for x in given):
        return None
    return "the tensors have several dtypes or devices"


def _common(x: Tensor) -> tuple[bool, int]:
    """The first arguments of every call: whether the dtype is bf16, and the number of threads."""
    # Asked at every call: torch.set_num_threads may change it at any time.
    return x.dtype == torch.bfloat16, torch.get_num_threads()


def _packed(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """x in the dtype that the C++ assumes, which sees addresses only. The caller keeps it alive during the call."""
    return None if x is None else x.to(dtype).contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()  # the C++ reads 0 as an argument that is left out


def _rows(x: Tensor) -> tuple[int, int, int, int]:
    """x [N, D]."""
    return x.data_ptr(), 1, x.stride(0), 0  # one head a row


def _heads(x: Tensor) -> tuple[int, int, int, int]:
    """x [B, S, H, D]."""
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)


def attention_forward(
    out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, doc_start: Tensor | None, causal: bool, scale: float
) -> None:
    (b, sq, hq, d), (sk, hkv) = q.shape, k.shape[1:3]
    # The converted doc_start keeps its name until the call returns: an address keeps no memory alive.
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
        # No strides: out, lse and gradients are the launcher's own, new and contiguous.
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
    """All [N, F]; dgate and dup of one stride."""
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
    """x: as rms_norm._layout returns it; the others contiguous."""
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
    # A share for each NORM_ROWS rows, not for each thread: the sum has the same order with any number of threads.
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
    # The list keeps converted angles alive during the call.
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
    """logits [N, V] become their gradient; lse may be left out.

    Raises IndexError for a target outside the vocabulary.
    """
    n_rows, columns = logits.shape
    labels, factor = _packed(target, torch.int64), _packed(factor, torch.float32)
    # The C++ checks the labels before it writes, so that an IndexError leaves the logits as they were.
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


def covers_gram(gram: Tensor) -> bool:
    """Whether `gram_polynomial` computes this one."""
    return covers(gram) and gram.dtype == torch.float32 and gram.shape[-1] % _cpu.GRAM_ROWS == 0


def gram_polynomial(gram: Tensor, coefficients: tuple[float, float, float], steps: int, polynomial: Tensor) -> None:
    """Writes the polynomial of llm.training.muon._gram_polynomial. Both: [N, M, M] fp32, contiguous, symmetric.

    Every product is of polynomials of one symmetric matrix and so symmetric: half of it is computed.
    """
    count, rows, _ = gram.shape
    threads = torch.get_num_threads()
    _cpu.gram_polynomial(threads, steps, count, rows, coefficients, gram.data_ptr(), polynomial.data_ptr())
