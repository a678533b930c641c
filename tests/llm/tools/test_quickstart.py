import json
import lzma
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from llm.data.manifest import read_manifest
from llm.tools import quickstart
from llm.tools.quickstart import Paths, split, stale

ROOT = Path(__file__).resolve().parents[3]


def documents(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.fixture
def paths(tmp_path):
    made = Paths(tmp_path / "data", tmp_path / "artifacts")
    made.data.mkdir()
    return made


def test_no_document_is_both_trained_on_and_held_out(paths):
    texts = [f"document {i % 400}" for i in range(1000)]  # most of them twice or more
    paths.corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    split(paths)
    trained, held_out = documents(paths.train_text), documents(paths.held_out)
    assert sorted(trained + held_out) == sorted(texts)
    assert not set(trained) & set(held_out)
    assert 0.02 < len(held_out) / len(texts) < 0.09


def test_what_is_older_than_its_source_is_stale(tmp_path):
    source, output = tmp_path / "source", tmp_path / "output"
    source.touch()
    assert stale(output, source)
    output.touch()
    assert not stale(output, source)
    os.utime(source, ns=(0, output.stat().st_mtime_ns + 1))
    assert stale(output, source)


def test_a_run_on_other_shards_makes_room_and_one_on_these_stays(small_shards, paths, monkeypatch):
    paths.shards.symlink_to(small_shards)
    paths.run.mkdir(parents=True)
    monkeypatch.setattr(quickstart, "locate", lambda run: run)
    for dataset_hash, stays in ((read_manifest(small_shards).dataset_hash, True), ("another", False)):
        state = SimpleNamespace(data=SimpleNamespace(dataset_hash=dataset_hash))
        monkeypatch.setattr(quickstart, "read_state", lambda path, state=state: (state, None))
        quickstart.forget_other_data(paths)
        assert paths.run.exists() == stays


def test_a_port_in_use_is_left_alone(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(quickstart, "DEEPSPEED_PORT", taken.getsockname()[1])
        option, port = quickstart.another_port_if_taken()
        assert option == "--master_port"
        assert int(port) != taken.getsockname()[1]
    assert quickstart.another_port_if_taken() == []


@pytest.mark.parametrize(
    ("visible", "expected"), [("3,1", ["--include", "localhost:3"]), ("0", ["--include", "localhost:0"])]
)
def test_a_gpu_that_the_user_chose_is_the_one_taken(monkeypatch, visible, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert quickstart.one_device() == expected


@pytest.mark.parametrize("visible", [None, "", "-1", "GPU-8a2b"])
def test_without_an_index_the_launcher_takes_the_first(monkeypatch, visible):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert quickstart.one_device() == ["--num_gpus", "1"]


@pytest.mark.parametrize("program", ["llm", "deepspeed"])
def test_no_command_is_a_script_of_the_environment(monkeypatch, program):
    """The first line of a script names its interpreter, and the system splits that line at a blank in the path."""
    commands = []
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: commands.append(command) or SimpleNamespace(returncode=0, stdout="")
    )
    monkeypatch.setattr(sys, "executable", "/my models/.venv/bin/python")
    quickstart.call([program, "--help"])
    assert commands[0][:2] == ["/my models/.venv/bin/python", "-m"]


def test_a_failing_command_ends_in_one_line(tmp_path, capfd):
    assert quickstart.main(["--root", str(tmp_path), "train.no_such_key=1"]) == 1
    assert "unknown key train.no_such_key" in capfd.readouterr().err


@pytest.mark.slow
def test_quickstart_from_nothing_and_again(tmp_path):
    small = ["train.total_tokens=40960", "train.device=cpu", "model.n_layers=1", "train.eval_tokens=8192"]
    command = [sys.executable, "-m", "llm.tools.quickstart", "--root", str(tmp_path), *small]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    screen = first.stderr
    shown = {
        name: float(line.split()[-1])
        for name in ("the same model before training", "the trained model", "a bigram model", "the compressor xz -9")
        for line in screen.splitlines()
        if line.startswith(name)
    }
    assert len(shown) == 4
    assert shown["the trained model"] < shown["the same model before training"]
    text = "".join(documents(tmp_path / "data/quickstart/held_out.jsonl")).encode()
    assert shown["the compressor xz -9"] == pytest.approx(8 * len(lzma.compress(text, preset=9)) / len(text), abs=5e-4)
    run = tmp_path / "artifacts/quickstart/run"
    assert (run.parent / "loss.png").read_bytes().startswith(b"\x89PNG")
    for command_shown in (
        "llm corpus",
        "llm train_tokenizer",
        "llm prepare_data",
        "deepspeed",
        "llm eval",
        "llm generate",
    ):
        assert f"$ {command_shown}" in screen

    checkpoint, shards = (run / "latest").resolve(), tmp_path / "data/quickstart/shards/manifest.json"
    made = [path.stat().st_mtime_ns for path in (checkpoint / "model.safetensors", shards)]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert [path.stat().st_mtime_ns for path in (checkpoint / "model.safetensors", shards)] == made
    assert "$ llm train_tokenizer" not in again.stderr
