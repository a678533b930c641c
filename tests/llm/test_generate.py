"""Generation: the tokens are those of the whole forward pass, and the text never shows half a character."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import llm.checkpoint
import llm.generate
from llm.config import ModelConfig
from llm.errors import UserError
from llm.generate import generate, sample
from llm.model import Transformer

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
        assert list(generate(model, [7], max_new_tokens=20, temperature=0, eos_id=eos)) == greedy[: greedy.index(eos)]

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
            ("seed", -1),
            ("seed", 2**64),
        ],
    )
    def test_an_option_out_of_range_is_named(self, model: Transformer, option: str, value: float) -> None:
        with pytest.raises(UserError, match=f"--{option} {value}: must be"):
            next(generate(model, [1], **({"max_new_tokens": 1} | {option: value})))

    def test_records_no_gradients_and_leaves_no_inference_mode_behind(self, model: Transformer) -> None:
        modes: list[bool] = []
        hook = model.register_forward_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
        for _ in generate(model, [1], max_new_tokens=3):
            assert not torch.is_inference_mode_enabled()
        hook.remove()
        assert modes == [True] * 3


class TestSample:
    LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    def frequencies(self, **options) -> list[float]:
        rng = generator()
        options = {"temperature": 1.0, "top_k": None, "top_p": None} | options
        drawn = torch.tensor([sample(self.LOGITS, rng, **options) for _ in range(4000)])
        return (torch.bincount(drawn, minlength=4) / 4000).tolist()

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, [0.5, 0.3, 0.15, 0.05]),
            ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
            ({"top_k": 2}, [0.625, 0.375, 0, 0]),
            ({"top_k": 100}, [0.5, 0.3, 0.15, 0.05]),
            ({"top_p": 0.4}, [1, 0, 0, 0]),
            ({"top_p": 0.6}, [0.625, 0.375, 0, 0]),
            ({"top_p": 0.9}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
            ({"top_p": 1.0}, [0.5, 0.3, 0.15, 0.05]),
            ({"top_k": 3, "top_p": 0.6}, [0.625, 0.375, 0, 0]),  # 0.5 / 0.95 alone is below 0.6
            ({"temperature": 0}, [1, 0, 0, 0]),
        ],
    )
    def test_draws_from_the_distribution_that_the_options_leave(self, options: dict, expected: list[float]) -> None:
        for frequency, probability in zip(self.frequencies(**options), expected, strict=True):
            assert frequency == pytest.approx(probability, abs=0.03)
            assert probability > 0 or frequency == 0

    def test_keeps_its_logits(self) -> None:
        logits = self.LOGITS.clone()
        sample(logits, generator(), 0.7, 2, 0.5)
        assert torch.equal(logits, self.LOGITS)


class TestRun:
    """`llm generate` around a model whose tokens are single bytes, and which says a fixed text."""

    @pytest.fixture
    def says(self, monkeypatch: pytest.MonkeyPatch):
        def load_tokenizer(path: object) -> SimpleNamespace:
            return SimpleNamespace(
                bos_id=256,
                eos_id=257,
                sha256=str(path),
                encode=lambda text: list(text.encode()),
                decode_bytes=lambda ids: bytes(i for i in ids if i < 256),
            )

        def install(data: bytes) -> None:
            model = SimpleNamespace(config=CONFIG)
            monkeypatch.setattr(llm.checkpoint, "load_model", lambda *_, **__: (model, load_tokenizer("own")))
            monkeypatch.setattr(llm.tokenizer, "load_tokenizer", load_tokenizer)
            monkeypatch.setattr(llm.generate, "generate", lambda *_, **__: iter(data))

        return install

    def test_text_never_shows_half_a_character(self, says, monkeypatch: pytest.MonkeyPatch) -> None:
        says("naïve 🙂 日本".encode())
        written: list[str] = []
        monkeypatch.setattr(sys.stdout, "write", written.append)
        result = llm.generate.run("ckpt", "Say: ", max_new_tokens=100, device="cpu")
        assert result["text"] == "naïve 🙂 日本"
        assert result["tokens"] == len("naïve 🙂 日本".encode())
        assert result["tokens_per_second"] > 0
        assert written == ["Say: ", *"naïve 🙂 日本", "\n"]

    def test_what_is_no_utf8_is_a_replacement_character(self, says, capsys: pytest.CaptureFixture[str]) -> None:
        says(b"a\xffb\xf0\x9f")
        assert llm.generate.run("ckpt", "", device="cpu")["text"] == "a\ufffdb\ufffd"
        assert capsys.readouterr().out == "a\ufffdb\ufffd\n"

    def test_quiet(self, says, capsys: pytest.CaptureFixture[str]) -> None:
        says(b"abc")
        assert llm.generate.run("ckpt", "x", device="cpu", stream=False)["text"] == "abc"
        assert capsys.readouterr().out == ""

    def test_a_full_context_is_stated(self, says, capsys: pytest.CaptureFixture[str]) -> None:
        says(b"x" * 40)
        llm.generate.run("ckpt", "1234567", max_new_tokens=100, device="cpu", stream=False)
        assert "stopped after 40 of 100 tokens: the model's context of 48 tokens" in capsys.readouterr().err
        says(b"x" * 39)
        llm.generate.run("ckpt", "1234567", max_new_tokens=100, device="cpu", stream=False)
        assert capsys.readouterr().err == ""

    def test_a_prompt_of_broken_bytes_is_refused(self, says) -> None:
        says(b"")
        with pytest.raises(UserError, match=r"the prompt is not valid UTF-8 \(character 2\)"):
            llm.generate.run("ckpt", "ab\udcff", device="cpu")

    def test_a_missing_checkpoint_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no such checkpoint"):
            llm.generate.run(tmp_path / "none", "x", device="cpu")
