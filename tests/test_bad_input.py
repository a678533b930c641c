"""Every verb, given what it cannot use: one line that names it, exit code 1, and nothing half-written."""

import ctypes
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from running import environment, small_config

Llm = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def checkpoint(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one step."""
    folder = tmp_path_factory.mktemp("bad") / "run"
    config = folder.parent / "config.json"
    config.write_text(json.dumps(small_config(small_shards, folder, train__total_tokens=512)))
    command = [sys.executable, "-m", "llm", "train", "--config", str(config)]
    subprocess.run(command, check=True, capture_output=True, env=environment())
    return folder / "latest"


@pytest.fixture
def bad(tmp_path: Path) -> dict[str, Path]:
    """Inputs by what is wrong with them."""
    files = {
        "missing": tmp_path / "missing.txt",
        "empty": tmp_path / "empty.txt",
        "not utf-8": tmp_path / "latin1.txt",
        "a directory": tmp_path / "folder",
        "no json": tmp_path / "broken.jsonl",
        "blank": tmp_path / "blank.txt",
    }
    files["empty"].write_bytes(b"")
    files["not utf-8"].write_bytes(b"caf\xe9 au lait\n" * 10)
    files["a directory"].mkdir()
    files["no json"].write_text('{"text": "fine"}\n{"text": \n')
    files["blank"].write_text(" \n\n")
    return files


EXPECTED = {
    "missing": "no such file",
    "empty": "empty",
    "not utf-8": "not valid UTF-8 at byte 3",
    "a directory": "holds no .txt",
    "no json": "broken.jsonl:2",
    "blank": "",
}


def refused(called: tuple[int, str, str], expected: str) -> None:
    """Exit code 1, nothing on stdout, one error line."""
    code, out, err = called
    assert code == 1, err
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("error")]
    assert len(errors) == 1, err
    assert expected in errors[0]
    assert "Traceback" not in err


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("what", EXPECTED)
def test_train_tokenizer_refuses(llm_here: Llm, bad: dict[str, Path], tmp_path: Path, what: str) -> None:
    before = files_in(tmp_path)
    prefix = tmp_path / "out/spm"
    refused(llm_here("train_tokenizer", "--strict", "--input", bad[what], "--model_prefix", prefix), EXPECTED[what])
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("what", EXPECTED)
def test_prepare_data_refuses(
    llm_here: Llm, bad: dict[str, Path], small_tokenizer: Path, tmp_path: Path, what: str
) -> None:
    before = files_in(tmp_path)
    options = ["--tok", small_tokenizer, "--out_dir", tmp_path / "out", "--workers", 1, "--strict"]
    refused(llm_here("prepare_data", "--input", bad[what], *options), EXPECTED[what])
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("what", EXPECTED)
def test_eval_refuses(llm_here: Llm, bad: dict[str, Path], checkpoint: Path, what: str) -> None:
    refused(llm_here("eval", "--ckpt", checkpoint, "--strict", "--input", bad[what]), EXPECTED[what])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--seq_len", 0], "--seq_len"),
        (["--seq_len", 1_000_000], "--seq_len 1000000 + 1 tokens"),
        (["--shard_tokens", 0], "--shard_tokens"),
        (["--val_fraction", 0], "--val_fraction"),
        (["--val_fraction", 1], "--val_fraction"),
        (["--workers", 0], "--workers"),
        (["--tok", "nowhere.model"], "nowhere.model"),
    ],
)
def test_prepare_data_refuses_impossible_sizes(
    llm_here: Llm, small_corpus: Path, small_tokenizer: Path, tmp_path: Path, options: list[object], expected: str
) -> None:
    arguments = ["--input", small_corpus, "--tok", small_tokenizer, "--out_dir", tmp_path / "out", "--seq_len", 64]
    refused(llm_here("prepare_data", *arguments, *options), expected)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--vocab_size", 10], "vocab_size"),
        (["--vocab_size", 100_000, "--strict_vocab_size"], "vocab_size"),
    ],
)
def test_train_tokenizer_refuses_impossible_sizes(
    llm_here: Llm, small_corpus: Path, tmp_path: Path, options: list[object], expected: str
) -> None:
    arguments = ["--input", small_corpus, "--model_prefix", tmp_path / "spm"]
    refused(llm_here("train_tokenizer", *arguments, *options), expected)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("verb", ["eval", "generate"])
def test_a_tokenizer_that_is_not_the_checkpoints(
    llm_here: Llm, verb: str, checkpoint: Path, small_corpus: Path, tmp_path: Path
) -> None:
    code, _, err = llm_here(
        "train_tokenizer", "--input", small_corpus, "--model_prefix", tmp_path / "other", "--vocab_size", 400
    )
    assert code == 0, err
    rest = ["--input", small_corpus] if verb == "eval" else ["--prompt", "x"]
    called = llm_here(verb, "--ckpt", checkpoint, "--tok", tmp_path / "other.model", *rest)
    refused(called, "not the tokenizer")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--max_new_tokens", 0], "--max_new_tokens"),
        (["--temperature", -1], "--temperature"),
        (["--top_p", 0], "--top_p"),
        (["--top_k", 0], "--top_k"),
        (["--prompt", "x = 1\n" * 100], "64"),
    ],
)
def test_generate_refuses(llm_here: Llm, checkpoint: Path, options: list[object], expected: str) -> None:
    refused(llm_here("generate", "--ckpt", checkpoint, "--prompt", "x", *options), expected)


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("missing", "no such file"),
        ("empty", "empty"),
        ("blank", "empty"),
        ("not utf-8", "not valid UTF-8 at byte 3"),
        ("a directory", "a file is due here"),
        ("no json", "broken.jsonl:1: not an object"),
        ("long", "prompt 2 is"),
    ],
)
def test_generate_refuses_bad_prompts(
    llm_here: Llm, bad: dict[str, Path], checkpoint: Path, tmp_path: Path, what: str, expected: str
) -> None:
    bad["long"] = tmp_path / "long.txt"
    bad["long"].write_text("short\n" + "x = 1;" * 100 + "\n")
    refused(llm_here("generate", "--ckpt", checkpoint, "--prompts", bad[what]), expected)


@pytest.mark.parametrize(
    ("damage", "options", "expected"),
    [
        (
            lambda path: (path / "model.safetensors").unlink(),
            [],
            "model.safetensors: missing; use another checkpoint",
        ),
        (lambda path: (path / "tokenizer.model").unlink(), [], "tokenizer.model: missing; use another checkpoint"),
        (lambda path: (path / "state.json").unlink(), [], "not a checkpoint"),
        (lambda path: None, ["--max_file_bytes", 0], "--max_file_bytes 0: must be at least 1"),
    ],
)
def test_export_refuses(
    llm_here: Llm,
    checkpoint: Path,
    tmp_path: Path,
    damage: Callable[[Path], object],
    options: list[object],
    expected: str,
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "ckpt"))
    damage(folder)
    refused(llm_here("export", "--ckpt", folder, "--out_dir", tmp_path / "out", *options), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_import_refuses_what_is_no_hugging_face_model(
    llm_here: Llm, small_shards: Path, checkpoint: Path, tmp_path: Path
) -> None:
    out = ["--out_dir", tmp_path / "out"]
    refused(llm_here("import", "--from", tmp_path / "none", *out), "no such folder")
    refused(llm_here("import", "--from", small_shards, *out), "is no Hugging Face model folder (no config.json in it)")
    other = small_shards / "train-00000.bin"
    refused(llm_here("import", "--from", checkpoint, "--tok", other, *out), "is no SentencePiece model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["eval", "generate"])
def test_no_checkpoint(llm_here: Llm, verb: str, small_corpus: Path, tmp_path: Path) -> None:
    rest = ["--input", small_corpus] if verb == "eval" else ["--prompt", "x"]
    refused(llm_here(verb, "--ckpt", tmp_path / "none", *rest), "no such checkpoint")
    refused(llm_here(verb, "--ckpt", tmp_path, *rest), "not a checkpoint")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: (path / "manifest.json").unlink(), "interrupted"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json"),
        (lambda path: (path / "train-00000.bin").unlink(), "train-00000.bin"),
        (lambda path: os.truncate(path / "train-00000.bin", 10_000), "train-00000.bin"),
        (lambda path: flip(path / "train-00000.bin", 5_000), "train-00000.bin"),
        (lambda path: flip(path / "train-00000.bin", 0), "train-00000.bin"),
        (lambda path: (path / "tokenizer.model").unlink(), "tokenizer.model"),
    ],
    ids=["interrupted", "manifest", "gone", "truncated", "flipped", "magic", "tokenizer"],
)
def test_train_names_the_damaged_file(
    llm_here: Llm, small_shards: Path, tmp_path: Path, damage: Callable[[Path], object], expected: str
) -> None:
    shards = Path(shutil.copytree(small_shards, tmp_path / "shards"))
    damage(shards)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(small_config(shards, tmp_path / "run", train__total_tokens=100 * 512)))
    refused(llm_here("train", "--config", config), expected)
    assert not list(tmp_path.glob("run/step-*"))


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def command(verb: str, out: Path, corpus: Path, tokenizer: Path, shards: Path, tmp_path: Path) -> list[str]:
    """A verb that would succeed, if it could write to `out`."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(small_config(shards, out, train__total_tokens=512)))
    arguments = {
        "corpus": ["--source", "stdlib", "--output", out / "c.jsonl"],
        "train_tokenizer": ["--input", corpus, "--model_prefix", out / "spm", "--vocab_size", 500],
        "prepare_data": ["--input", corpus, "--tok", tokenizer, "--out_dir", out, "--seq_len", 64, "--workers", 1],
        "train": ["--config", config],
    }[verb]
    return [sys.executable, "-m", "llm", verb, *map(str, arguments)]


def with_little_space(kilobytes: int) -> Callable[[], None]:
    """No file may grow beyond this, as on a disk that fills up."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, kilobytes * 1024))


@pytest.mark.parametrize("verb", ["corpus", "train_tokenizer", "prepare_data", "train"])
def test_a_full_disk_leaves_nothing_half_written(
    verb: str, small_corpus: Path, small_tokenizer: Path, small_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        command(verb, out, small_corpus, small_tokenizer, small_shards, tmp_path),
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
        preexec_fn=with_little_space(2 if verb == "train_tokenizer" else 60),
    )
    refused((done.returncode, done.stdout, done.stderr), str(out))
    left = {path.name for path in files_in(out)} if out.exists() else set()
    assert left <= {"log.txt", "metrics.jsonl", "run.json", "status.json"}
    assert not list(out.glob("step-*"))


def without_override() -> None:
    """Root may write anywhere; without CAP_DAC_OVERRIDE in its bounding set it may not."""
    pr_capbset_drop, cap_dac_override = 24, 1
    ctypes.CDLL(None).prctl(pr_capbset_drop, cap_dac_override, 0, 0, 0)


@pytest.mark.parametrize("verb", ["corpus", "train_tokenizer", "prepare_data", "train"])
@pytest.mark.parametrize("obstacle", ["a folder without write permission", "a file where a folder is due"])
def test_what_cannot_be_written_is_named(
    verb: str, obstacle: str, small_corpus: Path, small_tokenizer: Path, small_shards: Path, tmp_path: Path
) -> None:
    blocked = tmp_path / "blocked"
    if "permission" in obstacle:
        blocked.mkdir(mode=0o500)
    else:
        blocked.write_text("in the way")
    done = subprocess.run(
        command(verb, blocked / "out", small_corpus, small_tokenizer, small_shards, tmp_path),
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
        preexec_fn=without_override,
    )
    refused((done.returncode, done.stdout, done.stderr), str(blocked))
    assert not blocked.is_dir() or not list(blocked.iterdir())
