"""Decoding: the tokens are those of the whole forward pass, and of each prompt alone."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from llm.config import ModelConfig, RopeScalingConfig
from llm.errors import UserError
from llm.inference.decode import Decoder, Token, generate, generate_batch, greedy, native_decoder
from llm.inference.sampling import Sampling
from llm.model.transformer import MLP, KVCache, Transformer

CONFIG = ModelConfig(n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, d_ff=96, vocab_size=300, max_seq_len=48)


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(CONFIG)
    model.init_weights(5)
    with torch.no_grad():
        model.lm_head.weight *= 8  # a random model's choices are near ties without this
    return model.eval()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestGenerate:
    def test_greedy_tokens_are_those_without_a_cache(self, model: Transformer) -> None:
        ids = [3, 1, 4, 1, 5]
        new = list(generate(model, ids, max_new_tokens=30, temperature=0))
        assert len(new) == 30
        for token in new:
            with torch.no_grad():
                assert token == model(torch.tensor([ids]))[0, -1].argmax().item()
            ids = [*ids, token]

    def test_a_seed_repeats_and_another_does_not(self, model: Transformer) -> None:
        def draw(seed: int) -> list[int]:
            return list(generate(model, [1, 2], max_new_tokens=20, temperature=1.5, seed=seed))

        assert draw(0) == draw(0)
        assert draw(0) != draw(1)

    @pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-30}])
    def test_every_narrowing_ends_at_greedy(self, model: Transformer, options: dict[str, float]) -> None:
        greedy = list(generate(model, [1, 2], max_new_tokens=15, temperature=0))
        assert list(generate(model, [1, 2], max_new_tokens=15, **options)) == greedy

    def test_stops_before_eos(self, model: Transformer) -> None:
        greedy = list(generate(model, [7], max_new_tokens=20, temperature=0))
        eos = greedy[10]
        ids = list(generate(model, [7], max_new_tokens=20, temperature=0, eos_ids=[1000, eos]))
        assert ids == greedy[: greedy.index(eos)]

    def test_stops_where_the_context_is_full(self, model: Transformer) -> None:
        assert len(list(generate(model, [1] * 40, max_new_tokens=100, temperature=0))) == 8
        assert len(list(generate(model, [1] * 47, max_new_tokens=100, temperature=0))) == 1

    @pytest.mark.parametrize("length", [48, 49, 1000])
    def test_a_prompt_without_room_is_refused(self, model: Transformer, length: int) -> None:
        with pytest.raises(UserError, match=rf"the prompt is {length} tokens long and the model holds 48"):
            next(generate(model, [1] * length, max_new_tokens=1))

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("max_new_tokens", 0),
            ("temperature", -0.1),
            ("temperature", float("nan")),
            ("temperature", float("inf")),
            ("top_k", 0),
            ("top_p", 0.0),
            ("top_p", 1.1),
            ("min_p", -0.1),
            ("min_p", 1.5),
            ("repetition_penalty", 0.0),
            ("repetition_penalty", float("nan")),
            ("seed", -1),
            ("seed", 2**64),
        ],
    )
    def test_an_option_out_of_range_is_named(self, model: Transformer, option: str, value: float) -> None:
        with pytest.raises(UserError, match=f"--{option} {value}: must be"):
            next(generate(model, [1], **({"max_new_tokens": 1} | {option: value})))

    def test_records_no_gradients_and_leaves_no_inference_mode_behind(self, model: Transformer) -> None:
        modes: list[bool] = []
        hook = model.lm_head.register_forward_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
        for _ in generate(model, [1], max_new_tokens=3):
            assert not torch.is_inference_mode_enabled()
        hook.remove()
        assert modes == [True]  # the prompt's; the steps are not torch's


class TestBatch:
    PROMPTS = ([3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [8, 4])

    def sequences(self, model: Transformer, prompts, **options) -> list[list[Token]]:
        sequences: list[list[Token]] = [[] for _ in prompts]
        for token in generate_batch(model, prompts, **({"max_new_tokens": 20} | options)):
            sequences[token.sequence].append(token)
        return sequences

    @pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=0.9, top_p=0.9, seed=4)])
    def test_prompts_of_different_lengths_give_what_each_gives_alone(
        self, model: Transformer, sampling: Sampling
    ) -> None:
        together = self.sequences(model, self.PROMPTS, sampling=sampling)
        for prompt, sequence in zip(self.PROMPTS, together, strict=True):
            (alone,) = self.sequences(model, [prompt], sampling=sampling)
            assert [token.id for token in sequence] == [token.id for token in alone]
            assert [token.logprob for token in sequence] == pytest.approx([token.logprob for token in alone], abs=1e-5)

    def test_each_sequence_ends_by_itself(self, model: Transformer) -> None:
        """At EOS, where its own context is full, or where the caller has enough."""
        greedy = Sampling(temperature=0)
        whole = [[token.id for token in sequence] for sequence in self.sequences(model, self.PROMPTS, sampling=greedy)]
        eos = whole[2][4]
        for ids, short in zip(whole, self.sequences(model, self.PROMPTS, sampling=greedy, eos_ids=[eos]), strict=True):
            assert [token.id for token in short] == (ids[: ids.index(eos)] if eos in ids else ids)
        long = [[1] * 44, [1] * 47, [1]]
        assert [len(sequence) for sequence in self.sequences(model, long, sampling=greedy)] == [4, 1, 20]
        finished: set[int] = set()
        counts = [0] * 4
        for token in generate_batch(model, self.PROMPTS, max_new_tokens=20, sampling=greedy, finished=finished):
            counts[token.sequence] += 1
            if counts[token.sequence] == 5 * token.sequence + 1:
                finished.add(token.sequence)
        assert counts == [1, 6, 11, 16]

    def test_streams_draw_differently_and_by_their_number_alone(self, model: Transformer) -> None:
        hot = Sampling(temperature=2.0)
        a, b, again = self.sequences(model, [[1, 2]] * 3, sampling=hot, streams=[0, 1, 0])
        ids = [[token.id for token in sequence] for sequence in (a, b, again)]
        assert ids[0] == ids[2] != ids[1]
        assert ids[1] == list(generate(model, [1, 2], max_new_tokens=20, temperature=2.0, seed=1))

    def test_logprobs_are_the_models_own(self, model: Transformer) -> None:
        (sequence,) = self.sequences(
            model, [[1, 2]], sampling=Sampling(temperature=1.5, top_k=9, repetition_penalty=1.5)
        )
        ids = [1, 2, *(token.id for token in sequence)]
        with torch.no_grad():
            expected = model(torch.tensor([ids]))[0].log_softmax(-1)
        for position, token in enumerate(sequence, 1):
            assert token.logprob == pytest.approx(expected[position, token.id].item(), abs=1e-4)
            assert math.exp(token.logprob) <= 1

    @torch.inference_mode()
    @pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])
    def test_a_step_of_fixed_shape_computes_the_same(self, model: Transformer, prompts) -> None:
        """What a GPU replays: attention over whole buckets of slots, the empty ones masked."""
        as_it_comes, in_buckets = (Decoder(model, prompts, 30, bucket) for bucket in (1, 16))
        torch.testing.assert_close(as_it_comes.prefill(), in_buckets.prefill())
        for token in range(30):
            tokens = [token + sequence for sequence in range(len(prompts))]
            torch.testing.assert_close(as_it_comes.step(tokens), in_buckets.step(tokens), atol=1e-4, rtol=1e-4)

    @torch.inference_mode()
    def test_the_steps_on_a_cpu_are_not_torchs_and_yet_the_same(self, model: Transformer) -> None:
        native, by_torch = (Decoder(model, self.PROMPTS, 30, bucket) for bucket in (None, 1))
        torch.testing.assert_close(native.prefill(), by_torch.prefill())
        for token in range(30):
            tokens = [token + sequence for sequence in range(4)]
            torch.testing.assert_close(native.step(tokens), by_torch.step(tokens), atol=1e-4, rtol=1e-4)

    def test_bf16_is_near_fp32(self, model: Transformer) -> None:
        (exact,) = self.sequences(model, self.PROMPTS[:1], sampling=Sampling(temperature=0))
        half = Transformer(CONFIG)
        half.load_state_dict(model.state_dict())
        (near,) = self.sequences(half.bfloat16().eval(), self.PROMPTS[:1], sampling=Sampling(temperature=0))
        assert near[0].id == exact[0].id
        assert near[0].logprob == pytest.approx(exact[0].logprob, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 1, "qk_norm": True, "norm_eps": 1e-2},
        {"n_kv_heads": 4, "tie_embeddings": True, "rope_theta": 100.0},
        {"d_ff": 99, "vocab_size": 301, "d_model": 576, "n_layers": 1},  # no multiples of a vector's width
        {"attention_bias": "qkvo", "qk_norm": True, "head_dim": 48},
        {"attention_bias": "qkv", "qk_norm": False, "head_dim": 32, "embedding_rows": 333},
        {"rope_scaling": RopeScalingConfig(kind="yarn", factor=4.0, original_max_seq_len=6)},
    ],
)
@torch.inference_mode()
def test_a_native_step_computes_what_the_model_does(changes: dict, dtype: torch.dtype) -> None:
    """On any number of threads; with bf16 weights, what those weights give in fp32."""
    config = CONFIG.model_copy(update=changes)
    model = Transformer(config)
    model.init_weights(3)
    noise = generator()
    for name, parameter in model.named_parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise) if parameter.dim() == 1 else 0.0)
        parameter.mul_(4 if name == "lm_head.weight" else 1)
    model.to(dtype)
    exact = Transformer(config)
    exact.load_state_dict(model.state_dict())
    ids = torch.randint(config.vocab_size, (6, 15), generator=generator())
    first = torch.tensor([0, 3, 0, 1, 14, 7])
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        cache = KVCache.empty(config, 6, 16, "cpu", dtype)
        native = native_decoder(model, cache, first)
        steps = torch.stack([torch.from_numpy(native.step(ids[:, i].numpy(), i)) for i in range(15)], dim=1)
        for sequence, begin in enumerate(first.tolist()):
            expected = exact(ids[sequence : sequence + 1, begin:])[0]
            assert (steps[sequence, begin:] - expected).abs().max() <= 1e-5 * expected.abs().max()
    torch.set_num_threads(before)
    with pytest.raises(ValueError, match="a slot of the cache"):
        native.step(ids[:, 0].numpy(), 16)


@pytest.mark.parametrize("bucket", [None, 1, 8])
@pytest.mark.parametrize("window", [1, 5, 17, 40])
@torch.inference_mode()
def test_with_a_sliding_window_each_token_sees_as_much_as_in_one_pass(window: int, bucket: int | None) -> None:
    """Of prompts shorter and longer than the window, decoded by the C++ and by torch."""
    model = Transformer(CONFIG.model_copy(update={"sliding_window": window, "qk_norm": False}))
    model.init_weights(0)
    prompts = [torch.randint(300, (n,), generator=generator()).tolist() for n in (3, 12, 20)]
    decoder = Decoder(model, prompts, 10, bucket)
    logits = decoder.prefill()
    for _ in range(10):
        for sequence, prompt in enumerate(prompts):
            expected = model(torch.tensor([prompt]))[0, -1]
            torch.testing.assert_close(torch.from_numpy(logits[sequence]), expected, atol=1e-5, rtol=1e-5)
            prompt.append(int(expected.argmax()))
        logits = decoder.step([prompt[-1] for prompt in prompts])


def test_a_deep_model_with_large_weights_decodes_in_cpp_though_bf16_rounds_it_much(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = Transformer(ModelConfig(n_layers=24, d_model=128, n_heads=2, n_kv_heads=1, d_ff=384, vocab_size=300))
    model.init_weights(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    prompts = torch.randint(3, 300, (16, 8), generator=generator()).tolist()
    list(generate_batch(model.bfloat16().eval(), prompts, max_new_tokens=2, sampling=Sampling()))
    assert "decoding" not in capsys.readouterr().err


def geglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate) * up


class GeGLU(MLP):
    activation = staticmethod(geglu)


class TestChangedModel:
    """A model that csrc/decoder/decoder.cpp does not compute is decoded by torch, and a line says so."""

    PROMPTS = TestBatch.PROMPTS

    def check(self, model: Transformer, capsys: pytest.CaptureFixture[str], why: str) -> None:
        """Twice the tokens of torch, and one line."""
        by_torch = Decoder(model, self.PROMPTS, 20, 1)
        with torch.inference_mode():
            logits = [by_torch.prefill()]
            for _ in range(19):
                logits.append(by_torch.step(logits[-1].argmax(-1).tolist()))
        expected = np.stack(logits).argmax(-1).T.tolist()
        for _ in range(2):
            sequences: list[list[int]] = [[] for _ in self.PROMPTS]
            for token in generate_batch(model, self.PROMPTS, max_new_tokens=20, sampling=Sampling(temperature=0)):
                sequences[token.sequence].append(token.id)
            assert sequences == expected
        out, err = capsys.readouterr()
        assert out == ""
        assert err == f"decoding    in torch, not in C++: {why}\n"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_forward_that_was_edited_in_place(
        self,
        model: Transformer,
        dtype: torch.dtype,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(MLP, "forward", lambda self, x: self.down_proj(geglu(self.gate_up(x))))
        why = "its logits differ from the model's; does decoder_steps() tell what forward does?"
        self.check(copy.deepcopy(model).to(dtype), capsys, why)

    def test_another_activation_by_name(self, model: Transformer, capsys: pytest.CaptureFixture[str]) -> None:
        changed = copy.deepcopy(model)
        changed.layers[1].mlp.__class__ = GeGLU
        self.check(changed, capsys, "it has no op 'geglu'")

    def test_a_module_that_does_not_describe_itself(
        self, model: Transformer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        class Doubled(torch.nn.Module):
            def __init__(self, inner: MLP) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Tensor) -> Tensor:
                return 2 * self.inner(x)

        changed = copy.deepcopy(model)
        changed.layers[0].mlp = Doubled(changed.layers[0].mlp)
        self.check(changed, capsys, "it has no op 'Doubled'")

    def test_a_prompt_of_fewer_tokens_than_heads_that_share_keys(self) -> None:
        model = Transformer(CONFIG.model_copy(update={"n_kv_heads": 1}))
        model.init_weights(0)
        model.layers[0].mlp.__class__ = GeGLU
        assert list(generate(model, [1], max_new_tokens=8, temperature=0)) == greedy(model, [[1]], 8)[0]

    def test_weights_of_another_size(self, model: Transformer, capsys: pytest.CaptureFixture[str]) -> None:
        """The C++ would read what lies behind them."""
        changed = copy.deepcopy(model)
        changed.layers[0].mlp = MLP(CONFIG.model_copy(update={"d_ff": 48}))
        for parameter in changed.layers[0].mlp.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator())
        self.check(changed, capsys, "its 'swiglu' reads larger weights")

    def test_another_number_of_attentions(self, model: Transformer, capsys: pytest.CaptureFixture[str]) -> None:
        changed = copy.deepcopy(model)
        del changed.layers[1]
        why = "its cache has 2 layers, and the model another number of 'attention'"
        self.check(changed, capsys, why)

    @torch.inference_mode()
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_check_itself_changes_nothing(
        self, model: Transformer, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = copy.deepcopy(model).to(dtype)
        prompt = list(self.PROMPTS[0])
        decoder = Decoder(model, [prompt], 4)
        decoder.prefill()
        cache = KVCache.empty(CONFIG, 1, len(prompt) + 4, "cpu", dtype)
        model(torch.tensor([prompt]), cache=cache)
        unchecked = native_decoder(model, cache, torch.zeros(1, dtype=torch.int64))
        expected = unchecked.step(np.array([5]), len(prompt))
        assert np.array_equal(decoder.step([5]), expected)
        assert capsys.readouterr() == ("", "")


@pytest.mark.gpu
def test_a_gpus_replayed_steps_choose_what_a_cpu_chooses(model: Transformer) -> None:
    on_gpu = copy.deepcopy(model).cuda()
    for prompts in (TestBatch.PROMPTS, TestBatch.PROMPTS[:1]):
        expected, found = (
            list(generate_batch(m, prompts, max_new_tokens=20, sampling=Sampling(temperature=0)))
            for m in (model, on_gpu)
        )
        assert [(token.sequence, token.id) for token in found] == [(token.sequence, token.id) for token in expected]
        assert [t.logprob for t in found] == pytest.approx([t.logprob for t in expected], abs=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_the_second_gpu_replays_there(model: Transformer) -> None:
    on_gpu = copy.deepcopy(model).to("cuda:1")
    expected, found = (
        [token.id for token in generate_batch(m, [[1, 2, 3]], max_new_tokens=20, sampling=Sampling(temperature=0))]
        for m in (model, on_gpu)
    )
    assert found == expected
