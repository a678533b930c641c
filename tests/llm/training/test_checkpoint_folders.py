"""What a run's folder keeps, whichever way it was copied, moved or taken back."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llm.config import CheckpointConfig
from llm.errors import DamagedCheckpoint, UserError
from llm.model import checkpoint, checkpoint_path
from llm.model.checkpoint_path import locate, newest
from llm.training import checkpoint_folders
from llm.training.checkpoint_folders import best_checkpoint, delete_old, point, set_aside, tidy

Say = Callable[[str], None]


@pytest.fixture
def run(random_checkpoint: Path, tmp_path: Path) -> Path:
    """A run's folder with the checkpoints of steps 1 to 4; `latest` and `best` name 4 and 2."""
    folder = tmp_path / "run"
    for step in range(1, 5):
        path = folder / f"step-{step:08d}"
        shutil.copytree(locate(random_checkpoint), path)
        checkpoint.write_state(path, {"step": step})
    point(folder / "latest", "step-00000004")
    point(folder / "best", "step-00000002")
    return folder


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "symlink", refuse)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir())


def test_a_user_goes_back_by_the_link_or_by_the_file_in_its_place(run: Path, no_links: None) -> None:
    assert newest(run) == locate(run) == locate(run / "latest") == run / "step-00000004"
    point(run / "latest", "step-00000002")
    assert (run / "latest").read_text() == "step-00000002\n"
    assert newest(run) == locate(run) == locate(run / "latest") == run / "step-00000002"
    point(run / "best", "step-00000003")
    assert best_checkpoint(run) == locate(run / "best") == run / "step-00000003"


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"../run/step-00000002", b"step-00000009\n", b"x" * 100_000])
def test_a_file_that_names_no_checkpoint_gives_the_newest_with_a_line(
    run: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "latest").unlink()
    (run / "latest").write_bytes(content)
    assert newest(run) == run / "step-00000004"
    assert "which is not there; the newest complete one is step-00000004" in capsys.readouterr().err


def test_where_latest_is_missing_or_a_folder_the_newest_complete_one_is_taken(run: Path) -> None:
    (run / "latest").unlink()
    assert newest(run) == run / "step-00000004"
    (run / "step-00000004/model.safetensors").unlink()
    assert newest(run) == run / "step-00000003"
    (run / "step-00000003/state.json").unlink()
    assert newest(run) == run / "step-00000002"
    shutil.copytree(run / "step-00000001", run / "latest")
    assert newest(run) == run / "step-00000002"
    shutil.rmtree(run / "latest")
    (run / "step-00000002").rename(run / "latest")
    assert newest(run) == run / "latest"


def test_what_latest_names_is_an_error_where_it_is_damaged(run: Path) -> None:
    (run / "step-00000004/state.json").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"step-00000004/state\.json: missing"):
        newest(run)


def test_a_copy_that_followed_the_links_gets_links_again_and_loses_nothing(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    assert (copied / "latest").is_dir()
    assert not (copied / "latest").is_symlink()
    shutil.rmtree(copied / "step-00000004")  # only `latest` has it
    (copied / "best/tokenizer.json").write_text("{}")  # another one than step 2
    said: list[str] = []
    tidy(copied, said.append)
    assert (copied / "latest").readlink() == Path("step-00000004")
    assert not checkpoint.verify(copied / "latest")
    assert "best.copy-1" in names(copied)
    assert len(said) == 2
    tidy(copied, said.append)
    assert len(said) == 2


def test_a_checkpoint_behind_a_link_is_deleted_as_a_link_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (run / "step-00000001").rename(tmp_path / "disk/step-00000001")
    (run / "step-00000001").symlink_to(tmp_path / "disk/step-00000001")
    said: list[str] = []
    delete_old(run, CheckpointConfig(keep_last=1, keep_best=True), 4, said.append)
    assert names(run) == ["best", "latest", "step-00000002", "step-00000004"]
    assert len(list((tmp_path / "disk/step-00000001").iterdir())) == 6
    assert said == [
        f"{run / 'step-00000001'}: the link is deleted, but not {tmp_path / 'disk/step-00000001'}, which is outside of "
        "the run's folder"
    ]


def test_checkpoints_from_before_a_run_went_back_are_not_deleted(run: Path) -> None:
    delete_old(run, CheckpointConfig(keep_last=1, keep_best=False), 2, print)
    assert [path.name for path in checkpoint_path.saved(run)] == ["step-00000002", "step-00000003", "step-00000004"]


def test_another_checkpoint_of_the_same_step_is_kept_and_an_equal_one_is_replaced(run: Path) -> None:
    path = run / "step-00000004"
    sums = checkpoint.read_checksums(path)
    assert sums is not None
    set_aside(path, sums, print)
    assert path.exists()
    (path / "state.json").write_text("damaged")
    said: list[str] = []
    set_aside(path, sums, said.append)
    assert not path.exists()
    assert (run / "step-00000004.before-1/state.json").read_text() == "damaged"
    assert said == [f"{path}: was there already, from before the run went back; it is kept as step-00000004.before-1"]


def test_a_damaged_best_does_not_stop_a_run(run: Path) -> None:
    state = checkpoint.read_state(run / "step-00000004")[0]
    (run / "best/state.json").write_text("{")
    assert checkpoint_folders.is_best(run, state.validated(3.0, checkpoint.read_state(run / "latest")[1].train))


def test_an_average_takes_the_checkpoints_up_to_the_latest(run: Path, tmp_path: Path) -> None:
    from llm.tools.average import average

    point(run / "latest", "step-00000003")
    assert average(run, tmp_path / "mean", last=2)["checkpoints"] == ["step-00000002", "step-00000003"]
    assert not checkpoint.verify(tmp_path / "mean")
    with pytest.raises(UserError, match="holds 3 checkpoints, not 4"):
        average(run, tmp_path / "other", last=4)
    assert json.loads((tmp_path / "mean/state.json").read_text())["format_version"] == 2
