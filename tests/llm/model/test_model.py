"""The model: its shapes, what each logit may depend on, the cache, and Hugging Face's view of the same weights."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llm.config import ModelConfig
from llm.config_file import load_config
from llm.model import rope
from llm.model.hf import from_hf, gguf_names, hf_names, to_hf
from llm.model.hf_config import hf_class, hf_config
from llm.model.transformer import (
    KVCache,
    Transformer,
    initial_value,
    padded_vocab_size,
    parameter_count,
    parameter_shapes,
    row_split,
)
from llm.training.storages import LiveStorages

CONFIGS = Path(__file__).parents[3] / "configs"
CHECKPOINTING = ("none", "selective", "full")
VOCAB = 300  # pads to 384


def small(**changes: object) -> ModelConfig:
    shape: dict[str, object] = {
        "n_layers": 2,
        "d_model": 64,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": 96,
        "vocab_size": VOCAB,
        "max_seq_len": 256,
    }
    return ModelConfig.model_validate(shape | changes)


VARIANTS = {
    "GQA": small(),
    "MHA, tied": small(n_kv_heads=4, tie_embeddings=True),
    "MQA, normalised heads": small(n_kv_heads=1, qk_norm=True),
    "tied, normalised heads, no padding": small(vocab_size=256, tie_embeddings=True, qk_norm=True),
    "other constants": small(rope_theta=500_000.0, norm_eps=1e-2),
    "head size, biases, window": small(qk_norm=False, head_dim=32, attention_bias="qkv", sliding_window=90),
    "all biases, YaRN": small(
        qk_norm=True,
        attention_bias="qkvo",
        rope_scaling={"kind": "yarn", "factor": 4.0, "original_max_seq_len": 64},
    ),
}


@pytest.fixture(params=VARIANTS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return VARIANTS[request.param]


def build(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model with every weight drawn at random: norms too, and logits far apart."""
    model = Transformer(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            elif name == "lm_head.weight":
                parameter *= 4
    return model


def random_sequences(config: ModelConfig, b: int, s: int, seed: int = 0) -> Tensor:
    assert config.vocab_size is not None
    return torch.randint(config.vocab_size, (b, s), generator=torch.Generator().manual_seed(seed))


def starts(*lengths: int, sequences: int = 1) -> Tensor:
    """doc_start of sequences made of documents of these lengths."""
    values: list[int] = []
    for length in lengths:
        values += [len(values)] * length
    return torch.tensor(values, dtype=torch.int32).repeat(sequences, 1)


class TestShapes:
    @pytest.mark.parametrize(("name", "count"), [("125m", 124_671_744), ("350m", 354_999_296), ("1.3b", 1_301_389_312)])
    def test_shipped_configs_build_on_the_meta_device_with_their_parameter_counts(self, name: str, count: int) -> None:
        config = load_config(CONFIGS / f"{name}.json").model.model_copy(update={"vocab_size": 32_000})
        with torch.device("meta"):
            model = Transformer(config)
        assert sum(p.numel() for p in model.parameters()) == parameter_count(config) == count

    def test_tiny_has_one_to_two_million_parameters_without_embeddings(self) -> None:
        config = load_config(CONFIGS / "tiny.json").model.model_copy(update={"vocab_size": 4096})
        assert 1e6 < parameter_count(config) - 2 * 4096 * config.d_model < 2e6

    def test_every_shipped_config_is_here(self) -> None:
        stems = {path.stem for path in CONFIGS.glob("*.json")} - {"schema"}
        assert stems == {"shakespeare", "tiny", "125m", "350m", "1.3b"}

    def test_padding_of_the_vocabulary_is_not_counted(self) -> None:
        assert padded_vocab_size(small()) == 384
        assert parameter_count(small(vocab_size=384)) - parameter_count(small()) == 2 * 84 * 64
        tied = {"tie_embeddings": True}
        assert parameter_count(small(vocab_size=384, **tied)) - parameter_count(small(**tied)) == 84 * 64

    def test_parameter_shapes_are_those_of_a_real_model(self, config: ModelConfig) -> None:
        real = {name: p.shape for name, p in Transformer(config).named_parameters()}
        assert parameter_shapes(config) == real
        assert list(parameter_shapes(config)) == list(real)

    def test_a_vocabulary_left_to_the_data_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"model\.vocab_size is null"):
            Transformer(small(vocab_size=None))

    def test_results(self, config: ModelConfig) -> None:
        model, ids = build(config), random_sequences(config, 2, 5)
        labels = random_sequences(config, 2, 5, seed=1)
        labels[0, 1] = -100
        assert model(ids).shape == (2, 5, config.vocab_size)
        torch.testing.assert_close(model(ids, last_only=True), model(ids)[:, -1:])
        each = model(ids, labels=labels, reduction="none")
        assert each.shape == (2, 5)
        assert each.dtype == torch.float32
        expected = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), reduction="none")
        torch.testing.assert_close(each.flatten(), expected)
        torch.testing.assert_close(model(ids, labels=labels), each.sum())
        torch.testing.assert_close(model(ids, labels=labels, reduction="mean"), each.sum() / 9)

    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    def test_z_loss_has_the_gradient_of_the_plain_formula_and_its_part_is_known(
        self, config: ModelConfig, reduction: str
    ) -> None:
        model, ids, labels = build(config), random_sequences(config, 2, 5), random_sequences(config, 2, 5, seed=1)
        labels[0, 1] = -100
        loss = model(ids, labels=labels, z_loss=0.01, reduction=reduction)
        found = torch.autograd.grad(loss, [*model.parameters()])
        logits, valid = model(ids).flatten(0, 1), labels.flatten() != -100
        z = (0.01 * logits.logsumexp(-1).square() * valid).sum() / (valid.sum() if reduction == "mean" else 1)
        nll = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction=reduction)
        torch.testing.assert_close(loss, nll + z)
        torch.testing.assert_close(model.lm_head.last_z, z.detach())
        for got, expected in zip(found, torch.autograd.grad(nll + z, [*model.parameters()]), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(ids, labels=labels, reduction=reduction), nll)
        assert not model.lm_head.last_z.numel()

    def test_angles_are_made_once_a_length_even_in_inference_mode(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Backward could not save what was made in inference mode."""
        made, cos_sin, config = list[int](), rope.cos_sin, VARIANTS["GQA"]
        monkeypatch.setattr(rope, "cos_sin", lambda c, *rest: made.append(rest[1]) or cos_sin(c, *rest))
        model, tokens = build(config), random_sequences(config, 2, 40)
        with torch.inference_mode():
            model(tokens)
        model(tokens).sum().backward()
        expected = build(config)(tokens[:, :30])  # another model, whose angles are made for 30 positions
        assert torch.equal(model(tokens[:, :30]), expected)
        assert made == [40, 30, 30]

    def test_loss_is_fp32_in_bf16_too(self) -> None:
        model = build(small()).bfloat16()
        ids = random_sequences(small(), 1, 8)
        assert model(ids).dtype == torch.bfloat16
        loss = model(ids, labels=ids)
        assert loss.dtype == torch.float32
        loss.backward()
        assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.parameters())


class TestInitialisation:
    def test_depends_on_seed_and_name_alone(self, config: ModelConfig) -> None:
        torch.manual_seed(1)
        one = Transformer(config)
        one.init_weights(7)
        torch.manual_seed(2)
        torch.rand(5)
        for name, parameter in one.named_parameters():
            assert torch.equal(parameter, initial_value(config, name, 7)), name
        other = initial_value(config, "layers.0.attn.qkv.weight", 8)
        assert not torch.equal(other, initial_value(config, "layers.0.attn.qkv.weight", 7))
        assert not torch.equal(other, initial_value(config, "layers.1.attn.qkv.weight", 8))

    def test_is_the_same_whatever_the_default_device(self) -> None:
        expected = initial_value(small(), "lm_head.weight", 3)
        with torch.device("meta"):
            assert torch.equal(initial_value(small(), "lm_head.weight", 3), expected)

    def test_scale(self) -> None:
        config = small(n_layers=8, d_model=256, d_ff=512)
        std = math.sqrt(2 / (5 * 256))
        for name, shape in parameter_shapes(config).items():
            value = initial_value(config, name, 0)
            assert value.dtype == torch.float32
            if len(shape) == 1:
                assert (value == 1).all()
                continue
            if name in ("embed_tokens.weight", "lm_head.weight"):
                assert not value[VOCAB:].any()
                value = value[:VOCAB]
            writes_to_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = std / math.sqrt(16) if writes_to_stream else std
            assert value.std().item() == pytest.approx(expected, rel=0.02)
            assert abs(value.mean().item()) < 0.03 * expected

    def test_first_loss_is_nearly_that_of_a_uniform_guess(self, config: ModelConfig) -> None:
        model = Transformer(config)
        model.init_weights(0)
        ids = random_sequences(config, 4, 64)
        loss = model(ids, labels=random_sequences(config, 4, 64, seed=1), reduction="mean")
        assert config.vocab_size is not None
        # After the last norm the logits have variance D * 2 / (5 D) = 0.4, which costs half of that.
        assert loss.item() == pytest.approx(math.log(config.vocab_size) + 0.2, abs=0.1)

    def test_a_tie_outlives_the_meta_device(self) -> None:
        config = small(tie_embeddings=True)
        with torch.device("meta"):
            model = Transformer(config)
        model.to_empty(device="cpu")
        assert model.lm_head.weight is model.embed_tokens.weight
        model.to(torch.bfloat16)
        assert model.lm_head.weight is model.embed_tokens.weight
        assert "lm_head.weight" not in dict(model.named_parameters())


class TestNoCheating:
    """Changing token j changes no logit before j and none in another document, bit for bit."""

    @pytest.mark.parametrize("checkpointing", ["none", "full"])
    @pytest.mark.parametrize("j", [0, 1, 63, 130, 131, 199])
    def test_in_packed_sequences(self, config: ModelConfig, j: int, checkpointing: str) -> None:
        model = build(config)
        model.activation_checkpointing = checkpointing
        ids = random_sequences(config, 2, 200)
        changed = ids.clone()
        changed[:, j] = (changed[:, j] + 1) % VOCAB % config.vocab_size
        documents = starts(1, 62, 1, 67, 69, sequences=2)
        for doc_start in (None, documents):
            before, after = (model(x, doc_start=doc_start) for x in (ids, changed))
            differs = (before != after).any(-1)
            distance = torch.arange(200) - j
            # Each layer looks back by a window.
            reach = config.n_layers * ((config.sliding_window or 200) - 1)
            inside = (distance >= 0) & (distance <= reach)
            if doc_start is not None:
                inside = inside & (doc_start[0] == doc_start[0, j])
            assert torch.equal(differs, inside.expand(2, -1))

    def test_in_another_sequence(self, config: ModelConfig) -> None:
        model, ids = build(config), random_sequences(config, 2, 40)
        changed = ids.clone()
        changed[0] = random_sequences(config, 1, 40, seed=9)[0]
        assert torch.equal(model(ids)[1], model(changed)[1])

    @torch.no_grad()
    def test_through_the_cache(self, config: ModelConfig) -> None:
        """What a position beyond the prompt holds cannot be seen, and neither can another document."""
        model, ids = build(config), random_sequences(config, 1, 60)
        documents = starts(20, 40)
        logits = []
        for fill in (0.0, 1e3):
            cache = KVCache.empty(config, 1, 80, "cpu", torch.float32)
            cache.k.fill_(fill)
            cache.v.fill_(fill)
            changed = ids.clone()
            changed[0, 10] = (ids[0, 10] + (fill > 0)) % config.vocab_size  # in the first document
            parts = [model(changed[:, :50], doc_start=documents[:, :50], cache=cache)]
            parts += [
                model(changed[:, i : i + 1], doc_start=documents[:, i : i + 1], cache=cache) for i in range(50, 60)
            ]
            logits.append(torch.cat(parts, 1))
        differs = (logits[0] != logits[1]).any(-1)[0]
        assert differs.nonzero()[:, 0].tolist() == list(range(10, 20))

    def test_gradients_stay_inside_too(self, config: ModelConfig) -> None:
        """The loss at position i has no gradient with respect to what i may not see."""
        model, ids = build(config), random_sequences(config, 1, 30)
        embedded: list[Tensor] = []
        model.embed_tokens.register_forward_hook(lambda *hooked: embedded.append(hooked[2].requires_grad_()))
        model(ids, doc_start=starts(10, 20))[0, 20].sum().backward(inputs=list(embedded))
        seen = embedded[0].grad[0].any(-1).nonzero()[:, 0].tolist()
        assert seen == list(range(10, 21))

    def test_nothing_is_learnt_from_random_tokens(self) -> None:
        """A model that saw its targets would fall below the entropy of what it cannot know."""
        config = small(vocab_size=50, d_model=32, n_heads=2, n_kv_heads=1, d_ff=64)
        model = Transformer(config)
        model.init_weights(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        generator = torch.Generator().manual_seed(0)

        def batch(sequences: int) -> tuple[Tensor, Tensor, Tensor]:
            tokens = torch.randint(50, (sequences, 65), generator=generator)
            return tokens[:, :-1], tokens[:, 1:], starts(20, 44, sequences=sequences)

        for _ in range(150):
            ids, labels, doc_start = batch(16)
            loss = model(ids, labels=labels, doc_start=doc_start, reduction="mean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            ids, labels, doc_start = batch(200)
            held_out = model(ids, labels=labels, doc_start=doc_start, reduction="mean").item()
        assert math.log(50) - 0.01 < held_out < math.log(50) + 0.2


class TestActivationCheckpointing:
    def test_changes_no_gradient_and_holds_less_the_more_it_computes_again(self, config: ModelConfig) -> None:
        """By the storages alive at the end of forward, and at the most of both passes."""
        model, ids = build(config), random_sequences(config, 2, 150)
        gradients, counts = [], []
        for checkpointing in CHECKPOINTING:
            model.activation_checkpointing = checkpointing
            with LiveStorages(model.parameters()) as count:
                loss = model(ids, labels=ids, doc_start=starts(100, 50, sequences=2), reduction="mean")
                held = count.bytes
                loss.backward()
            gradients.append({name: p.grad for name, p in model.named_parameters()})
            counts.append((held, count.peak))
            model.zero_grad(set_to_none=True)
        for other in gradients[1:]:
            assert all(torch.equal(other[name], g) for name, g in gradients[0].items())
        (none, none_peak), (selective, selective_peak), (full, full_peak) = counts
        assert none > selective > full
        assert none_peak > selective_peak > full_peak

    def test_selective_multiplies_no_matrix_twice(self) -> None:
        config = small(n_layers=2)
        ids = random_sequences(config, 1, 64)

        def flops(checkpointing: str) -> int:
            model = Transformer(config, activation_checkpointing=checkpointing)
            model.init_weights(0)
            with FlopCounterMode(display=False) as count:
                model(ids, labels=ids).backward()
            return count.get_total_flops()

        once, selective, full = (flops(checkpointing) for checkpointing in CHECKPOINTING)
        assert selective == once
        assert full > 1.1 * once


class TestCache:
    @torch.no_grad()
    @pytest.mark.parametrize("pieces", [[40], [1] * 40, [17, 1, 1, 13, 8]])
    def test_logits_are_those_without_a_cache(self, config: ModelConfig, pieces: list[int]) -> None:
        model, ids = build(config), random_sequences(config, 2, 40)
        whole = model(ids)
        cache = KVCache.empty(config, 2, 50, "cpu", torch.float32)
        parts = []
        for length in pieces:
            parts.append(model(ids[:, cache.length : cache.length + length], cache=cache))
        assert cache.length == 40
        cached = torch.cat(parts, dim=1)
        torch.testing.assert_close(cached, whole, atol=1e-5 * whole.abs().max().item(), rtol=0)
        assert torch.equal(cached.argmax(-1), whole.argmax(-1))

    @torch.no_grad()
    def test_a_prompt_padded_on_the_left_goes_on_as_it_would_alone(self) -> None:
        """Sequences of unequal prompts share one cache; rotations are relative, so an offset changes nothing."""
        config = small()
        model, ids = build(config), random_sequences(config, 1, 24)
        alone = model(ids)
        cache = KVCache.empty(config, 1, 30, "cpu", torch.float32)
        padded = torch.cat((torch.zeros(1, 6, dtype=torch.long), ids), dim=1)
        doc_start = starts(6, 24)
        parts = [model(padded[:, :20], doc_start=doc_start[:, :20], cache=cache)]
        parts += [model(padded[:, i : i + 1], doc_start=doc_start[:, i : i + 1], cache=cache) for i in range(20, 30)]
        torch.testing.assert_close(torch.cat(parts, 1)[:, 6:], alone, atol=1e-4, rtol=1e-4)

    def test_overflow_is_refused_before_anything_is_written(self) -> None:
        config = small()
        cache = KVCache.empty(config, 1, 4, "cpu", torch.float32)
        with torch.no_grad(), pytest.raises(ValueError, match="5 tokens do not fit into a cache of 4"):
            build(config)(random_sequences(config, 1, 5), cache=cache)
        assert cache.length == 0
        assert not cache.k.any()


class TestHuggingFace:
    def test_mapping_round_trips_bit_for_bit(self, config: ModelConfig) -> None:
        model = build(config)
        theirs: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            parts = to_hf(config, name, parameter.detach())
            assert not theirs.keys() & parts.keys()
            theirs |= parts
        assert not any("qkv" in name or "gate_up" in name for name in theirs)
        assert theirs["model.embed_tokens.weight"].shape == (config.vocab_size, config.d_model)
        for name, parameter in model.named_parameters():
            back = from_hf(config, name, theirs.__getitem__)
            assert back.dtype == parameter.dtype
            assert torch.equal(back, parameter), name

    def test_every_parameter_has_names_for_each_of_its_matrices(self, config: ModelConfig) -> None:
        for names_of in (hf_names, gguf_names):
            names: list[str] = []
            for name in parameter_shapes(config):
                assert len(names_of(name)) == len(row_split(config, name)), name
                names += names_of(name)
            assert len(set(names)) == len(names)

    def test_padding_comes_back_as_zero(self) -> None:
        config = small()
        back = from_hf(config, "lm_head.weight", lambda name: torch.ones(VOCAB, 64))
        assert back.shape == (384, 64)
        assert (back[:VOCAB] == 1).all()
        assert not back[VOCAB:].any()

    def test_another_shape_or_name_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"self_attn.q_proj.weight has shape \[3, 3\].*\[64, 64\]"):
            from_hf(small(), "layers.1.attn.qkv.weight", lambda name: torch.ones(3, 3))
        with pytest.raises(KeyError, match=r"layers.1.attn.bias is no parameter"):
            to_hf(small(), "layers.1.attn.bias", torch.ones(3))

    def test_transformers_computes_the_same_logits_and_gradients(self, config: ModelConfig, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        model = build(config).eval()
        tensors: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            tensors |= {k: v.clone() for k, v in to_hf(config, name, parameter.detach()).items()}
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(hf_config(config, bos_token_id=1, eos_token_id=2)))

        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert type(theirs).__name__ == hf_class(config)[0]
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert next(theirs.parameters()).dtype == torch.float32
        assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (1, 2)

        ids = random_sequences(config, 2, 200)
        ours, hf = model(ids), theirs(ids).logits
        assert ours.shape == hf.shape
        assert (ours - hf).abs().max() <= 1e-5 * hf.abs().max()

        model(ids, labels=ids, reduction="mean").backward()
        torch.nn.functional.cross_entropy(hf.flatten(0, 1), ids.flatten()).backward()
        gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
        for name, parameter in model.named_parameters():
            expected = from_hf(config, name, gradients.__getitem__)
            assert (parameter.grad - expected).abs().max() <= 1e-4 * expected.abs().max(), name


class TestCompile:
    def test_compiled_blocks_compute_the_same(self) -> None:
        """Each block is one graph; with gradients, and with activation checkpointing."""
        torch._dynamo.reset()
        config = small()
        ids = random_sequences(config, 2, 40)

        def losses_and_gradients(model: Transformer) -> list[Tensor]:
            model.zero_grad()
            loss = model(ids, labels=ids, doc_start=starts(15, 25, sequences=2))
            loss.backward()
            return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

        model = build(config)
        expected = losses_and_gradients(model)
        for layer in model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
        for checkpointing in CHECKPOINTING:
            model.activation_checkpointing = checkpointing
            for got, want in zip(losses_and_gradients(model), expected, strict=True):
                torch.testing.assert_close(got, want)
