"""`llm download` against a server that speaks the Hub's protocol: complete and checked, or one line."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from hub import Hub
from running import environment, result_of, run_llm

from llm.data import download as module
from llm.data.download import KNOWN, DataSet, download
from llm.errors import UserError

CONTENTS = random.Random(0)
FILES = {f"data/train-{i}.parquet": CONTENTS.randbytes(2_000_000 + i) for i in range(5)} | {
    "data/test.txt": b"a test\n" * 20,
    "data/empty.txt": b"",
    "data/deep/er/a b+c.jsonl": CONTENTS.randbytes(5_000),
    "README.md": b"# A data set\n",
}
TRAIN = [name for name in FILES if "train" in name]


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other files of tests turn the Hub off for their whole process."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub("some/texts", dict(FILES))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    monkeypatch.setattr(module, "WAIT_SECONDS", 0.001)
    # A test of the program behind a proxy would ask the proxy for 127.0.0.1.
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.close()


def contents(folder: Path) -> dict[str, bytes]:
    """Also hidden files, but the record and the lock."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in (module.RECORD, ".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def of(*names: str) -> dict[str, bytes]:
    return {name: FILES[name] for name in names}


def fetched(hub: Hub) -> list[str]:
    return [path for _, path, _ in hub.requests]


def test_the_server_of_these_tests_speaks_as_the_hubs_own_library_expects(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (TRAIN[0], "data/test.txt"):
        path = huggingface_hub.hf_hub_download(
            "some/texts", name, repo_type="dataset", local_dir=tmp_path, endpoint=hub.url
        )
        assert Path(path).read_bytes() == FILES[name]


def test_files_that_match_come_whole_under_their_paths(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = download("hf:some/texts", tmp_path, files=["data/*"])
    expected = of(*(name for name in FILES if name.startswith("data/")))
    assert contents(tmp_path / "texts") == expected
    assert result["out_dir"] == str(tmp_path / "texts")
    assert (result["files"], result["bytes"]) == (len(expected), sum(map(len, expected.values())))
    assert (result["repository"], result["commit"]) == ("some/texts", hub.commit)
    said = capsys.readouterr().err
    assert f"some/texts at {hub.commit[:12]}, 8 of 8 files, 10.01 MB: about" in said
    assert "bytes a token of a compressed file" in said
    assert "10.01 MB to fetch, the disk has room for" in said
    # What is there is checked, not fetched again.
    hub.requests.clear()
    assert download("hf:some/texts", tmp_path, files=["data/*"]) == result
    assert not hub.requests
    assert "0.00 MB to fetch" in capsys.readouterr().err


def test_tokens_take_the_first_files_that_are_enough_by_the_rule_that_is_shown(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(KNOWN, "ours", DataSet("some/texts", ("data/train-*",), 2.0, "as counted once"))
    for tokens, files in ((1, 1), (1_000_000, 1), (1_000_001, 2), (5_000_005, 5)):
        folder = tmp_path / str(tokens)
        result = download("ours", folder, tokens=tokens)
        assert sorted(contents(folder / "ours")) == TRAIN[:files]
        assert result["tokens"] == round(sum(len(FILES[name]) for name in TRAIN[:files]) / 2)
        assert "by 2 bytes of its files a token (as counted once)" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--tokens 5,000,006: the 5 files data/train-\* of ours have about 5e\+06"):
        download("ours", tmp_path, tokens=5_000_006)
    # Other files of a known repository go by the assumption for all.
    assert download("ours", tmp_path / "other", files=["data/test.txt"])["tokens"] == round(140 / module.TEXT_BYTES)


def test_no_connection_that_breaks_changes_the_result(hub: Hub, tmp_path: Path) -> None:
    chance = random.Random(1)
    hub.breaks = lambda path, begin, content: chance.randrange(len(content)) if chance.random() < 0.7 else None
    download("hf:some/texts", tmp_path, files=["data/train-*"])
    assert contents(tmp_path / "texts") == of(*TRAIN)
    assert any(asked for _, _, asked in hub.requests)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["breaks", "kills"])
def test_after_twenty_breaks_at_random_bytes_the_result_is_equal(hub: Hub, tmp_path: Path, kind: str) -> None:
    """kills: the program is killed at that byte, and begun again."""
    name, size = TRAIN[0], len(FILES[TRAIN[0]])
    chance = random.Random(2)
    places = sorted(chance.randrange(size) for _ in range(20))
    sent: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def breaks(path: str, begin: int, content: bytes) -> int | None:
        following = [place for place in places if place > begin]
        if not following:
            return None
        sent.append(following[0])
        return following[0] - begin

    hub.breaks = breaks
    if kind == "breaks":
        download("hf:some/texts", tmp_path, files=[name])
        assert len(sent) == 20
    else:
        command = [
            sys.executable,
            "-m",
            "llm",
            "download",
            "hf:some/texts",
            "--files",
            name,
            "--out_dir",
            str(tmp_path),
        ]
        for place in places:
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment())
            while place not in sent:
                assert process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
        hub.breaks = lambda path, begin, content: None
        run_llm(*command[3:])
    assert contents(tmp_path / "texts") == of(name)
    begins = {int(asked.removeprefix("bytes=").removesuffix("-")) for _, _, asked in hub.requests if asked}
    assert begins  # it went on in the middle


def test_a_part_of_a_killed_run_is_gone_on_with(hub: Hub, tmp_path: Path) -> None:
    hub.breaks = lambda path, begin, content: 1_234_567 if not begin else 0
    with pytest.raises(UserError, match="the same command goes on"):
        download("hf:some/texts", tmp_path, files=[TRAIN[0]])
    assert [len(content) for content in contents(tmp_path / "texts").values()] == [1_234_567]
    hub.breaks = lambda path, begin, content: None
    hub.requests.clear()
    download("hf:some/texts", tmp_path, files=[TRAIN[0]])
    assert hub.requests == [("GET", TRAIN[0], "bytes=1234567-")]
    assert contents(tmp_path / "texts") == of(TRAIN[0])


def test_a_server_without_ranges_costs_a_new_beginning_and_no_byte(hub: Hub, tmp_path: Path) -> None:
    hub.ranges = False
    begun = []

    def breaks(path: str, begin: int, content: bytes) -> int | None:
        begun.append(begin)
        return 1_000 if len(begun) < 3 else None

    hub.breaks = breaks
    download("hf:some/texts", tmp_path, files=[TRAIN[0]])
    assert contents(tmp_path / "texts") == of(TRAIN[0])


def test_a_part_with_other_bytes_is_found_by_its_hash_and_fetched_again(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = tmp_path / "texts" / ".incomplete" / hashlib.sha256(FILES[TRAIN[0]]).hexdigest()
    part.parent.mkdir(parents=True)
    part.write_bytes(b"other bytes")
    download("hf:some/texts", tmp_path, files=[TRAIN[0]])
    assert contents(tmp_path / "texts") == of(TRAIN[0])
    assert "has another hash than the Hub lists; it is fetched again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "listed", "said"),
    [
        (TRAIN[0], {"lfs": {"oid": "0" * 64}}, "has another hash than the Hub lists, twice"),
        ("data/test.txt", {"oid": "0" * 40}, "has another hash than the Hub lists, twice"),
        (TRAIN[0], {"size": 1_999_999}, "the server sends more than the 1,999,999 bytes that the Hub lists"),
        ("data/test.txt", {"size": 141}, "the Hub ends it 1 bytes early"),
        ("data/test.txt", {"path": "data/../../test.txt"}, "leads out of the folder"),
    ],
)
def test_what_is_not_as_the_hub_lists_it_is_an_error_and_no_file(
    hub: Hub, tmp_path: Path, name: str, listed: dict[str, object], said: str
) -> None:
    hub.listed = {name: listed}
    with pytest.raises(UserError, match=said):
        download("hf:some/texts", tmp_path, files=["data/*" if "path" in listed else name])
    assert name not in contents(tmp_path / "texts")


def test_a_file_of_yours_is_never_replaced(hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / "texts" / TRAIN[0]
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match="is there, with another content than in the repository"):
        download("hf:some/texts", tmp_path, files=["data/train-*"])
    assert contents(tmp_path / "texts") == {TRAIN[0]: b"mine"}


def test_a_folder_keeps_its_commit_and_its_repository(hub: Hub, tmp_path: Path) -> None:
    download("hf:some/texts", tmp_path, files=["data/test.txt"])
    hub.commit = "f" * 40
    with pytest.raises(UserError, match=r"answers 404 for some/texts; check the name"):
        download("hf:some/texts", tmp_path, files=[TRAIN[0]])
    with pytest.raises(UserError, match="holds files of some/texts; name another --out_dir"):
        download("hf:others/texts", tmp_path, files=["*"])
    (tmp_path / "texts" / module.RECORD).write_text("{")
    with pytest.raises(UserError, match="is damaged; delete it to take the newest commit"):
        download("hf:some/texts", tmp_path, files=[TRAIN[0]])
    (tmp_path / "texts" / module.RECORD).unlink()
    assert download("hf:some/texts", tmp_path, files=[TRAIN[0]])["commit"] == "f" * 40


def test_the_disk_must_have_room_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_000_000))
    with pytest.raises(UserError, match=r"4.00 MB are to be fetched and the disk has 2.00 MB; name another --out_dir"):
        download("hf:some/texts", tmp_path, files=["data/train-[01]*"])
    assert not hub.requests
    # What is there already needs no room.
    download("hf:some/texts", tmp_path, files=["data/train-0*"])
    assert contents(tmp_path / "texts") == of(TRAIN[0])


def test_a_token_is_sent_to_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    with pytest.raises(UserError, match="or it is private; check the name, or set HF_TOKEN"):
        download("hf:some/texts", tmp_path, files=[TRAIN[0]])
    monkeypatch.delenv("HF_HUB_DISABLE_IMPLICIT_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    download("hf:some/texts", tmp_path, files=[TRAIN[0]])
    assert contents(tmp_path / "texts") == of(TRAIN[0])


@pytest.mark.parametrize(
    ("name", "files", "said"),
    [
        ("fineweb", [], "fineweb: no known data set; name one of fineweb-edu, climbmix, tinystories, wikitext, or hf:"),
        ("hf:texts", ["*"], "hf:texts: no known data set"),
        ("hf:other/texts", ["*"], "has no data set other/texts, or it is private"),
        ("hf:some/texts", [], r"needs --files PATTERN; the repository has 5 data/\*.parquet, 2 data/\*.txt"),
        ("hf:some/texts", ["data/*.gz"], r"no file matches --files 'data/\*.gz'; it has 5 data/\*.parquet, 2 data/"),
        ("hf:some/texts", [TRAIN[0], "x/y/z*"], r"no file matches --files 'x/y/z\*'"),
    ],
)
def test_what_there_is_not_is_one_line(hub: Hub, tmp_path: Path, name: str, files: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        download(name, tmp_path / "raw", files=files)
    assert not (tmp_path / "raw").exists() or not contents(tmp_path / "raw")


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "GatedRepo", "asks for your consent; give it on http://127"),
        (403, "Forbidden", "answers 403 for some/texts; set HF_TOKEN to a token that may read it"),
        (503, "Busy", "answers 503 for some/texts; wait, then give the same command"),
        (200, "Html", "is no Hugging Face Hub"),
    ],
)
def test_answers_that_are_no_files_are_one_line(hub: Hub, tmp_path: Path, status: int, code: str, said: str) -> None:
    hub.error = status, code
    with pytest.raises(UserError, match=said):
        download("hf:some/texts", tmp_path, files=["*"])


def test_the_program_without_a_network_says_so_in_one_line(hub: Hub, tmp_path: Path) -> None:
    url = hub.url
    hub.close()
    arguments = ("download", "fineweb-edu", "--tokens", "3e9", "--out_dir", tmp_path / "raw")
    done = run_llm(*arguments, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"error: fineweb-edu: cannot reach {url} (" in done.stderr
    done = run_llm(*arguments, check=False, env=environment() | {"HF_HUB_OFFLINE": "1"})
    assert done.stderr == "error: fineweb-edu: HF_HUB_OFFLINE is set; unset it to download\n"


def test_the_program_downloads_and_names_the_next_command(hub: Hub, tmp_path: Path) -> None:
    done = run_llm("download", "hf:some/texts", "--files", "data/t*", "--out_dir", tmp_path, "--json")
    assert contents(tmp_path / "texts") == of(*TRAIN, "data/test.txt")
    result = result_of(done)
    assert (result["files"], result["bytes"]) == (6, sum(len(FILES[name]) for name in TRAIN) + 140)
    assert f"next: llm prepare_data --input {tmp_path}/texts --vocab_size 32000" in done.stderr
    assert os.listdir(tmp_path) == ["texts"]
