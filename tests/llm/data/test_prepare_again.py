"""A preparation that is killed at any moment goes on when it is started again, and ends with the same bytes."""

import errno
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llm.data import blocks, document_reader, packing, prepare, spool
from llm.data.manifest import read_manifest
from llm.data.prepare import prepare_data
from llm.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from llm.errors import UserError


def words(seed: int, count: int) -> str:
    chance = random.Random(seed)
    return " ".join(
        chance.choice(["the", "cat", "sat", "on", "a", "mat,", "and\n", "purred.\n\n"]) for _ in range(count)
    )


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "a.txt").write_text(words(0, 5000))
    return load_tokenizer(train_tokenizer([folder / "a.txt"], folder / "spm", 300)["model"])


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, and documents in chunks: with small shards, a moment is then as good as any other."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(blocks, "CHUNK_CHARS", 1000)
    monkeypatch.setattr(packing, "GROUP_BYTES", 3000)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_inputs(folder: Path, kind: str) -> tuple[list[Path], dict[str, Any]]:
    if kind == "running text":  # one document that is long, cut by position
        (folder / "a.txt").write_text("\n\n" + words(1, 25_000))
        return [folder / "a.txt"], {}
    if kind == "long documents":  # each ten blocks and several shards long; some are dropped at their end
        lines = [words(seed % 170, 2000 if seed % 10 == 0 else 20).replace("\n", " ").encode() for seed in range(220)]
        lines[110] += b"\xff"
        (folder / "a.txt").write_bytes(b"\n".join(lines))
        return [folder / "a.txt"], {"documents": "line", "dedup": "exact", "val_fraction": 0.2}
    texts = [words(seed % 300, 5 + 400 * (seed % 97 == 0) + seed % 40) for seed in range(600)]
    if kind == "paragraphs":
        (folder / "a.txt.gz").write_bytes(gzip.compress("\n\n".join(texts).encode()))
        (folder / "b.txt").write_bytes(b"\xff\n\nfine\n\n" + words(2, 3000).replace("\n", "").encode())
        return [folder / "a.txt.gz", folder / "b.txt"], {"documents": "paragraph"}
    for number, name in enumerate(["a.jsonl", "b.jsonl"]):
        records = [json.dumps({"text": text}) + "\n" for text in texts[number * 300 :][:300]]
        (folder / name).write_text("".join(records))
    return [folder], {"dedup": "exact"}


def saved_at(out_dir: Path) -> int:
    try:
        return (out_dir / ".incomplete" / "journal.json").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


KINDS = ["running text", "paragraphs", "equal documents", "long documents"]


class TestKilled:
    @pytest.mark.parametrize("kind", KINDS)
    def test_at_any_moment_it_goes_on_and_ends_the_same(
        self, tok: Tokenizer, tmp_path: Path, often: None, kind: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """The split by position has no journal: its run begins anew."""
        (tmp_path / "in").mkdir()
        inputs, options = write_inputs(tmp_path / "in", kind)
        options = {"seq_len": 16, "shard_tokens": 700, "val_fraction": 0.05, "workers": 1} | options
        begin = time.monotonic()
        expected = prepare_data(inputs, tok.path, tmp_path / "whole", **options)
        whole = time.monotonic() - begin
        chance = random.Random(kind)
        kills = 0
        while True:
            child = os.fork()
            if child == 0:
                try:
                    prepare_data(inputs, tok.path, tmp_path / "out", **options)
                finally:
                    os._exit(0)
            saves, seen = chance.randrange(2, 8), saved_at(tmp_path / "out")
            until = time.monotonic() + (chance.uniform(0, whole / 2) if kind == "running text" and kills < 3 else 60)
            while saves and time.monotonic() < until and not (ended := os.waitpid(child, os.WNOHANG)[0]):
                if saved_at(tmp_path / "out") != seen:
                    saves, seen = saves - 1, saved_at(tmp_path / "out")
                time.sleep(0.0005)
            if ended:
                break
            time.sleep(chance.uniform(0, 0.01))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
            assert kills < 100
            if not (tmp_path / "out" / "manifest.json").exists():
                with pytest.raises(UserError, match=r"no such directory|interrupted"):
                    read_manifest(tmp_path / "out")
        assert kills >= 1
        assert ("goes on with the interrupted run" in capfd.readouterr().err) == (kind != "running text")
        assert read_manifest(tmp_path / "out").dataset_hash == expected["dataset_hash"]
        assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
        again = prepare_data(inputs, tok.path, tmp_path / "out", **options)
        assert again["reused"]

    @pytest.mark.parametrize("kind", KINDS[1:])
    def test_after_each_shard_it_goes_on_from_there(
        self, tok: Tokenizer, tmp_path: Path, often: None, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "in").mkdir()
        inputs, options = write_inputs(tmp_path / "in", kind)
        options = {"seq_len": 16, "shard_tokens": 900, "val_fraction": 0.05, "workers": 1} | options
        prepare_data(inputs, tok.path, tmp_path / "whole", **options)
        save, shards, places = spool.atomic_text, [0], [0]

        def stop(path: Path, text: str) -> None:
            save(path, text)
            raise KeyboardInterrupt

        monkeypatch.setattr(spool, "atomic_text", stop)
        while True:
            try:
                prepare_data(inputs, tok.path, tmp_path / "out", **options)
                break
            except KeyboardInterrupt:
                journal = json.loads((tmp_path / "out" / ".incomplete" / "journal.json").read_bytes())
                shards.append(len(journal["shards"]))
                places.append(journal["state"]["place"]["offset"] + 10**6 * journal["state"]["place"]["file"])
                assert shards[-2] < shards[-1] < 100  # each run finishes at least one more
        assert places == sorted(places)
        assert len(set(places)) > 5  # and did not read from the beginning
        assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")

    def test_while_the_new_take_the_old_ones_place(
        self, tok: Tokenizer, tmp_path: Path, often: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "in").mkdir()
        inputs, options = write_inputs(tmp_path / "in", "equal documents")
        options |= {"seq_len": 16, "workers": 1, "val_fraction": 0.05}
        prepare_data(inputs, tok.path, tmp_path / "out", shard_tokens=2000, **options)  # more shards than then
        prepare_data(inputs, tok.path, tmp_path / "whole", shard_tokens=7000, **options)
        replace, publish = os.replace, prepare.publish
        for moved in range(3):
            with monkeypatch.context() as patch:
                left = iter(range(moved))
                patch.setattr(prepare, "publish", lambda *rest: (patch.setattr(os, "replace", stop), publish(*rest)))

                def stop(source: Path, target: Path, left: Any = left) -> None:
                    if next(left, None) is None:
                        raise KeyboardInterrupt
                    replace(source, target)

                with pytest.raises(KeyboardInterrupt):
                    prepare_data(inputs, tok.path, tmp_path / "out", shard_tokens=7000, **options)
            with pytest.raises(UserError, match="interrupted"):
                read_manifest(tmp_path / "out")
        prepare_data(inputs, tok.path, tmp_path / "out", shard_tokens=7000, **options)
        assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")

    def test_it_leaves_no_manifest_and_no_process_and_another_number_of_workers_goes_on(
        self, tok: Tokenizer, tmp_path: Path
    ) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps({"text": words(seed % 300, 3000)}) + "\n" for seed in range(500)))
        (tmp_path / "program.py").write_text(
            "import sys\nfrom llm.data import prepare\nif __name__ == '__main__':\n"
            "    path, tok, out_dir = sys.argv[1:]\n"
            "    prepare.prepare_data([path], tok, out_dir, seq_len=16, shard_tokens=10**5, workers=2)\n"
        )
        process = subprocess.Popen(
            [sys.executable, tmp_path / "program.py", path, tok.path, tmp_path / "out"],
            env=os.environ | {"PYTHONPATH": str(Path(document_reader.__file__).parents[2])},
            start_new_session=True,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        journal = tmp_path / "out" / ".incomplete" / "journal.json"
        while not journal.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        options: dict[str, Any] = {"seq_len": 16, "shard_tokens": 10**5}
        with pytest.raises(UserError, match="another prepare_data is writing here"):
            prepare_data([path], tok.path, tmp_path / "out", **options)
        process.kill()
        process.wait()
        while True:  # its workers end with it
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(UserError, match="interrupted"):
            read_manifest(tmp_path / "out")
        prepare_data([path], tok.path, tmp_path / "out", **options, workers=1)
        prepare_data([path], tok.path, tmp_path / "whole", **options, workers=1)
        assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


@pytest.fixture
def interrupted(tok: Tokenizer, tmp_path: Path, often: None, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    (tmp_path / "in").mkdir()
    inputs, _ = write_inputs(tmp_path / "in", "equal documents")
    with monkeypatch.context() as patch:
        add = spool.Store.add

        def stop(self: spool.Store, blocks: Any, packed: Any) -> None:
            if self.counters.documents > 300:
                raise KeyboardInterrupt
            add(self, blocks, packed)

        patch.setattr(spool.Store, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_data(inputs, tok.path, tmp_path / "out", seq_len=16, shard_tokens=1000, workers=1)
    return inputs


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seq_len": 8}, "--seq_len 16, now 8"),
        ({"shard_tokens": 500}, "--shard_tokens 1000, now 500"),
        ({"val_fraction": 0.5}, "--val_fraction 0.005, now 0.5"),
        ({"dedup": "exact"}, "--dedup default, now exact"),
        ({"inputs": ["b.jsonl"]}, "2 files, now 1"),
        ({"text": "other"}, "other contents in .*b.jsonl"),
    ],
)
def test_going_on_with_other_input_or_settings_is_an_error_that_shows_them(
    tok: Tokenizer, tmp_path: Path, interrupted: list[Path], change: dict[str, Any], said: str
) -> None:
    options: dict[str, Any] = {"seq_len": 16, "shard_tokens": 1000, "workers": 1} | change
    if text := options.pop("text", None):
        (tmp_path / "in" / "b.jsonl").write_text(json.dumps({"text": text}))
    inputs = [tmp_path / "in" / name for name in options.pop("inputs", [])] or interrupted
    with pytest.raises(UserError, match=rf"{said}.*remove .*\.incomplete to begin anew"):
        prepare_data(inputs, tok.path, tmp_path / "out", **options)
    assert (tmp_path / "out" / ".incomplete" / "journal.json").exists()


def test_a_file_of_the_interrupted_run_that_was_cut_is_an_error(
    tok: Tokenizer, tmp_path: Path, interrupted: list[Path]
) -> None:
    (tmp_path / "out" / ".incomplete" / "val.tokens").write_bytes(b"")
    with pytest.raises(UserError, match=r"val\.tokens: is shorter than it was; remove its folder"):
        prepare_data(interrupted, tok.path, tmp_path / "out", seq_len=16, shard_tokens=1000, workers=1)


def test_an_interrupted_run_of_another_version_is_begun_anew(
    tok: Tokenizer, tmp_path: Path, interrupted: list[Path]
) -> None:
    journal = tmp_path / "out" / ".incomplete" / "journal.json"
    journal.write_text(
        json.dumps({key: value for key, value in json.loads(journal.read_bytes()).items() if key != "version"})
    )
    prepare_data(interrupted, tok.path, tmp_path / "out", seq_len=16, shard_tokens=1000, workers=1, val_fraction=0.05)
    assert not journal.parent.exists()


def test_what_cannot_be_read_in_the_middle_leaves_nothing_to_go_on_with(
    tok: Tokenizer, tmp_path: Path, often: None
) -> None:
    records = [json.dumps({"text": words(seed, 30)}) for seed in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join([*records, "{"]))
    options = {"seq_len": 16, "shard_tokens": 500, "workers": 1, "strict": True}
    with pytest.raises(UserError, match=r"a\.jsonl:401: not JSON"):
        prepare_data([tmp_path / "a.jsonl"], tok.path, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "how", ["grows", "changes in place, and its time is set back", "only its time changes", "goes"]
)
def test_an_input_that_changes_while_it_is_read_makes_no_shards(
    tok: Tokenizer, tmp_path: Path, often: None, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": words(seed, 30)}) + "\n" for seed in range(300)))
    before, stat = path.read_bytes(), path.stat()
    add = spool.Store.add

    def change(self: spool.Store, blocks: Any, packed: Any) -> None:
        add(self, blocks, packed)
        if how == "grows":
            path.write_bytes(before + b'{"text": "more"}\n')
        elif how == "goes":
            path.unlink(missing_ok=True)
        elif how.startswith("changes"):
            path.write_bytes(before[:-5] + b"x" + before[-4:])
        if path.exists():
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + how.startswith("only")))

    options: dict[str, Any] = {"seq_len": 16, "shard_tokens": 1000, "workers": 1, "val_fraction": 0.05}
    with monkeypatch.context() as patch:
        patch.setattr(spool.Store, "add", change)
        if how.startswith("only"):
            prepare_data([path], tok.path, tmp_path / "out", **options)
            return
        with pytest.raises(UserError, match=r"a\.jsonl: changed while it was read, so no shards were made"):
            prepare_data([path], tok.path, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_input_that_fails_while_it_is_read_is_named_itself(
    tok: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "a.txt").write_text(words(1, 2000))
    monkeypatch.setattr(prepare.hashlib, "file_digest", fail)
    with pytest.raises(OSError, match=r"a\.txt"):
        prepare_data([tmp_path / "a.txt"], tok.path, tmp_path / "out", seq_len=16, shard_tokens=1000, workers=1)
