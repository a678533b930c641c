"""The implementations of each op in the kernel benchmark: this project's backends, torch's, and Liger-Kernel.

All compute the same function of the same tensors. Further inputs that calls can share (a mask, document boundaries) are
made before the clock starts. An implementation that cannot run raises, and is listed with its reason.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from benchmarks.cases import BOTH, Case, Function, Variant
from kernels import reference

Extras = dict[str, Tensor]
Build = Callable[[Case, Extras], Function]

IN_PLACE = "ours, in place"


class CannotRun(Exception):
    """The reason why an implementation has no figure."""


def variants(case: Case, mode: str) -> dict[str, Callable[[Extras], Variant]]:
    """{name: function that makes a variant from the op's other arguments}. The first one is the users' default."""
    ours = kernels.describe(case.device)[case.op]["backend"]
    builds: dict[str, Build] = {f"ours ({ours})": partial(_ours, ours)}
    if ours != "torch":
        builds["ours (torch)"] = partial(_ours, "torch")
    builds |= {"torch.compile": _compiled, **RIVALS[case.op]}
    made: dict[str, Callable[[Extras], Variant]] = {
        name: lambda extras, build=build: Variant(build(case, extras)) for name, build in builds.items()
    }
    if case.op == "cross_entropy" and mode == BOTH:
        made[IN_PLACE] = partial(_in_place, case)
    return made


def _ours(backend: str, case: Case, extras: Extras) -> Function:
    bound: dict[str, Any] = {**extras, **case.options, "backend": backend}
    if "doc_start" in extras:
        start = extras["doc_start"]
        bound["mask"] = kernels.attention_mask(start, start.shape[1], case.dtype, backend=backend)
    return partial(getattr(kernels, case.op), **bound)


def _compiled(case: Case, extras: Extras) -> Function:
    return partial(torch.compile(getattr(reference, case.op), dynamic=False), **extras, **case.options)


def _in_place(case: Case, extras: Extras) -> Variant:
    """Computes mean loss and gradient at once and overwrites the logits, so later calls read other numbers."""
    if kernels.describe(case.device)[case.op]["backend"] != "triton":
        raise CannotRun("it needs Triton")
    from kernels.cross_entropy import Options, cross_entropy_in_place

    target = extras["target"]
    options = Options(case.operands[0].shape[1], -100, 0.0)
    share = torch.full(target.shape, 1.0, device=target.device) / (target != -100).sum()

    def both(logits: Tensor) -> tuple[Tensor, Tensor]:
        loss, _ = cross_entropy_in_place(logits, target, share, *options)
        return (loss * share).sum(), logits

    return Variant(both, whole=True)


def _sdpa(backend: SDPBackend, case: Case, extras: Extras) -> Function:
    """Only one of SDPA's kernels. Only the efficient one accepts a mask, and it does not support grouped heads."""
    groups = _groups(case)
    efficient = backend == SDPBackend.EFFICIENT_ATTENTION
    if extras and not efficient:
        raise CannotRun("it knows no documents")

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        options: dict[str, Any] = {"is_causal": True, "enable_gqa": groups > 1}
        if efficient:
            k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))
            options = {"is_causal": mask is None, "attn_mask": mask}
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    mask: Tensor | None = None
    if extras:
        start = extras["doc_start"]
        s = start.shape[1]
        seen = reference.attention_allowed(start, s, s, True, start.device)
        mask = torch.zeros(seen.shape, dtype=torch.bfloat16 if start.is_cuda else torch.float32, device=start.device)
        mask = mask.masked_fill_(~seen, -torch.inf)[:, None]
    return attention


def _groups(case: Case) -> int:
    return case.operands[0].shape[2] // case.operands[1].shape[2]


def _flex(case: Case, extras: Extras) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    b, s = case.operands[0].shape[:2]
    start = extras.get("doc_start")

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        causal = query >= key
        return causal if start is None else causal & (key >= start[batch, query])

    mask = create_block_mask(sees, None if start is None else b, None, s, s, device=case.device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=_groups(case) > 1).transpose(1, 2)

    return attention


def _varlen(case: Case, extras: Extras) -> Function:
    """flash-attention over concatenated documents, as included in torch."""
    from torch.nn.attention.varlen import varlen_attn

    if case.device.type != "cuda":
        raise CannotRun("it needs an NVIDIA device")
    b, s = case.operands[0].shape[:2]
    start = extras.get("doc_start", torch.zeros(b, s, dtype=torch.int32, device=case.device))
    first = (start == torch.arange(s, device=case.device)).flatten().nonzero()[:, 0]
    edges = torch.cat((first, first.new_tensor([b * s]))).to(torch.int32)
    longest = int(edges.diff().max())
    options = {"enable_gqa": _groups(case) > 1} if "enable_gqa" in signature(varlen_attn).parameters else {}

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = (x.flatten(0, 1) for x in (q, k, v))
        return varlen_attn(*flat, edges, edges, longest, longest, window_size=(-1, 0), **options).view(q.shape)

    return attention


def _f_rms_norm(case: Case, extras: Extras) -> Function:
    return lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6)


def _f_add_rms_norm(case: Case, extras: Extras) -> Function:
    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, weight.shape, weight, 1e-6), total

    return add_rms_norm


def _f_silu(case: Case, extras: Extras) -> Function:
    def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
        gate, up = _halves(gate, up)
        return F.silu(gate) * up

    return swiglu


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return gate, up


def _f_cross_entropy(case: Case, extras: Extras) -> Function:
    return lambda logits: F.cross_entropy(logits, extras["target"])


def _f_cross_entropy_fp32(case: Case, extras: Extras) -> Function:
    return lambda logits: F.cross_entropy(logits.float(), extras["target"])


def _f_linear_then_cross_entropy(case: Case, extras: Extras) -> Function:
    return lambda x, weight: F.cross_entropy(F.linear(x, weight).float(), extras["target"])


def _f_linear_cross_entropy(case: Case, extras: Extras) -> Function:
    if not hasattr(F, "linear_cross_entropy"):
        raise CannotRun(f"torch {torch.__version__} has none")
    chunked = torch.nn.LinearCrossEntropyOptions()
    return lambda x, weight: F.linear_cross_entropy(x, weight, extras["target"], options=chunked)


def _liger(build: Callable[[Any, Extras], Function]) -> Build:
    def with_liger(case: Case, extras: Extras) -> Function:
        if find_spec("liger_kernel") is None:
            raise CannotRun("it is not installed")
        from liger_kernel.transformers import functional

        return build(functional, extras)

    return with_liger


def _liger_rms_norm(liger: Any, extras: Extras) -> Function:
    # The mode "gemma" rounds once, as ours does.
    return lambda x, weight: liger.liger_rms_norm(x, weight, 1e-6, casting_mode="gemma", in_place=False)


def _liger_add_rms_norm(liger: Any, extras: Extras) -> Function:
    return lambda x, residual, weight: liger.liger_fused_add_rms_norm(
        x, residual, weight, 1e-6, casting_mode="gemma", in_place=False
    )


def _liger_rope(liger: Any, extras: Extras) -> Function:
    cos, sin = (torch.cat((extras[name],) * 2, dim=-1)[None] for name in ("cos", "sin"))

    def rope(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = liger.liger_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    return rope


def _liger_norm_rope(case: Case, extras: Extras) -> Function:
    """As separate ops, as models in transformers compute them."""
    heads = case.options["n_heads"]
    norm, turn = (_liger(build)(case, extras) for build in (_liger_rms_norm, _liger_rope))

    def norm_rope(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        packed = qkv.unflatten(-1, (-1, q_weight.shape[0]))
        kv_heads = (packed.shape[2] - heads) // 2
        q, k, v = packed.split((heads, kv_heads, kv_heads), dim=2)
        return *turn(norm(q, q_weight), norm(k, k_weight)), v

    return norm_rope


def _liger_swiglu(liger: Any, extras: Extras) -> Function:
    return lambda gate, up=None: liger.liger_swiglu(*_halves(gate, up))


def _liger_cross_entropy(liger: Any, extras: Extras) -> Function:
    return lambda logits: liger.liger_cross_entropy(logits, extras["target"])


def _liger_linear_cross_entropy(liger: Any, extras: Extras) -> Function:
    return lambda x, weight: liger.liger_fused_linear_cross_entropy(
        x, weight, extras["target"], accum_dtype=torch.float32
    )


RIVALS: dict[str, dict[str, Build]] = {
    "attention": {
        "SDPA flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
        "SDPA efficient": partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION),
        "FlexAttention": _flex,
        "varlen_attn": _varlen,
    },
    "rms_norm": {"F.rms_norm": _f_rms_norm, "Liger-Kernel": _liger(_liger_rms_norm)},
    "add_rms_norm": {"F.rms_norm": _f_add_rms_norm, "Liger-Kernel": _liger(_liger_add_rms_norm)},
    "rope": {"Liger-Kernel": _liger(_liger_rope)},
    "norm_rope": {"Liger-Kernel": _liger_norm_rope},
    "swiglu": {"F.silu": _f_silu, "Liger-Kernel": _liger(_liger_swiglu)},
    "cross_entropy": {
        "F.cross_entropy": _f_cross_entropy,
        "F.cross_entropy, fp32": _f_cross_entropy_fp32,
        "Liger-Kernel": _liger(_liger_cross_entropy),
    },
    "linear_cross_entropy": {
        "F.linear, F.cross_entropy": _f_linear_then_cross_entropy,
        "F.linear_cross_entropy": _f_linear_cross_entropy,
        "Liger-Kernel": _liger(_liger_linear_cross_entropy),
    },
}
