"""A preparation that is killed at any moment goes on when it is started again, and ends with the same bytes."""

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

from llm.data import document_reader, packing, prepare, spool
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
    """Small units, each saved: a moment is then as good as any other."""
    monkeypatch.setattr(document_reader, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(document_reader, "PIECE_CHARS", 1000)
    monkeypatch.setattr(packing, "UNIT_BYTES", 3000)
    monkeypatch.setattr(prepare, "SECONDS_A_SAVE", 0)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_inputs(folder: Path, kind: str) -> tuple[list[Path], dict[str, Any]]:
    if kind == "running text":  # one document that is long, cut by position
        (folder / "a.txt").write_text("\n\n" + words(1, 25_000))
        return [folder / "a.txt"], {}
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


class TestKilled:
    @pytest.mark.parametrize("kind", ["running text", "paragraphs", "equal documents"])
    def test_at_any_moment_it_goes_on_and_ends_the_same(
        self, tok: Tokenizer, tmp_path: Path, often: None, kind: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "in").mkdir()
        inputs, options = write_inputs(tmp_path / "in", kind)
        options |= {"seq_len": 16, "shard_tokens": 7000, "val_fraction": 0.05, "workers": 1}
        expected = prepare_data(inputs, tok.path, tmp_path / "whole", **options)
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
            while saves and not (ended := os.waitpid(child, os.WNOHANG)[0]):
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
        assert "goes on with the interrupted run" in capfd.readouterr().err
        assert read_manifest(tmp_path / "out").dataset_hash == expected["dataset_hash"]
        assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
        again = prepare_data(inputs, tok.path, tmp_path / "out", **options)
        assert again["reused"]

    def test_while_the_new_take_the_old_ones_place(
        self, tok: Tokenizer, tmp_path: Path, often: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "in").mkdir()
        inputs, options = write_inputs(tmp_path / "in", "equal documents")
        options |= {"seq_len": 16, "workers": 1, "val_fraction": 0.05}
        prepare_data(inputs, tok.path, tmp_path / "out", shard_tokens=2000, **options)  # more shards than then
        prepare_data(inputs, tok.path, tmp_path / "whole", shard_tokens=7000, **options)
        replace, publish = os.replace, prepare._publish
        for moved in range(3):
            with monkeypatch.context() as patch:
                left = iter(range(moved))
                patch.setattr(prepare, "_publish", lambda *rest: (patch.setattr(os, "replace", stop), publish(*rest)))

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
            "import sys\nfrom llm.data import prepare\nif __name__ == '__main__':\n    prepare.SECONDS_A_SAVE = 0\n"
            "    path, tok, out_dir = sys.argv[1:]\n"
            "    prepare.prepare_data([path], tok, out_dir, seq_len=16, shard_tokens=10**6, workers=2)\n"
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
        options: dict[str, Any] = {"seq_len": 16, "shard_tokens": 10**6}
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

        def stop(self: spool.Store, unit: Any, packed: Any) -> bool:
            if self.counters.documents > 300:
                raise KeyboardInterrupt
            return add(self, unit, packed)

        patch.setattr(spool.Store, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_data(inputs, tok.path, tmp_path / "out", seq_len=16, shard_tokens=7000, workers=1)
    return inputs


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seq_len": 8}, "--seq_len 16, now 8"),
        ({"shard_tokens": 500}, "--shard_tokens 7000, now 500"),
        ({"val_fraction": 0.5}, "--val_fraction 0.005, now 0.5"),
        ({"dedup": "exact"}, "--dedup default, now exact"),
        ({"text_key": "content"}, "--text_key default, now content"),
        ({"inputs": ["b.jsonl"]}, "2 files, now 1"),
        ({"text": "other"}, "other contents in .*b.jsonl"),
    ],
)
def test_going_on_with_other_input_or_settings_is_an_error_that_shows_them(
    tok: Tokenizer, tmp_path: Path, interrupted: list[Path], change: dict[str, Any], said: str
) -> None:
    options: dict[str, Any] = {"seq_len": 16, "shard_tokens": 7000, "workers": 1} | change
    if text := options.pop("text", None):
        (tmp_path / "in" / "b.jsonl").write_text(json.dumps({"text": text}))
    inputs = [tmp_path / "in" / name for name in options.pop("inputs", [])] or interrupted
    with pytest.raises(UserError, match=rf"{said}.*remove .*\.incomplete to begin anew"):
        prepare_data(inputs, tok.path, tmp_path / "out", **options)
    assert (tmp_path / "out" / ".incomplete" / "journal.json").exists()


def test_what_cannot_be_read_in_the_middle_leaves_nothing_to_go_on_with(
    tok: Tokenizer, tmp_path: Path, often: None
) -> None:
    records = [json.dumps({"text": words(seed, 30)}) for seed in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join([*records, "{"]))
    with pytest.raises(UserError, match=r"a\.jsonl:401: not JSON"):
        prepare_data([tmp_path / "a.jsonl"], tok.path, tmp_path / "out", seq_len=16, shard_tokens=500, workers=1)
    assert not (tmp_path / "out").exists()
