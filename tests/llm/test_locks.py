"""One of two commands at the same place wins, also where the file system has no flock."""

import contextlib
import errno
import fcntl
import json
import os
import platform
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from llm import locks
from llm.atomic import atomic_directory, output_directory
from llm.data.corpus import write_stdlib_corpus
from llm.data.prepare import prepare_data
from llm.data.tokenizer import train_tokenizer
from llm.errors import UserError
from llm.locks import locked

BUSY = "somebody writes here"


@pytest.fixture(params=[None, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    if request.param is not None:
        without_flock(monkeypatch, request.param)
    number: int | None = request.param
    return number


def without_flock(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOSYS) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "WATCHED_SECONDS", 0.3)


@pytest.mark.parametrize("is_folder", [True, False])
def test_the_second_is_refused_until_the_first_has_ended_and_nothing_is_left(
    tmp_path: Path, flock: int | None, is_folder: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out"
    if is_folder:
        path.mkdir()
    for _ in range(2):
        with locked(path, BUSY):
            with pytest.raises(UserError, match=f"{path}: {BUSY}"), locked(path, BUSY):
                pass
            with locked(tmp_path / "other", BUSY):
                pass
    assert sorted(tmp_path.rglob("*")) == ([path] if is_folder else [])
    said = capsys.readouterr().err
    line = f"{path}: its file system has no flock ({os.strerror(flock or 0)}); a lock file takes its place\n"
    assert said.count(line) == (0 if flock is None else 2)


def test_other_errors_are_no_missing_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_flock(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path, BUSY):
        pass


def test_a_lock_file_of_a_process_that_has_ended_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_flock(monkeypatch)
    ended = subprocess.Popen(["true"])
    ended.wait()
    mine = {"host": platform.node(), "pid": os.getpid(), "started": "another process of this number"}
    for holder in ({**mine, "pid": ended.pid}, mine, {**mine, "host": "elsewhere"}, {}, []):
        (tmp_path / ".lock").write_text(json.dumps(holder))
        with locked(tmp_path, BUSY):
            pass


def test_a_lock_file_of_another_host_holds_while_it_is_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_flock(monkeypatch)
    (tmp_path / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": ""}))
    monkeypatch.setattr("time.sleep", lambda seconds: os.utime(tmp_path / ".lock", (1, 1)))
    with pytest.raises(UserError, match=BUSY), locked(tmp_path, BUSY):
        pass
    (tmp_path / ".lock").write_text("{")
    # Whoever cannot wait, because its process is about to end, does not take it.
    with pytest.raises(UserError, match=BUSY), locked(tmp_path, BUSY, patient=False):
        pass


def test_a_locked_folder_is_known_after_it_was_renamed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run", BUSY) as lock:
        assert lock.path == tmp_path / "run"
        (tmp_path / "run").rename(tmp_path / "moved")
        assert lock.path == tmp_path / "moved"
        (tmp_path / "run").mkdir()
        assert lock.path == tmp_path / "moved"
        (tmp_path / "moved").rmdir()
        with pytest.raises(FileNotFoundError, match="the folder was deleted"):
            lock.path  # noqa: B018


def fill(folder: Path) -> None:
    for name in ("config.json", "weights"):
        (folder / name).write_text(name)


@pytest.mark.parametrize("way", ["new", "empty", "link", "current"])
def test_an_output_is_complete_whatever_its_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    folder = tmp_path / "out"
    if way != "new":
        folder.mkdir()
        (folder / ".incomplete").mkdir()  # of a killed command
    identity = folder.stat().st_ino if way != "new" else None
    out: Path | str = folder
    if way == "link":
        out = tmp_path / "link"
        out.symlink_to("out")
    elif way == "current":
        monkeypatch.chdir(folder)
        out = "."
    with contextlib.suppress(ZeroDivisionError), output_directory(out) as made:
        fill(made)
        print(1 / 0)
    assert not list(folder.glob("*")), "absent"
    with output_directory(out) as made:
        fill(made)
        with pytest.raises(UserError, match="another command writes here"), output_directory(out):
            pass
        assert not (folder / "config.json").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "weights"]
    assert identity in (None, folder.stat().st_ino), "a mount point stays"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"][way != "link" :]
    with pytest.raises(UserError, match="exists already"), output_directory(out):
        pass


def test_the_file_that_makes_a_folder_complete_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda old, new: moved.append(Path(new).name) or rename(old, new))
    with atomic_directory(tmp_path) as made:
        fill(made)
    assert moved == ["weights", "config.json"]


def test_a_command_killed_while_it_moved_its_files_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    child, rename = os.fork(), os.rename
    if child == 0:

        def rename_and_die(old: Path, new: Path) -> None:
            rename(old, new)
            os.kill(os.getpid(), signal.SIGKILL)

        os.rename = rename_and_die
        with output_directory(tmp_path / "out") as made:
            fill(made)
    os.waitpid(child, 0)
    assert [path.name for path in (tmp_path / "out").glob("[!.]*")] == ["weights"]
    with output_directory(tmp_path / "out") as made:
        fill(made)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "weights"]


def test_a_full_disk_is_named_by_the_output(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space") as caught, output_directory(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(tmp_path / "out")


@pytest.mark.parametrize("what", ["tokenizer", "prepare", "corpus"])
def test_two_commands_at_one_output(
    tmp_path: Path, small_corpus: Path, small_tokenizer: Path, what: str, flock: int | None
) -> None:
    prefix, shards = tmp_path / "spm", tmp_path / "shards"
    make: dict[str, tuple[Path, Callable[[], object]]] = {
        "tokenizer": (prefix.with_suffix(".model"), lambda: train_tokenizer([small_corpus], prefix, 500)),
        "prepare": (
            shards,
            lambda: prepare_data([small_corpus], small_tokenizer, shards, seq_len=64, shard_tokens=99),
        ),
        "corpus": (tmp_path / "a.jsonl", lambda: write_stdlib_corpus(tmp_path / "a.jsonl")),
    }
    path, command = make[what]
    if what == "prepare":
        path.mkdir()
    with locked(path, BUSY), pytest.raises(UserError, match="writ"):
        command()
    assert not (tmp_path / "shards/manifest.json").exists()
    assert not prefix.with_suffix(".model").exists()
    assert not (tmp_path / "a.jsonl").exists()


def test_an_error_without_a_number_keeps_its_text(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"^rank 1: no space$"), atomic_directory(tmp_path / "made"):
        raise OSError("rank 1: no space")
    with pytest.raises(OSError, match="made") as caught, atomic_directory(tmp_path / "made"):
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(tmp_path / "made")
