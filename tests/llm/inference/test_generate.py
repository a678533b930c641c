"""`llm generate`: texts never show half a character, end where they should, and come back as JSON."""

import io
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from running import without_checksums
from safetensors.torch import load_file, save_file

import llm.inference.generate
from llm.config import ModelConfig
from llm.display import Display
from llm.errors import UserError
from llm.inference.decode import Token
from llm.inference.generate import TextStream, generate
from llm.inference.prompts import read_prompts
from llm.model.checkpoint_path import locate

CONFIG = ModelConfig(n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, d_ff=96, vocab_size=300, max_seq_len=48)


class TestTextStream:
    def pieces(self, data: bytes, *stop: str) -> tuple[list[str], bool]:
        """What each byte makes certain, and the rest."""
        stream = TextStream(stop)
        pieces = [stream.add(bytes([byte])) for byte in data]
        return [piece for piece in [*pieces, stream.end()] if piece], stream.stopped

    @pytest.mark.parametrize("text", ["naïve 🙂 日本", "\u0000\r\n\u2581"])
    def test_only_whole_characters_show(self, text: str) -> None:
        assert self.pieces(text.encode()) == (list(text), False)

    def test_what_is_no_utf8_is_a_replacement_character(self) -> None:
        assert "".join(self.pieces(b"a\xffb\xf0\x9f")[0]) == "a\ufffdb\ufffd"

    @pytest.mark.parametrize(
        ("text", "stop", "shown"),
        [
            ("one. Two.", ["."], "one"),
            ("aab aaab", ["aaab"], "aab "),
            ("abcabd", ["abd"], "abc"),
            ("abcabd", ["x", "abd", "ca"], "ab"),
            ("日本語", ["本語"], "日"),
        ],
    )
    def test_a_stop_text_and_what_follows_never_shows(self, text: str, stop: list[str], shown: str) -> None:
        pieces, stopped = self.pieces(text.encode(), *stop)
        assert ("".join(pieces), stopped) == (shown, True)

    def test_the_beginning_of_a_stop_text_is_held_back_until_it_is_none(self) -> None:
        assert self.pieces(b"xENyENDz", "EN!", "END!!") == (["x", "ENy", "ENDz"], False)
        assert self.pieces(b"xEN", "END") == (["x", "EN"], False)


class TestReadPrompts:
    def test_lines(self, tmp_path: Path) -> None:
        (tmp_path / "p.txt").write_bytes("one\n\n 二\n".encode())
        assert read_prompts(None, str(tmp_path / "p.txt")) == ["one", "", " 二"]
        (tmp_path / "p.jsonl").write_text('{"prompt": "a\\nb"}\n{"prompt": "", "id": 2}\n')
        assert read_prompts(None, str(tmp_path / "p.jsonl")) == ["a\nb", ""]

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
    def test_a_byte_order_mark_and_carriage_returns_are_no_part_of_a_prompt(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
    ) -> None:
        (tmp_path / "p.txt").write_bytes("one\r\ntwo\rthree\r\n".encode(encoding))
        assert read_prompts(None, str(tmp_path / "p.txt")) == ["one", "two\rthree"]
        (tmp_path / "p.jsonl").write_bytes('{"prompt": "a\\r\\n"}\r\n{"prompt": "b"}\r\n'.encode(encoding))
        assert read_prompts(None, str(tmp_path / "p.jsonl")) == ["a\r\n", "b"]
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("a\r\nb\r\n".encode(encoding))))
        assert read_prompts("-", None) == ["a\r\nb"]

    def test_stdin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for arguments, expected in ((("-", None), ["a\nb"]), ((None, "-"), ["a", "b"]), (("a\n", None), ["a\n"])):
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"a\nb\n")))
            assert read_prompts(*arguments) == expected

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("p.txt", b"", "p.txt: empty"),
            ("p.txt", b" \n\n", "p.txt: empty"),
            ("p.txt", b"caf\xe9", "p.txt: not valid UTF-8 at byte 3"),
            ("p.jsonl", b'{"prompt": "x"}\n{"text": "x"}\n', "p.jsonl:2: not an object"),
            ("p.jsonl", b'{"prompt": 5}\n', "p.jsonl:1: not an object"),
            ("p.jsonl", b"[" * 100_000, "p.jsonl:1: not an object"),
        ],
    )
    def test_bad_files_are_named(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_prompts(None, str(tmp_path / name))


class TestRun:
    """`llm generate` around a model whose tokens are single bytes, and which says a fixed text."""

    @pytest.fixture
    def says(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        """Sample n says the nth text."""

        def load_tokenizer(path: object) -> SimpleNamespace:
            return SimpleNamespace(
                bos_id=256,
                eos_ids=(257,),
                sha256=str(path),
                encode=lambda text: list(text.encode()),
                decode_bytes=lambda ids: bytes(i for i in ids if i < 256),
            )

        def install(*texts: bytes) -> None:
            model = SimpleNamespace(config=CONFIG)

            def generate_batch(_, prompts, *, finished, streams, **__):
                for step in range(max(map(len, texts))):
                    for sequence in range(len(prompts)):
                        if sequence not in finished and step < len(texts[streams[sequence]]):
                            yield Token(sequence, texts[streams[sequence]][step], -1.0)

            monkeypatch.setattr(llm.inference.generate, "load_model", lambda *_, **__: (model, load_tokenizer("own")))
            monkeypatch.setattr(llm.inference.generate, "generate_batch", generate_batch)

        return install

    def test_text_never_shows_half_a_character(self, says, monkeypatch: pytest.MonkeyPatch) -> None:
        says("naïve 🙂 日本".encode())
        written: list[str] = []
        monkeypatch.setattr(sys.stdout, "write", written.append)
        result = generate("ckpt", prompt="Say: ", max_new_tokens=100, device="cpu", show=True)
        assert result["text"] == "naïve 🙂 日本"
        assert result["tokens"] == len("naïve 🙂 日本".encode())
        assert result["tokens_per_second"] > 0
        assert written == ["Say: ", *"naïve 🙂 日本", "\n"]

    def test_quiet(self, says, capsys: pytest.CaptureFixture[str]) -> None:
        says(b"abc")
        assert generate("ckpt", prompt="x", device="cpu")["text"] == "abc"
        assert capsys.readouterr().out == ""

    def test_a_full_context_is_stated(self, says, capsys: pytest.CaptureFixture[str]) -> None:
        says(b"x" * 40)
        generate("ckpt", prompt="1234567", max_new_tokens=100, device="cpu")
        assert "stopped after 40 of 100 tokens: the model's context of 48 tokens" in capsys.readouterr().err
        says(b"x" * 39)
        generate("ckpt", prompt="1234567", max_new_tokens=100, device="cpu")
        assert capsys.readouterr().err == ""

    def test_a_full_memory_is_one_line_with_the_way_out(self, says, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_, **__):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore.")

        says(b"")
        monkeypatch.setattr(llm.inference.generate, "generate_batch", full)
        with pytest.raises(UserError, match=r"memory is full; lower --batch_size \(CUDA out of memory"):
            generate("ckpt", prompt="x", device="cpu")

    def test_a_prompt_of_broken_bytes_is_refused(self, says) -> None:
        says(b"")
        with pytest.raises(UserError, match=r"the prompt is not valid UTF-8 \(character 2\)"):
            generate("ckpt", prompt="ab\udcff", device="cpu")

    def test_a_missing_checkpoint_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no such checkpoint"):
            generate(tmp_path / "none", prompt="x", device="cpu")

    def test_several_are_shown_one_after_another(
        self, says, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        says(b"12", b"345")
        (tmp_path / "prompts.txt").write_text("a\nb\n")
        prompts = str(tmp_path / "prompts.txt")
        result = generate("ckpt", prompts=prompts, num_samples=2, batch_size=3, device="cpu", show=True)
        shown = [
            f"=== prompt {n}, sample {m}\n{prompt}{text}\n"
            for n, prompt in ((1, "a"), (2, "b"))
            for m, text in ((1, "12"), (2, "345"))
        ]
        assert capsys.readouterr().out == "".join(shown)
        assert (result["text"], result["tokens"]) == ("12", 10)
        assert [(c["prompt"], c["sample"], c["text"]) for c in result["completions"]] == [
            ("a", 0, "12"),
            ("a", 1, "345"),
            ("b", 0, "12"),
            ("b", 1, "345"),
        ]

    def test_equal_prompts_have_numbers_of_their_own(
        self, says, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        says(b"12")
        (tmp_path / "prompts.txt").write_text("a\na\nb\n")
        generate("ckpt", prompts=str(tmp_path / "prompts.txt"), batch_size=2, device="cpu", show=True)
        assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("=== ")] == [
            f"=== prompt {number}, sample 1" for number in (1, 2, 3)
        ]

    def test_a_terminal_gets_control_characters_as_escapes_and_a_file_gets_the_text(
        self, says, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        says(b"\x1b]0;x\x07")
        generate("ckpt", prompt="\x9b", device="cpu", show=True)
        assert capsys.readouterr().out == "\x9b\x1b]0;x\x07\n"
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        generate("ckpt", prompt="\x9b", device="cpu", show=True)
        assert capsys.readouterr().out == "\\x9b\\x1b]0;x\\x07\n"

    def test_what_ended_a_continuation_is_stated(self, says) -> None:
        says(b"ab.cd", b"x" * 44, b"abcd", b"abcdefgh")
        result = generate("ckpt", prompt="123", num_samples=4, max_new_tokens=44, stop=["."], device="cpu")
        assert [c["finish"] for c in result["completions"]] == ["stop", "length", "eos", "eos"]
        stopped = result["completions"][0]
        assert stopped["text"] == "ab"
        assert stopped["token_ids"] == list(b"ab.")
        assert stopped["logprobs"] == [-1.0] * 3
        says(b"x" * 44)
        result = generate("ckpt", prompt="123", max_new_tokens=50, device="cpu")
        assert result["completions"][0]["finish"] == "context"

    @pytest.mark.parametrize("option", [{"num_samples": 0}, {"batch_size": 0}, {"max_new_tokens": 0}, {"stop": [""]}])
    def test_an_option_out_of_range_is_named(self, option: dict) -> None:
        with pytest.raises(UserError, match=f"--{next(iter(option))}"):
            generate("ckpt", prompt="x", **option)


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("verb", ["generate", "eval"])
def test_a_weight_that_is_not_finite_or_far_too_large_is_one_line(
    llm_here: Callable[..., tuple[int, str, str]], random_checkpoint: Path, tmp_path: Path, verb: str, value: float
) -> None:
    ckpt = without_checksums(Path(shutil.copytree(locate(random_checkpoint), tmp_path / "step-00000000")))
    weights = load_file(ckpt / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"].fill_(value)
    save_file(weights, ckpt / "model.safetensors")
    (tmp_path / "text.txt").write_text("def f\n")
    options = ["--prompt", "def"] if verb == "generate" else ["--input", tmp_path / "text.txt"]
    code, out, err = llm_here(verb, "--ckpt", ckpt, *options, "--json")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert "finite" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_bar_counts_the_tokens_of_several_continuations_and_not_a_text_that_is_shown(
    random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shown: list[tuple[float, float]] = []

    class Noted(Display):
        def __init__(self, title: str, total: float, **options: bool) -> None:
            super().__init__(title, total, **options)
            self.total = 0 if options["silent"] else total

        def update(self, completed: float, title: str | None = None) -> None:
            if self.total:
                shown.append((completed, self.total))

    monkeypatch.setattr(llm.inference.generate, "Display", Noted)
    generate(random_checkpoint, prompt="def", num_samples=3, batch_size=2, max_new_tokens=4, show=True)
    assert shown[0] == (2, 12)
    assert shown == sorted(shown)
    assert shown[-1][0] <= 8 + 4
    shown.clear()
    generate(random_checkpoint, prompt="def", max_new_tokens=4, show=True)
    assert not shown
