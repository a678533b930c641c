"""What the modules tell of their work adds up to the closed formulas of the whole architecture."""

from pathlib import Path

import pytest
import torch
from running import CONFIGS

from kernels import work
from kernels.work import Work
from llm.config import ModelConfig
from llm.config_file import load_config
from llm.model.flops import flops_per_token, model_work
from llm.model.transformer import MLP

SMALL = {"n_layers": 3, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96, "vocab_size": 300}


@pytest.mark.parametrize("vocab_size", [32_000, 301])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"tie_embeddings": True}])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_flops_of_a_token_are_6n_and_12ldt(path: Path, changes: dict[str, bool], vocab_size: int) -> None:
    config = load_config(path).model.model_copy(update={"vocab_size": vocab_size, **changes})
    d, head_dim = config.d_model, config.head_size
    attention = d * head_dim * (2 * config.n_heads + 2 * config.n_kv_heads)
    norms = 2 * d + (2 * head_dim if config.qk_norm else 0)
    n = config.n_layers * (attention + 3 * d * config.d_ff + norms) + d + vocab_size * d
    for seq_len in (77, 2048):
        scores = 12 * config.n_layers * d * seq_len
        flops = flops_per_token(config, seq_len)
        assert (flops.usual, flops.causal) == (6 * n + scores, 6 * n + scores // 2)


@pytest.mark.parametrize("window", [1, 50, 77, 1000])
def test_a_sliding_window_counts_the_pairs_that_it_has(window: int) -> None:
    """Each pair, head and layer takes 12 head_dim FLOPs; a causal token and its own key are counted as a half."""
    seq_len = 77
    config = ModelConfig(**SMALL)
    plain = flops_per_token(config, seq_len)
    flops = flops_per_token(config.model_copy(update={"sliding_window": window}), seq_len)
    pairs = sum(min(i + 1, window) for i in range(seq_len)) / seq_len
    half = min(window, seq_len) / seq_len / 2  # of the first token of a window, and of each that loses one
    assert flops.causal == pytest.approx(plain.causal - 12 * 3 * 64 * (seq_len / 2 - (pairs - half)), abs=12 * 3 * 64)
    assert flops.usual == plain.usual - 12 * 3 * 64 * (seq_len - min(window, seq_len))


def test_the_least_work_is_that_of_every_op_of_the_model() -> None:
    config = ModelConfig(**SMALL, qk_norm=True)
    tokens, pairs, item, layers, heads, kv_heads, head_dim = 50, 700.0, 2, 3, 4, 2, 16
    found = model_work(config, tokens, pairs, item)
    shapes = [(64, 64 + 2 * 32), (64, 64), (64, 192), (96, 64)]
    for i, phase in enumerate(("forward", "backward")):
        products = sum((work.linear(item, tokens, *shape)[i] for shape in shapes), Work()) * layers
        expected = {
            "matmul": products,
            "attention": work.attention(item, tokens, heads, kv_heads, head_dim, pairs)[i] * layers,
            "add_rms_norm": work.add_rms_norm(item, tokens, 64)[i] * (2 * layers),
            "rms_norm": work.rms_norm(item, tokens, 64)[i],
            "norm_rope": work.norm_rope(item, tokens, heads, kv_heads, head_dim)[i] * layers,
            "swiglu": work.swiglu(item, tokens, 96)[i] * layers,
            "linear_cross_entropy": work.linear_cross_entropy(item, tokens, 64, 300)[i],
            "embedding": Work(2 * item * tokens * 64),
        }
        assert {op: least for (found_phase, op), least in found.items() if found_phase == phase} == expected


def test_a_module_with_weights_that_tells_no_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else FLOPs, MFU and the plan would be too low, and nobody would know."""
    original = MLP.__init__

    def with_bias(self: MLP, config: ModelConfig) -> None:
        original(self, config)
        self.gate = torch.nn.Linear(8, 8)

    monkeypatch.setattr(MLP, "__init__", with_bias)
    with pytest.raises(TypeError, match=r"Linear has weights and no work\(\)"):
        model_work(ModelConfig(**SMALL, rope_theta=123.0), 1, 1.0, 2)  # a config whose model nobody holds yet
