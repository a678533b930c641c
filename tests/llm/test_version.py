"""The commit of the source: of its git checkout, or as LLM_COMMIT states it."""

import re
import subprocess
from pathlib import Path

import pytest

from llm import version


@pytest.fixture(autouse=True)
def _unstated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLM_COMMIT", raising=False)


def test_a_stated_commit_comes_before_that_of_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_COMMIT", "0123abc")
    assert version.source_commit() == "0123abc"


def test_a_checkout_names_its_commit_and_whether_files_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(version, "ROOT", tmp_path)
    commit = version.source_commit()
    assert re.fullmatch("[0-9a-f]{40}", commit or "")
    (tmp_path / "file").write_text("2")
    assert version.source_commit() == f"{commit}-dirty"


def test_a_folder_inside_another_repository_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    (tmp_path / "copy").mkdir()
    monkeypatch.setattr(version, "ROOT", tmp_path / "copy")
    assert version.source_commit() is None
