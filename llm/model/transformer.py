"""The model: a Llama-family decoder and its initialisation.

Shapes: B rows, S tokens a row, D = d_model, Hq = n_heads, Hkv = n_kv_heads, head_dim = D / Hq, F = d_ff, V words.
"""

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import kernels
from llm.config import ActivationCheckpointing, ModelConfig
from llm.errors import UserError

VOCAB_MULTIPLE = 128  # matrix products with the vocabulary want aligned widths
IGNORE_INDEX = -100  # a label without loss


def check_backend(device: torch.device) -> None:
    """Raises UserError where LLM_KERNELS asks for kernels that cannot run on this device."""
    try:
        described = kernels.describe(device)
    except ValueError as error:
        raise UserError(str(error)) from None
    for op, chosen in described.items():
        if chosen["backend"] == "error":
            raise UserError(f"LLM_KERNELS={os.environ.get('LLM_KERNELS')}: {chosen['reason']}; unset it ({op})")


def true_vocab_size(config: ModelConfig) -> int:
    """V; raises ValueError while the config leaves it to the data."""
    if config.vocab_size is None:
        raise ValueError("model.vocab_size is null: take it from the data before building a model")
    return config.vocab_size


def padded_vocab_size(config: ModelConfig) -> int:
    """V rounded up to a multiple of 128: the rows of the embedding and of the LM head."""
    return math.ceil(true_vocab_size(config) / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass
class KVCache:
    """Keys and values of the tokens so far, preallocated; forward writes into it and moves `length`."""

    k: Tensor  # [n_layers, B, Hkv, max_len, head_dim], keys after RoPE
    v: Tensor  # like k
    cos: Tensor  # fp32 [max_len, head_dim / 2], RoPE's angles at every position
    sin: Tensor
    length: int = 0  # tokens held, the same in every row

    @classmethod
    def empty(
        cls, config: ModelConfig, batch: int, max_len: int, device: torch.device | str, dtype: torch.dtype
    ) -> "KVCache":
        device = torch.device(device)
        if device.type == "cpu":  # what attention computes in there: else each step would convert all of it
            dtype = torch.promote_types(dtype, torch.float32)
        shape = (config.n_layers, batch, config.n_kv_heads, max_len, config.head_dim)
        k, v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        return cls(k, v, *kernels.rope_cos_sin(0, max_len, config.head_dim, config.rope_theta, device))

    @property
    def max_len(self) -> int:
        return self.k.shape[3]


@dataclass
class Context:
    """What every layer of one forward pass shares."""

    cos: Tensor  # fp32 [S, head_dim / 2]
    sin: Tensor
    doc_start: Tensor | None = None  # int32 [B, S]
    mask: Tensor | None = None  # kernels.attention_mask; in a step, additive [B, 1, 1, visible]
    slots: Tensor | None = None  # int64 [S], where in the cache these tokens go
    visible: int = 0  # slots of the cache, from its first, that attention reads
    is_step: bool = False  # one token a row, which sees all that the mask lets it
    checkpointing: ActivationCheckpointing = "none"


class Linear(nn.Linear):
    """A linear layer without a bias whose weight is left to Transformer.init_weights."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Embedding):
    """An embedding whose weight is left to Transformer.init_weights.

    All that follows computes in the dtype of its output: compute_dtype, or where that is None its weight's.
    """

    def __init__(self, rows: int, width: int, compute_dtype: torch.dtype | None) -> None:
        super().__init__(rows, width)
        self.compute_dtype = compute_dtype

    def reset_parameters(self) -> None:
        pass

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).to(self.compute_dtype or self.weight.dtype)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm of the residual stream, the residual stream) after x has been added to it."""
        weight = self.weight.to(x.dtype)
        if residual is None:
            return kernels.rms_norm(x, weight, self.eps), x
        return kernels.add_rms_norm(x, residual, weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.qkv = Linear(config.d_model, (config.n_heads + 2 * config.n_kv_heads) * config.head_dim)
        self.o_proj = Linear(config.d_model, config.d_model)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, context: Context, cached: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x: [B, S, D]; cached: this layer's keys and values [B, Hkv, max_len, head_dim], written at context.slots."""
        b, s, _ = x.shape
        q, k, v = (
            self.qkv(x).view(b, s, -1, self.head_dim).split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=2)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q)[0], self.k_norm(k)[0]
        q, k = kernels.rope(q, k, context.cos, context.sin)
        if cached is not None:
            assert context.slots is not None
            for held, new in zip(cached, (k, v), strict=True):
                held.index_copy_(2, context.slots, new.transpose(1, 2).to(held.dtype))
            k, v = (held[:, :, : context.visible].transpose(1, 2) for held in cached)
        if context.is_step:
            # The heads that share keys stand side by side as queries of one head, so no key is copied for them. The
            # torch backend takes any mask and, on a GPU, keeps the shapes that a CUDA graph needs.
            q = q.view(b, self.n_kv_heads, -1, self.head_dim).transpose(1, 2)
            out = kernels.attention(q, k, v, causal=False, mask=context.mask, backend="torch").transpose(1, 2)
        else:
            out = kernels.attention(q, k, v, doc_start=context.doc_start, mask=context.mask)
        return self.o_proj(out.reshape(b, s, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.d_model, 2 * config.d_ff)
        self.down_proj = Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(kernels.swiglu(self.gate_up(x)))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, residual: Tensor | None, context: Context, cached: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x, residual) [B, S, D]: the last branch's output, and the stream that it has still to be added to."""
        if context.checkpointing == "none" or not torch.is_grad_enabled():
            return self._compute(x, residual, context, cached)

        # Inside the block, so that torch.compile sees the whole of it. Nothing here is random.
        def compute(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
            return self._compute(x, residual, context, cached)

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


_PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.llm.attention_forward.default,
}
"""The ops of a block whose results "selective" keeps: nearly all of its arithmetic."""


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


_keeping_products = partial(create_selective_checkpoint_contexts, _keep_products)


class LMHead(nn.Module):
    """Owns the output weight, and computes the loss itself.

    The fused loss and its gradient need the weight, and under ZeRO-3 a weight exists only inside its own module's
    forward and backward.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.vocab_size = true_vocab_size(config)
        self.weight: Tensor = nn.Parameter(torch.empty(padded_vocab_size(config), config.d_model))
        self.last_z: Tensor = torch.empty(0)
        """The part of the last loss that is z_loss * lse^2, without gradient; empty without a z_loss."""

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, reduction: str = "sum", z_loss: float = 0.0
    ) -> Tensor:
        """hidden [B, S, D], labels int64 [B, S] -> the loss; without labels the logits [B, S, V], without padding."""
        weight = self.weight.to(hidden.dtype)
        if labels is None:
            return nn.functional.linear(hidden, weight)[..., : self.vocab_size]
        loss, self.last_z = kernels.linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            labels.reshape(-1),
            vocab_size=self.vocab_size,
            ignore_index=IGNORE_INDEX,
            z_loss=z_loss,
            return_z=True,
            reduction=reduction,
        )
        return loss.view(labels.shape) if reduction == "none" else loss


class Transformer(nn.Module):
    """The decoder; it builds on the meta device too.

    Its weights are undefined until `init_weights` or a checkpoint fills them.

    Args:
        config: with vocab_size set (ValueError otherwise).
        activation_checkpointing: what the forward pass keeps of a block for backward, which computes the rest again:
            "none" of it recomputed; "full": its inputs alone (Chen et al. 2016); "selective": the results of its
            matrix products and of attention too (Korthikanti et al. 2022), so that only cheap ops run twice. The
            gradients are the same, bit for bit.
        compute_dtype: of activations and matrix products, to which weights of another dtype are rounded as they are
            used; their gradients keep the weights' dtype. None: the weights' own.
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
        self.embed_tokens = Embedding(padded_vocab_size(config), config.d_model, compute_dtype)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = LMHead(config)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keeps the tie through to_empty, which makes each module's parameter anew."""
        super()._apply(fn, recurse)
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        return self

    def compile_blocks(self, *, fullgraph: bool = True) -> None:
        """Has torch.compile compile each block, all from one compilation.

        fullgraph: what would break a block's graph is an error. Under ZeRO-3 DeepSpeed's hooks do, around every module.
        """
        for layer in self.layers:
            layer.compile(fullgraph=fullgraph)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fills every parameter with its `initial_value`."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(self.config, name, seed))

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
        """The loss when labels are given, else logits.

        Args:
            input_ids: int64 [B, S].
            labels: int64 [B, S], the token that follows each one, -100 where there is no loss.
            doc_start: int32 [B, S], for each position the index (in the row; in the cache, if there is one) where its
                document begins; None: each row is one document.
            cache: tokens before these, to which these are added. Positions go on from cache.length.
            reduction: of the loss: "sum", "mean", or "none" for [B, S].
            last_only: logits of the last position only, [B, 1, V].
            z_loss: weight of lse^2 in the loss (kernels.cross_entropy); `lm_head.last_z` is then this part of it.

        Returns the loss, fp32 and in nats, or the logits [B, S, V] in the weights' dtype. Raises ValueError where the
        tokens do not fit into the cache.
        """
        s = input_ids.shape[1]
        past = 0 if cache is None else cache.length
        if cache is not None and past + s > cache.max_len:
            raise ValueError(f"{past + s} tokens do not fit into a cache of {cache.max_len}")
        x = self.embed_tokens(input_ids)
        mask = kernels.attention_mask(doc_start, past + s, x.dtype)
        if cache is None:
            cos, sin = kernels.rope_cos_sin(0, s, self.config.head_dim, self.config.rope_theta, input_ids.device)
            context = Context(cos, sin, doc_start, mask, checkpointing=self.activation_checkpointing)
        else:
            rows = slice(past, past + s)
            slots = torch.arange(past, past + s, device=input_ids.device)
            context = Context(cache.cos[rows], cache.sin[rows], doc_start, mask, slots, past + s)
        x = self._layers(x, context, cache)
        if cache is not None:
            cache.length = past + s
        if last_only:
            x = x[:, -1:]
        return self.lm_head(x, labels, reduction, z_loss)

    def step(
        self, input_ids: Tensor, cache: KVCache, position: Tensor, visible: int, first: Tensor | None = None
    ) -> Tensor:
        """The logits after one token a row, with shapes that depend on no value: a GPU can replay it as a CUDA graph.

        Args:
            input_ids: int64 [B, 1].
            cache: holds the tokens before; these are written into it, but cache.length is left to the caller.
            position: int64 [1], the slot of these tokens, the same in every row.
            visible: slots that attention reads, more than `position`. Those after `position` are masked.
            first: int64 [B], each row's first slot; those before are masked. None: 0, and visible is position + 1.

        Returns [B, 1, V] in the weights' dtype.
        """
        x = self.embed_tokens(input_ids)
        mask: Tensor | None = None
        if first is not None:
            slot = torch.arange(visible, device=x.device)
            hidden = (slot > position) | (slot < first[:, None])
            mask = torch.zeros(hidden.shape, dtype=cache.k.dtype, device=x.device).masked_fill_(hidden, -torch.inf)
            mask = mask[:, None, None]
        cos, sin = cache.cos.index_select(0, position), cache.sin.index_select(0, position)
        context = Context(cos, sin, mask=mask, slots=position, visible=visible, is_step=True)
        return self.lm_head(self._layers(x, context, cache))

    def _layers(self, x: Tensor, context: Context, cache: KVCache | None) -> Tensor:
        """Embedded tokens [B, S, D] -> what the LM head takes."""
        residual: Tensor | None = None
        for i, layer in enumerate(self.layers):
            cached = None if cache is None else (cache.k[i], cache.v[i])
            x, residual = layer(x, residual, context, cached)
        return self.norm(x, residual)[0]


@lru_cache
def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """The shape of every parameter by name, in the model's order; a tied LM head is the embedding and not listed."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in Transformer(config).named_parameters()}


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters; rows that only pad the vocabulary are not counted."""
    padding = (padded_vocab_size(config) - true_vocab_size(config)) * config.d_model
    total = sum(shape.numel() for shape in parameter_shapes(config).values())
    return total - padding * (1 if config.tie_embeddings else 2)


def initial_value(config: ModelConfig, name: str, seed: int) -> Tensor:
    """The value that parameter `name` starts from, fp32 on the CPU.

    It depends on the configuration, the name and the seed alone: not on the device, the number of processes, or the
    order in which parameters are made. Norms start at 1, padding rows of the vocabulary at 0. Matrices are normal with
    standard deviation sqrt(2 / (5 D)) (Nguyen & Salazar 2019, "SmallInit"); for those that write to the residual stream
    (o_proj, down_proj) it is divided by sqrt(2 n_layers), so that the stream's variance does not grow with depth
    (Radford et al. 2019, section 2.3).
    """
    shape = parameter_shapes(config)[name]
    if len(shape) == 1:
        return torch.ones(shape, device="cpu")
    std = math.sqrt(2 / (5 * config.d_model))
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        std /= math.sqrt(2 * config.n_layers)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    value = torch.zeros(shape, device="cpu")
    rows = true_vocab_size(config) if name in VOCABULARY else shape[0]
    value[:rows].normal_(0.0, std, generator=generator)
    return value


VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
