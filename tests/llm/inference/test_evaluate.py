"""`llm eval`: equal to the definition, computed another way; the same however the work is cut; isolated documents."""

import json
import lzma
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference_loader
import torch
from running import deepspeed_module, result_of, torchrun

from llm.data.manifest import dataset_hash, read_manifest
from llm.data.prepare import prepare_data
from llm.data.tokenizer import Tokenizer
from llm.display import Display
from llm.errors import UserError
from llm.inference import evaluate
from llm.inference.evaluate import evaluate_model
from llm.model.checkpoint import load_model
from llm.model.checkpoint_path import locate
from llm.model.transformer import Transformer

CONTEXT = 64

# Texts longer than the context, short ones, and characters that are several tokens.
TEXTS = ["def f(x):\n    return x\n", "naïve ▁ 🙂\r\n", "import os\n" * 60, "x", "".join(map(chr, range(32, 300)))]


@pytest.fixture(scope="module")
def trained(random_checkpoint: Path) -> tuple[Transformer, Tokenizer]:
    return load_model(random_checkpoint, torch.device("cpu"))


@pytest.fixture
def score(trained: tuple[Transformer, Tokenizer], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Scores documents, or files, with the model of `trained`."""

    def run(texts: list[str] | None = None, *files: Path, **options: Any) -> dict[str, Any]:
        paths = [*files] if texts is None else [write(tmp_path / "scored.jsonl", texts)]
        return evaluate_model(*trained, paths, context=CONTEXT, **options)

    return run


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def numbers(result: dict[str, Any]) -> dict[str, float]:
    """All but the list of inputs."""
    return {key: value for key, value in result.items() if isinstance(value, int | float)}


def losses_by_definition(model: Transformer, tokens: list[int], stride: int) -> list[float]:
    """The NLL of every token but the first. The windows end at CONTEXT, CONTEXT + stride, ..., and at the last input;
    a target is read off the first window that covers it; the softmax is written out.
    """
    inputs = tokens[:-1]
    losses: list[float] = []
    end = 0
    while len(losses) < len(inputs):
        end = min(CONTEXT if not losses else end + stride, len(inputs))
        begin = max(0, end - CONTEXT)
        with torch.no_grad():
            logits = model(torch.tensor([inputs[begin:end]]))[0].double()
        for place in range(len(losses), end):
            row = logits[place - begin]
            losses.append(float(row.exp().sum().log() - row[tokens[place + 1]]))
    return losses


@pytest.mark.parametrize("stride", [CONTEXT, 13, 1])
def test_equals_the_definition(
    trained: tuple[Transformer, Tokenizer], score: Callable[..., dict[str, Any]], stride: int
) -> None:
    model, tokenizer = trained
    texts = TEXTS if stride > 1 else TEXTS[:3]
    documents = []
    for text in texts:
        losses = losses_by_definition(
            model, [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id], stride
        )  # the last one is EOS's
        documents.append((sum(losses), len(losses), sum(losses[:-1]) / math.log(2), len(text.encode()), len(text)))
    nll, tokens, bits, size, characters = map(sum, zip(*documents, strict=True))
    n = len(texts)
    spread = sum((d[0] - nll / tokens * d[1]) ** 2 for d in documents)
    spread_of_bits = sum((d[2] - bits / size * d[3]) ** 2 for d in documents)
    assert numbers(score(texts, stride=stride)) == pytest.approx(
        {
            "nll_per_token": nll / tokens,
            "nll_per_token_stderr": math.sqrt(n / (n - 1) * spread) / tokens,
            "perplexity": math.exp(nll / tokens),
            "bits_per_byte": bits / size,
            "bits_per_byte_stderr": math.sqrt(n / (n - 1) * spread_of_bits) / size,
            "bits_per_character": bits / characters,
            "tokens": tokens,
            "bytes": size,
            "characters": characters,
            "documents": n,
        },
        rel=1e-5,
    )


def test_batch_size_changes_nothing(score: Callable[..., dict[str, Any]]) -> None:
    expected = numbers(score(TEXTS * 3))
    for batch_size in (1, 2, 3, 64):
        assert numbers(score(TEXTS * 3, batch_size=batch_size)) == pytest.approx(expected, rel=1e-6)


def test_the_bar_follows_the_scored_text(score: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[float] = []
    scored: list[int] = []
    monkeypatch.setattr(Display, "update", lambda _, completed, title: shown.append(completed))
    add_losses = evaluate.add_losses
    monkeypatch.setattr(evaluate, "add_losses", lambda *given: scored.append(len(shown)) or add_losses(*given))
    score(["one two three " * 40] * 20, batch_size=1)
    total = 20 * len('{"text": ""}\n' + "one two three " * 40)
    assert shown == sorted(shown)
    # At each batch, about as much of the bar is done as of the batches; what JSON adds to the text is missing.
    for number, updates in enumerate(scored):
        assert shown[updates - 1] / total == pytest.approx(number / len(scored), abs=0.1)


def test_documents_do_not_see_each_other(score: Callable[..., dict[str, Any]]) -> None:
    together = score(TEXTS)
    alone = [score([text]) for text in TEXTS]
    assert all(one["nll_per_token_stderr"] is None for one in alone)
    assert sum(one["nll_per_token"] * one["tokens"] for one in alone) == pytest.approx(
        together["nll_per_token"] * together["tokens"], rel=1e-6
    )


def test_several_files_are_scored_each_and_as_one(score: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    files = [write(tmp_path / "a.jsonl", TEXTS[:2]), write(tmp_path / "b.jsonl", TEXTS[2:])]
    result = score(None, *files, compress=True)
    whole = score(TEXTS)
    assert {key: result[key] for key in numbers(whole)} == pytest.approx(numbers(whole), rel=1e-6)
    for part, file, texts in zip(result["inputs"], files, [TEXTS[:2], TEXTS[2:]], strict=True):
        assert part["input"] == str(file)
        assert part["bits_per_byte"] == pytest.approx(score(None, file)["bits_per_byte"], rel=1e-6)
        text = "".join(texts).encode()
        assert part["xz_bits_per_byte"] == 8 * len(lzma.compress(text, preset=9)) / len(text)
        assert part["zstd_bits_per_byte"] > 0
    assert result["xz_bits_per_byte"] * result["bytes"] == pytest.approx(
        sum(part["xz_bits_per_byte"] * part["bytes"] for part in result["inputs"])
    )


def test_a_running_text_longer_than_a_piece_is_one_document(
    score: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"line {i} of the text\n\n" for i in range(40))
    (tmp_path / "t.txt").write_text(text)
    whole = score(None, tmp_path / "t.txt")
    monkeypatch.setattr("llm.data.blocks.CHUNK_CHARS", 100)
    assert score(None, tmp_path / "t.txt") == whole
    assert whole["documents"] == 1
    assert whole["bytes"] == len(text)


def test_what_cannot_be_used_is_left_out_and_counted_or_with_strict_an_error(
    score: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    lines = [b"line 1 of the text", b"caf\xe9", b"line 2 of the text"]
    (tmp_path / "good.txt").write_bytes(lines[0] + b"\n" + lines[2])
    (tmp_path / "bad.txt").write_bytes(b"\n".join(lines))
    good, bad = score(None, tmp_path / "good.txt"), score(None, tmp_path / "bad.txt")
    assert (good["dropped"], bad["dropped"]) == ({}, {"invalid_utf8": 1})
    assert good["nll_per_token"] == bad["nll_per_token"]
    with pytest.raises(UserError, match=r"bad\.txt: not valid UTF-8 at byte 22"):
        score(None, tmp_path / "bad.txt", strict=True)


def test_shards_score_as_the_documents_that_they_hold_out(
    score: Callable[..., dict[str, Any]],
    trained: tuple[Transformer, Tokenizer],
    small_corpus: Path,
    small_tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where documents go on in another shard, and in another chunk of what is read at once."""
    prepare_data(
        [str(small_corpus)],
        str(small_tokenizer),
        str(tmp_path / "shards"),
        seq_len=64,
        shard_tokens=700,
        val_fraction=0.05,
        workers=1,
    )
    manifest = read_manifest(tmp_path / "shards")
    tokenizer = trained[1]
    shards = [
        reference_loader.unpack_shard((manifest.path / shard.file).read_bytes())[0] for shard in manifest.shards["val"]
    ]
    tokens = [token for shard in shards for token in shard.tolist()]
    texts: list[str] = []
    while tokens:
        end = tokens.index(tokenizer.eos_id)
        texts.append(tokenizer.decode(tokens[:end]))
        tokens = tokens[end + 1 :]
    assert len(shards) > 2
    assert len(texts) > 2
    monkeypatch.setattr("llm.inference.evaluate.SHARD_CHUNK_TOKENS", 300)
    assert numbers(score(None, manifest.path)) == pytest.approx(numbers(score(texts)), rel=1e-6)


def test_shards_of_another_tokenizer_are_refused(
    score: Callable[..., dict[str, Any]], small_shards: Path, tmp_path: Path
) -> None:
    for file in small_shards.iterdir():
        (tmp_path / file.name).symlink_to(file)
    manifest = json.loads((small_shards / "manifest.json").read_text())
    other = read_manifest(small_shards).tokenizer_sha256[::-1]
    manifest["tokenizer_sha256"] = other
    shards = {split: read_manifest(small_shards).shards[split] for split in ("train", "val")}
    manifest["dataset_hash"] = dataset_hash(tokenizer_sha256=other, packing=manifest["packing"], shards=shards)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="made with another tokenizer"):
        score(None, tmp_path)


@pytest.mark.parametrize("launch", [torchrun, pytest.param(deepspeed_module, marks=pytest.mark.slow)])
def test_two_processes_score_as_one(
    llm_here: Callable[..., tuple[int, str, str]],
    random_checkpoint: Path,
    small_shards: Path,
    tmp_path: Path,
    launch: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """Under a launcher, which the windows of the one long text keep busy, too."""
    (tmp_path / "long.txt").write_text("import os\n\n" * 200)
    inputs = ["--input", tmp_path / "long.txt", small_shards, "--stride", 40, "--batch_size", 2]
    arguments = ["eval", "--ckpt", random_checkpoint, *inputs, "--device", "cpu", "--json"]
    code, out, err = llm_here(*arguments)
    assert code == 0, err
    expected = json.loads(out)
    found = result_of(launch(2, "llm", *arguments))
    for one, other in zip([found, *found["inputs"]], [expected, *expected["inputs"]], strict=True):
        assert numbers(one) == pytest.approx(numbers(other), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--stride", 0], "--stride 0: must be at least 1 and at most the model's sequences of 64 tokens"),
        (["--stride", 65], "--stride 65"),
        (["--batch_size", 0], "--batch_size 0"),
    ],
)
def test_what_cannot_be_scored_is_one_line(
    llm_here: Callable[..., tuple[int, str, str]],
    random_checkpoint: Path,
    small_corpus: Path,
    options: list[object],
    expected: str,
) -> None:
    code, out, err = llm_here("eval", "--ckpt", random_checkpoint, "--input", small_corpus, *options)
    assert (code, out) == (1, "")
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [err.splitlines()[-1]]
    assert expected in err


def test_an_incomplete_checkpoint_is_named(
    llm_here: Callable[..., tuple[int, str, str]], random_checkpoint: Path, small_corpus: Path, tmp_path: Path
) -> None:
    for file in locate(random_checkpoint).iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).symlink_to(file)
    code, _, err = llm_here("eval", "--ckpt", tmp_path, "--input", small_corpus)
    assert code == 1
    assert "model.safetensors: missing; use another checkpoint" in err.splitlines()[-1]


def test_the_table_has_a_line_for_each_input_and_one_for_all(
    llm_here: Callable[..., tuple[int, str, str]], random_checkpoint: Path, small_corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "other.txt").write_text("x = 1\n")
    code, out, err = llm_here("eval", "--ckpt", random_checkpoint, "--input", small_corpus, tmp_path / "other.txt")
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 80
    headings = [line.split() for line in out.splitlines() if "tokens" in line or "NLL/token" in line]
    assert headings == [["documents", "bytes", "tokens", "bits/char"], ["NLL/token", "perplexity", "bits/byte"]]
    assert [line.split()[0] for line in out.splitlines() if line.startswith("all ")] == ["all"] * 2
    # A long name goes on in the next lines.
    assert "other.txt" in out.replace("\n", "")
