"""The model: a Llama-family decoder and its initialisation. Only this file defines the architecture.

Shapes: B sequences, S tokens per sequence, D = d_model, Hq = n_heads, Hkv = n_kv_heads, head_dim = D / Hq if the config
states no other, F = d_ff, V = vocabulary size.

Next to its forward, a module defines what other code needs to know about it:

- `work(tokens, pairs, item)`: the least FLOPs and bytes of one call, by op (kernels.work). FLOPs per token, MFU,
  and the least times of `llm profile` are sums over all modules (llm.model.flops).
- `decoder_steps()`: the ops of one decoded token, by name and with their weights. The C++ decoder is built from them
  (csrc/decoder/). If the C++ does not know a name, or if its logits after the prompt differ from the logits of
  `Transformer.forward`, torch decodes instead (llm.inference.decode).
- `row_split`: the heights of the matrices that are stacked in a fused weight. Muon and the mapping to Hugging Face's
  weights (llm.model.hf) separate them.

To add an activation: write it next to `swiglu`, assign it to MLP.activation, and add its name to HIDDEN_ACTS of
llm.model.hf_config. It trains, saves, exports and decodes. A kernel (kernels/) and a step of csrc/decoder/decoder.cpp
only make it faster.

A sliding window of W tokens is a doc_start of at least i - W + 1 for token i: every kernel attends to the keys from
doc_start on. Transformer.forward limits training and prompts this way; Decoder._set_position (llm.inference.decode)
limits decoding on a CPU, Workspace._compute (llm.inference.device_decoder) on a GPU.
"""

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import kernels
from kernels import work
from kernels.linear import MasterWeights, linear
from kernels.work import ForwardBackward, Work
from llm.config import ActivationCheckpointing, ModelConfig
from llm.errors import UserError
from llm.model import rope

VOCAB_MULTIPLE = 128  # matrix products are faster with aligned widths
IGNORE_INDEX = -100  # a label without loss; the default of torch's cross_entropy too


def check_backend(device: torch.device) -> None:
    """Raises UserError if LLM_KERNELS names kernels that cannot run on this device."""
    try:
        described = kernels.describe(device)
    except ValueError as error:
        raise UserError(str(error)) from None
    for op, chosen in described.items():
        if chosen["backend"] == "error":
            raise UserError(f"LLM_KERNELS={os.environ.get('LLM_KERNELS')}: {chosen['reason']}; unset it ({op})")


def true_vocab_size(config: ModelConfig) -> int:
    """Returns V, the tokens of the softmax. Raises ValueError if the config leaves it to the data."""
    if config.vocab_size is None:
        raise ValueError("model.vocab_size is null: take it from the data before building a model")
    return config.vocab_size


def padded_vocab_size(config: ModelConfig) -> int:
    """Returns the rows of the embedding and of the LM head, with padding to a multiple of 128."""
    return math.ceil(config.rows / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class DecoderStep(NamedTuple):
    """One op of a decoded token, for the decoder in C++."""

    op: str
    weights: tuple[Tensor | None, ...] = ()
    """None: the op has no such weight."""


def decoder_steps(*modules: nn.Module) -> list[DecoderStep]:
    """Yields the steps of all modules. A module without them gives a step with its class's name, unknown to the C++."""

    def told(module: Any) -> list[DecoderStep]:
        return module.decoder_steps() if hasattr(module, "decoder_steps") else [DecoderStep(type(module).__name__)]

    return [step for module in modules for step in told(module)]


@dataclass
class KVCache:
    """Keys and values of the tokens so far, preallocated. Transformer.forward writes into it and moves `length`."""

    k: Tensor  # [n_layers, B, Hkv, max_len, head_dim], keys after RoPE
    v: Tensor  # like k
    cos: Tensor  # fp32 [max_len, head_dim / 2], RoPE's angles at every position
    sin: Tensor
    length: int = 0  # tokens held, the same in every sequence

    @classmethod
    def empty(
        cls, config: ModelConfig, batch: int, max_len: int, device: torch.device | str, dtype: torch.dtype
    ) -> "KVCache":
        device = torch.device(device)
        if device.type == "cpu":  # attention is in fp32 there, so each step would convert the whole cache
            dtype = torch.promote_types(dtype, torch.float32)
        shape = (config.n_layers, batch, config.n_kv_heads, max_len, config.head_size)
        # zeros, not empty: a masked slot has weight 0, but 0 times a NaN in uninitialised memory is NaN.
        k, v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return cls(k, v, *rope.cos_sin(config, 0, max_len, device))

    @property
    def max_len(self) -> int:
        return self.k.shape[3]


@dataclass
class Context:
    """Shared by all layers of one forward pass."""

    cos: Tensor  # fp32 [S, head_dim / 2]
    sin: Tensor
    doc_start: Tensor | None = None  # int32 [B, S]
    mask: Tensor | None = None  # kernels.attention_mask; in a step, additive [B, 1, 1, visible]
    slots: Tensor | None = None  # int64 [S], the slots of the cache for these tokens
    visible: int = 0  # number of cache slots that attention reads, from the first on
    is_step: bool = False  # one token per sequence; only the mask or `first` decides which slots it attends to
    first: Tensor | None = None  # int64 [B], for kernels.cached_attention; cos and sin are then of all slots
    checkpointing: ActivationCheckpointing = "none"


class Linear(nn.Linear):
    """A linear layer. Transformer.init_weights fills its parameters.

    row_split: the output width; several widths if one product computes several layers of the same input.
    """

    def __init__(self, in_features: int, *row_split: int, bias: bool = False) -> None:
        super().__init__(in_features, sum(row_split), bias=bias)
        self.row_split = row_split

    # torch's constructor calls this; it would draw values that init_weights or a checkpoint overwrites.
    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def work(self, tokens: int, pairs: float, item: int) -> dict[str, ForwardBackward]:
        return {"matmul": work.linear(item, tokens, self.in_features, self.out_features)}


class Embedding(nn.Embedding):
    """An embedding whose rows are padded to padded_vocab_size. Transformer.init_weights fills its weight.

    All later layers compute in the dtype of its output: compute_dtype, or the weight's dtype if that is None.
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype | None) -> None:
        super().__init__(padded_vocab_size(config), config.d_model)
        self.row_split = (config.rows,)
        self.compute_dtype = compute_dtype

    def reset_parameters(self) -> None:
        pass

    def forward(self, ids: Tensor) -> Tensor:
        # The look-up comes first, so that only B x S rows are cast, not the whole table.
        return super().forward(ids).to(self.compute_dtype or self.weight.dtype)

    def work(self, tokens: int, pairs: float, item: int) -> dict[str, ForwardBackward]:
        copied = Work(2 * item * tokens * self.embedding_dim)
        return {"embedding": ForwardBackward(copied, copied)}

    def decoder_steps(self) -> list[DecoderStep]:
        return [DecoderStep("embedding", (self.weight,))]


def weight_for(weight: Tensor, x: Tensor) -> Tensor:
    """Returns a weight as an op on x takes it: a GPU's op rounds it itself, and does not round its gradient."""
    return weight.to(x.dtype) if x.is_cpu else weight


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang & Sennrich 2019).

    Args:
        adds: whether forward adds x to a residual stream.
    """

    def __init__(self, width: int, eps: float, *, adds: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.adds = eps, adds

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Adds x to the residual stream. Returns (norm of the residual stream, residual stream)."""
        # The first block has nothing to add.
        if residual is None:
            return kernels.rms_norm(x, weight_for(self.weight, x), self.eps), x
        return kernels.add_rms_norm(x, residual, weight_for(self.weight, x), self.eps)

    def work(self, tokens: int, pairs: float, item: int) -> dict[str, ForwardBackward]:
        (width,) = self.weight.shape
        if self.adds:
            return {"add_rms_norm": work.add_rms_norm(item, tokens, width)}
        return {"rms_norm": work.rms_norm(item, tokens, width)}

    def decoder_steps(self) -> list[DecoderStep]:
        return [DecoderStep("rms_norm", (self.weight,))]


class HeadNorm(RMSNorm):
    """The norm of each query or key head. Attention computes it and RoPE in one op, and counts the work of both."""

    def work(self, tokens: int, pairs: float, item: int) -> dict[str, ForwardBackward]:
        return {}


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_size
        q_width, kv_width = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        # One product for all three: x is read once.
        self.qkv = Linear(config.d_model, q_width, kv_width, kv_width, bias=config.attention_bias != "none")
        self.o_proj = Linear(q_width, config.d_model, bias=config.attention_bias == "qkvo")

        self.eps = config.norm_eps
        self.q_norm, self.k_norm = (HeadNorm(self.head_dim, config.norm_eps) if config.qk_norm else None for _ in "qk")

    def forward(self, x: Tensor, context: Context, cached: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x: [B, S, D]; cached: this layer's keys and values [B, Hkv, max_len, head_dim], written at context.slots."""
        b, s, _ = x.shape
        if context.first is not None:
            return self._step(x, context, cached)
        qkv = self.qkv(x)
        if self.q_norm is not None and self.k_norm is not None:
            # The norms come before RoPE, as in Qwen3, which is the type of the exported model (hf_config).
            weights = weight_for(self.q_norm.weight, x), weight_for(self.k_norm.weight, x)
            q, k, v = kernels.norm_rope(qkv, *weights, context.cos, context.sin, self.eps, n_heads=self.n_heads)
        else:
            q, k, v = qkv.view(b, s, -1, self.head_dim).split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=2)
            q, k = kernels.rope(q, k, context.cos, context.sin)
        if cached is not None:
            assert context.slots is not None
            # index_copy_ reads the slots from a tensor, so that a CUDA graph can be replayed at any position.
            for held, new in zip(cached, (k, v), strict=True):
                held.index_copy_(2, context.slots, new.transpose(1, 2).to(held.dtype))
            k, v = (held[:, :, : context.visible].transpose(1, 2) for held in cached)
        if context.is_step:
            # Query heads that share keys become queries of one head, so that the keys are not copied.
            # Only the torch backend accepts any mask, and it has the fixed shapes that a CUDA graph needs.
            q = q.view(b, self.n_kv_heads, -1, self.head_dim).transpose(1, 2)
            out = kernels.attention(q, k, v, causal=False, mask=context.mask, backend="torch").transpose(1, 2)
        else:
            # On a CPU the cache is in fp32 (KVCache.empty), and all inputs of an op must have one dtype.
            q = q.to(k.dtype)
            out = kernels.attention(q, k, v, doc_start=context.doc_start, mask=context.mask).to(x.dtype)
        # reshape, not view: `out` of a step is transposed.
        return self.o_proj(out.reshape(b, s, -1))

    def _step(self, x: Tensor, context: Context, cached: tuple[Tensor, Tensor] | None) -> Tensor:
        """What forward computes in a step, in one launch between the products."""
        assert cached is not None
        assert context.slots is not None
        assert context.first is not None
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = weight_for(self.q_norm.weight, x), weight_for(self.k_norm.weight, x)
        out = kernels.cached_attention(
            self.qkv(x).view(len(x), -1, self.head_dim),
            *cached,
            context.cos,
            context.sin,
            context.slots,
            context.first,
            context.visible,
            norms,
            self.eps,
        )
        return self.o_proj(out.view(len(x), 1, -1))

    def work(self, tokens: int, pairs: float, item: int) -> dict[str, ForwardBackward]:
        sizes = self.n_heads, self.n_kv_heads, self.head_dim
        if self.q_norm is not None:
            turned = {"norm_rope": work.norm_rope(item, tokens, *sizes)}
        else:
            turned = {"rope": work.rope(item, tokens, self.n_heads + self.n_kv_heads, self.head_dim)}
        return {"attention": work.attention(item, tokens, *sizes, pairs), **turned}

    def decoder_steps(self) -> list[DecoderStep]:
        norms = (None if norm is None else norm.weight for norm in (self.q_norm, self.k_norm))
        biases = (self.qkv.bias, self.o_proj.bias)
        return [DecoderStep("attention", (self.qkv.weight, self.o_proj.weight, *norms, *biases))]


def swiglu(gate_up: Tensor) -> Tensor:
    # Looked up at each call, because `llm profile` replaces kernels.swiglu (step_trace.marked_ops).
    return kernels.swiglu(gate_up)


class MLP(nn.Module):
    """A gated feed-forward layer (Shazeer 2020)."""

    activation = staticmethod(swiglu)
    """Maps gate and up, packed [..., 2 F], to [..., F]. Other code knows only its name."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.d_model, config.d_ff, config.d_ff)
        self.down_proj = Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_up(x)))

    def work(self, tokens: int, pairs: float, item: int) -> dict[str, ForwardBackward]:
        # Every activation must read gate and up once, and write their product.
        return {self.activation.__name__: work.swiglu(item, tokens, self.down_proj.in_features)}

    def decoder_steps(self) -> list[DecoderStep]:
        return [DecoderStep(self.activation.__name__, (self.gate_up.weight, self.down_proj.weight))]


class Block(nn.Module):
    def __init__(self, config: ModelConfig, *, is_first: bool = False) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps, adds=not is_first)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, residual: Tensor | None, context: Context, cached: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """x, residual: [B, S, D]. Returns (MLP output, residual stream before it); the next norm adds them."""
        # Without a backward pass nothing is kept, so recomputing saves nothing.
        if context.checkpointing == "none" or not torch.is_grad_enabled():
            return self._compute(x, residual, context, cached)

        # Checkpointing is inside the block, so that torch.compile sees it too. No op is random, so no state is kept.
        def compute(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
            return self._compute(x, residual, context, cached)

        # use_reentrant=False, because only this kind takes context_fn and needs no input with a gradient.
        if context.checkpointing == "full":
            return checkpoint(compute, x, residual, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
        return checkpoint(  # type: ignore[no-any-return]
            compute, x, residual, use_reentrant=False, preserve_rng_state=False, context_fn=_keeping_products
        )

    def _compute(
        self, x: Tensor, residual: Tensor | None, context: Context, cached: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        x, residual = self.attn_norm(x, residual)
        x = self.attn(x, context, cached)
        x, residual = self.mlp_norm(x, residual)
        return self.mlp(x), residual

    def decoder_steps(self) -> list[DecoderStep]:
        return decoder_steps(self.attn_norm, self.attn, self.mlp_norm, self.mlp)


_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    # scaled_dot_product_attention dispatches to one of these by device, dtype and shape.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.llm.attention_forward.default,
}
"""The ops of a block whose results "selective" keeps; they are nearly all of its arithmetic."""


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # PREFER: torch.compile may keep a cheap result where recomputing it would cost more.
    return CheckpointPolicy.MUST_SAVE if op in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


_keeping_products = partial(create_selective_checkpoint_contexts, _keep_products)


class LMHead(nn.Module):
    """Owns the output weight, and computes the loss itself.

    The fused loss and its gradient need the weight, and under ZeRO-3 a weight exists only inside its own module's
    forward and backward.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Rows from vocab_size on take no part in the softmax: padding, and those of model.embedding_rows.
        self.vocab_size = true_vocab_size(config)
        self.row_split = (config.rows,)
        self.weight: Tensor = nn.Parameter(torch.empty(padded_vocab_size(config), config.d_model))
        # Not a buffer, because it is not part of the model's state and must not be saved.
        self.last_z: Tensor = torch.empty(0)
        """The z_loss * lse^2 part of the last loss, without gradient; empty if there is no z_loss."""

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, reduction: str = "sum", z_loss: float = 0.0
    ) -> Tensor:
        """hidden [B, S, D], labels int64 [B, S] -> the loss; without labels the logits [B, S, V], without padding."""
        if labels is None:
            # Cut off after the product, whose padded width is aligned. A padding row must never be sampled.
            return linear(hidden, self.weight)[..., : self.vocab_size]
        loss, self.last_z = kernels.linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            weight_for(self.weight, hidden),
            labels.reshape(-1),
            vocab_size=self.vocab_size,
            ignore_index=IGNORE_INDEX,
            z_loss=z_loss,
            return_z=True,
            reduction=reduction,
        )
        return loss.view(labels.shape) if reduction == "none" else loss

    def work(self, tokens: int, pairs: float, item: int) -> dict[str, ForwardBackward]:
        d_model = self.weight.shape[1]
        return {"linear_cross_entropy": work.linear_cross_entropy(item, tokens, d_model, self.vocab_size)}

    def decoder_steps(self) -> list[DecoderStep]:
        return [DecoderStep("lm_head", (self.weight,))]


class Transformer(nn.Module):
    """The whole decoder. It can be built on the meta device.

    Its weights are undefined until `init_weights` or a checkpoint fills them.

    Args:
        config: with vocab_size set (ValueError otherwise).
        activation_checkpointing: which activations of a block are kept; the backward pass recomputes the others.
            "none" keeps all, "full" only the block's inputs (Chen et al. 2016), "selective" also the results of
            matrix products and attention (Korthikanti et al. 2022), so that only cheap ops run twice. The gradients are
            the same, bit for bit.
        compute_dtype: dtype of activations and matrix products. Weights of another dtype are rounded to it, at each use
            or, inside a block of `master_weights`, once a step; their gradients keep the weights' dtype. None: the
            weights' dtype.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        activation_checkpointing: ActivationCheckpointing = "none",
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.embed_tokens = Embedding(config, compute_dtype)
        self.layers = nn.ModuleList(Block(config, is_first=i == 0) for i in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = LMHead(config)
        self._angles: tuple[tuple[int, torch.device], tuple[Tensor, Tensor]] | None = None
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @torch.inference_mode(False)  # backward cannot save a tensor that was made in that mode
    def _cos_sin(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The angles of positions 0 .. length - 1, kept, because the sequences of a run have one length."""
        if self._angles is None or self._angles[0] != (length, device):
            self._angles = (length, device), rope.cos_sin(self.config, 0, length, device)
        return self._angles[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keeps the tie through to_empty, which makes a new parameter for each module."""
        super()._apply(fn, recurse)
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        return self

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fills every parameter with its `initial_value`."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(self.config, name, seed))

    def master_weights(self) -> MasterWeights:
        """Returns the weights that forward rounds, for a trainer to have them rounded once a step."""
        # Of the embedding only the rows that are looked up are rounded.
        rounding = (module for module in self.modules() if isinstance(module, Linear | RMSNorm | LMHead))
        weights = [weight for module in rounding for weight in module.parameters(recurse=False)]
        return MasterWeights(weights, self.embed_tokens.compute_dtype)

    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        doc_start: Tensor | None = None,
        cache: KVCache | None = None,
        reduction: str = "sum",
        last_only: bool = False,
        z_loss: float = 0.0,
    ) -> Tensor:
        """Returns the loss if there are labels, else logits.

        Args:
            input_ids: int64 [B, S].
            labels: int64 [B, S], the token that follows each one, -100 where there is no loss.
            doc_start: int32 [B, S], for each position the index (in the sequence; in the cache, if there is one) where
                its document begins. None: each sequence is one document.
            cache: the earlier tokens; the new ones are appended. Positions continue from cache.length.
            reduction: reduction of the loss: "sum", "mean", or "none" for [B, S].
            last_only: return only the logits of the last position, [B, 1, V].
            z_loss: weight of lse^2 in the loss (kernels.cross_entropy); `lm_head.last_z` is then this part of it.

        Returns the loss, fp32 and in nats, or the logits [B, S, V] in the dtype of the activations. Raises ValueError
        if the tokens do not fit into the cache.
        """
        s = input_ids.shape[1]
        past = 0 if cache is None else cache.length
        if cache is not None and past + s > cache.max_len:
            raise ValueError(f"{past + s} tokens do not fit into a cache of {cache.max_len}")
        x = self.embed_tokens(input_ids)
        window = self.config.sliding_window
        if window is not None and past + s > window:
            oldest = torch.arange(past, past + s, dtype=torch.int32, device=input_ids.device) - (window - 1)
            seen = oldest.clamp_(min=0).expand(input_ids.shape)
            doc_start = seen if doc_start is None else torch.maximum(doc_start, seen)
        # All layers share the mask, so it is made once.
        mask = kernels.attention_mask(doc_start, past + s, x.dtype)
        if cache is None:
            cos, sin = self._cos_sin(s, input_ids.device)
            context = Context(cos, sin, doc_start, mask, checkpointing=self.activation_checkpointing)
        else:
            rows = slice(past, past + s)
            slots = torch.arange(past, past + s, device=input_ids.device)
            context = Context(cache.cos[rows], cache.sin[rows], doc_start, mask, slots, past + s)
        x = self._layers(x, context, cache)
        # Only after all layers: if one of them raises, the length of the cache is still right.
        if cache is not None:
            cache.length = past + s
        # Before the head, because logits of all positions of a long prompt would be [B, S, V].
        if last_only:
            x = x[:, -1:]
        return self.lm_head(x, labels, reduction, z_loss)

    def step(
        self, input_ids: Tensor, cache: KVCache, position: Tensor, visible: int, first: Tensor | None = None
    ) -> Tensor:
        """Returns the logits after one token per sequence. Shapes depend on no value, so a CUDA graph can replay it.

        Args:
            input_ids: int64 [B, 1].
            cache: the earlier tokens. The new ones are written into it, but the caller must update cache.length.
            position: int64 [1], the slot of the new tokens, the same in every sequence.
            visible: number of slots that attention reads, more than `position`. Slots after `position` are masked.
            first: int64 [B], each sequence's first slot; earlier slots are masked. None: 0, and visible is
                position + 1.

        Returns [B, 1, V] in the dtype of the activations.
        """
        x = self.embed_tokens(input_ids)
        if first is not None and kernels.runs_in_place(x, cache.k, self.config.n_heads):
            context = Context(cache.cos, cache.sin, slots=position, visible=visible, is_step=True, first=first)
            return self.lm_head(self._layers(x, context, cache))
        mask: Tensor | None = None
        if first is not None:
            slot = torch.arange(visible, device=x.device)
            hidden = (slot > position) | (slot < first[:, None])
            mask = torch.zeros(hidden.shape, dtype=cache.k.dtype, device=x.device).masked_fill_(hidden, -torch.inf)
            mask = mask[:, None, None]
        # index_select with a tensor, because a slice needs the position on the host, fixed in a CUDA graph.
        cos, sin = cache.cos.index_select(0, position), cache.sin.index_select(0, position)
        context = Context(cos, sin, mask=mask, slots=position, visible=visible, is_step=True)
        return self.lm_head(self._layers(x, context, cache))

    def _layers(self, x: Tensor, context: Context, cache: KVCache | None) -> Tensor:
        """Maps embedded tokens [B, S, D] to the LM head's input [B, S, D]."""
        residual: Tensor | None = None
        for i, layer in enumerate(self.layers):
            cached = None if cache is None else (cache.k[i], cache.v[i])
            x, residual = layer(x, residual, context, cached)
        return self.norm(x, residual)[0]

    def decoder_steps(self) -> list[DecoderStep]:
        return decoder_steps(self.embed_tokens, *self.layers, self.norm, self.lm_head)


@lru_cache
def meta_model(config: ModelConfig) -> Transformer:
    """Returns the model without memory, shared by all callers, for its names, shapes and work."""
    with torch.device("meta"):
        return Transformer(config)


@lru_cache
def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Returns {name: shape} of every parameter, in the model's order. A tied LM head is not listed."""
    return {name: parameter.shape for name, parameter in meta_model(config).named_parameters()}


def row_split(config: ModelConfig, name: str) -> list[int]:
    """Returns the heights of the parts stacked in parameter `name`, without the padding of the vocabulary."""
    module = meta_model(config).get_submodule(name.rpartition(".")[0])
    return list(getattr(module, "row_split", parameter_shapes(config)[name][:1]))


def parameter_count(config: ModelConfig) -> int:
    """Returns the number of parameters, without rows that only pad the vocabulary."""
    return sum(sum(row_split(config, name)) * shape[1:].numel() for name, shape in parameter_shapes(config).items())


def initial_value(config: ModelConfig, name: str, seed: int) -> Tensor:
    """Returns the initial value of parameter `name`, fp32 on the CPU.

    It depends on the configuration, the name and the seed only: not on the device, the number of processes, or the
    order in which parameters are made. Norms start at 1, biases and padding rows of the vocabulary at 0. Matrices are
    normal with standard deviation sqrt(2 / (5 D)) (Nguyen & Salazar 2019, "SmallInit"). For o_proj and down_proj, which
    write to the residual stream, it is divided by sqrt(2 n_layers), so that the stream's variance does not grow with
    depth (Radford et al. 2019, section 2.3).
    """
    shape = parameter_shapes(config)[name]
    # device="cpu" is explicit, here and below: a caller may be inside `with torch.device("meta")`.
    if name.endswith(".bias"):
        return torch.zeros(shape, device="cpu")
    if len(shape) == 1:
        return torch.ones(shape, device="cpu")
    std = math.sqrt(2 / (5 * config.d_model))
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std /= math.sqrt(2 * config.n_layers)
    # Not hash(): Python salts it differently in each process.
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    value = torch.zeros(shape, device="cpu")
    # Padding rows draw no numbers, so they change no other value.
    value[: sum(row_split(config, name))].normal_(0.0, std, generator=generator)
    return value
