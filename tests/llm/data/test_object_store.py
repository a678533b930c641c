"""A data set in an object store is copied once, whole and right, whatever the store and the line do meanwhile."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.registry import known_implementations
from object_server import FAULTS, ObjectServer
from running import deepspeed_module, read_losses, run_llm, small_config, start_two

from llm.config import DataConfig
from llm.config_file import load_config
from llm.data import object_store
from llm.data.manifest import read_manifest
from llm.data.object_store import copy, is_copied, open_manifest
from llm.display import Display
from llm.errors import UserError
from llm.tools.doctor_folders import check_data, data_hash
from llm.training.resolve import find_data

Llm = Callable[..., tuple[int, str, str]]
WriteConfig = Callable[..., Path]


@pytest.fixture
def bucket(small_shards: Path, tmp_path: Path) -> Path:
    """A folder with the data set as an object store would have it, which a test may damage."""
    return shutil.copytree(small_shards, tmp_path / "store" / "bucket" / "shards")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "PIECE", 9_000)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "LONGEST_PAUSE", 0.01)


@pytest.fixture
def serve(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ObjectServer]]:
    """Starts an S3 server for the bucket."""
    s3fs = pytest.importorskip("s3fs")
    servers = []

    def start(**options: Any) -> ObjectServer:
        servers.append(ObjectServer(bucket.parents[1], **options).__enter__())
        for name, value in servers[-1].environment.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        # Its own tries would wait for seconds.
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
        return servers[-1]

    yield start
    for server in servers:
        server.__exit__()


def fetch(url: str, cache: Path, minutes: float = 10.0, stop: threading.Event | None = None) -> Path:
    """Copies a data set; returns the folder of its copy."""
    manifest = open_manifest(url, str(cache), minutes)
    with Display("copying", 1) as display:
        config = DataConfig(cache=str(cache), retry_minutes=minutes)
        copy([manifest], config, display, stop or threading.Event())
    return manifest.path


def assert_equal(folder: Path, original: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in original.iterdir() if not path.name.endswith(".vocab")}
    for name in names:
        assert (folder / name).read_bytes() == (original / name).read_bytes(), name


def test_a_copy_from_s3_is_the_data_set_and_the_next_run_uses_it_again(
    serve: Any, bucket: Path, tmp_path: Path, small_pieces: None, capfd: pytest.CaptureFixture[str]
) -> None:
    server = serve()
    folder = fetch("s3://bucket/shards", tmp_path / "cache")
    assert folder.parent == tmp_path / "cache"
    assert_equal(folder, bucket)
    manifest = open_manifest("s3://bucket/shards", str(tmp_path / "cache"), 0)
    assert manifest.dataset_hash == read_manifest(bucket).dataset_hash
    assert (manifest.name, is_copied([manifest])) == ("s3://bucket/shards", True)
    assert server.sent() == sum(shard.bytes for shard in manifest.all_shards)
    capfd.readouterr()
    fetch("s3://bucket/shards/", tmp_path / "cache")
    assert "is in" in capfd.readouterr().err
    assert server.sent() == sum(shard.bytes for shard in manifest.all_shards)


@pytest.mark.parametrize(
    "faults", [FAULTS, *(pytest.param((fault,), marks=pytest.mark.slow, id=fault) for fault in FAULTS)]
)
def test_a_store_that_fails_is_survived(
    serve: Any, bucket: Path, tmp_path: Path, faults: tuple[str, ...], no_pauses: None, monkeypatch: Any
) -> None:
    monkeypatch.setattr(object_store, "PIECE", 30_000)
    # A damaged piece costs its whole file.
    monkeypatch.setattr(object_store, "CHECKSUM_TRIES", 50)
    serve(faults=faults, chance=0.25)
    assert_equal(fetch("s3://bucket/shards", tmp_path / "cache"), bucket)


def test_any_other_store_of_fsspec_will_do(bucket: Path, tmp_path: Path) -> None:
    assert_equal(fetch(f"file://{bucket}", tmp_path / "cache"), bucket)
    memory = fsspec.filesystem("memory")
    memory.put(str(bucket), "/a/shards", recursive=True)
    try:
        # The contents decide the folder, so this is the same copy.
        assert fetch("memory://a/shards", tmp_path / "cache").name == fetch(f"file://{bucket}", tmp_path / "cache").name
    finally:
        memory.rm("/a", recursive=True)


class Broken:
    """A local file system whose answers a test changes. change: (path, first byte, content) -> content, or raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, change: Callable[[str, int, bytes], bytes]) -> None:
        files = fsspec.filesystem("file")
        self.read = 0
        cat = files.cat_file

        def cat_file(path: str, start: int, end: int) -> bytes:
            content = change(path, start, cat(path, start=start, end=end))
            self.read += len(content) if path.endswith(".bin") else 0
            return content

        monkeypatch.setattr(type(files), "cat_file", lambda self, *given, **named: cat_file(*given, **named))


def test_an_interrupted_copy_goes_on_where_it_stopped(
    bucket: Path, tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = threading.Event()
    calls = []

    def change(path: str, first: int, content: bytes) -> bytes:
        calls.append(path)
        if sum(path.endswith(".bin") for path in calls) > 12:
            stop.set()
        return content

    broken = Broken(monkeypatch, change)
    folder = fetch(f"file://{bucket}", tmp_path / "cache", stop=stop)
    assert not is_copied([open_manifest(f"file://{bucket}", str(tmp_path / "cache"), 0)])
    assert not (folder / "manifest.json").exists()
    there = sum(path.stat().st_size for path in folder.iterdir() if ".bin" in path.name)
    assert there == broken.read > 0
    broken.read = 0
    fetch(f"file://{bucket}", tmp_path / "cache")
    assert_equal(folder, bucket)
    assert broken.read == sum(shard.bytes for shard in read_manifest(bucket).all_shards) - there


def test_a_part_that_a_crash_has_damaged_is_fetched_again(bucket: Path, tmp_path: Path) -> None:
    manifest = open_manifest(f"file://{bucket}", str(tmp_path / "cache"), 0)
    shards = manifest.all_shards
    manifest.path.mkdir(parents=True)
    (manifest.path / f".{shards[0].file}.part").write_bytes(bytes(shards[0].bytes // 2))
    (manifest.path / f".{shards[1].file}.part").write_bytes(bytes(2 * shards[1].bytes))
    assert_equal(fetch(f"file://{bucket}", tmp_path / "cache"), bucket)


def test_a_shard_that_was_deleted_from_the_copy_comes_again_alone(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Broken(monkeypatch, lambda path, first, content: content)
    folder = fetch(f"file://{bucket}", tmp_path / "cache")
    (folder / "train-00001.bin").unlink()
    broken.read = 0
    fetch(f"file://{bucket}", tmp_path / "cache")
    assert_equal(folder, bucket)
    assert broken.read == (bucket / "train-00001.bin").stat().st_size


def test_what_the_store_has_damaged_is_an_error_that_names_it(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, cache = f"file://{bucket}", tmp_path / "cache"
    content = bytearray((bucket / "train-00001.bin").read_bytes())
    content[5_000] ^= 1
    (bucket / "train-00001.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"train-00001\.bin: came 3 times with another sha256"):
        fetch(url, cache)
    (bucket / "train-00001.bin").write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"train-00001\.bin: has [\d,]+ bytes, and [\d,]+ by its manifest"):
        fetch(url, cache)
    (bucket / "train-00001.bin").unlink()
    with pytest.raises(UserError, match=r"train-00001\.bin: the store has no such file"):
        fetch(url, cache)
    (folder,) = cache.iterdir()
    assert not (folder / "manifest.json").exists()
    assert not (folder / "train-00001.bin").exists()
    assert (folder / "train-00000.bin").exists()


def test_a_store_that_stays_silent_is_one_line_after_the_minutes(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def change(path: str, first: int, content: bytes) -> bytes:
        if path.endswith("train-00001.bin"):
            raise ConnectionResetError("reset")
        return content

    Broken(monkeypatch, change)
    with pytest.raises(UserError, match=r"train-00001\.bin: nothing has come for 0\.001 minutes \(data.retry_minutes"):
        fetch(f"file://{bucket}", tmp_path / "cache", minutes=0.001)
    assert "asked again for up to 0.0 minutes" in capfd.readouterr().err


def test_a_tokenizer_of_other_shards_is_an_error(bucket: Path, tmp_path: Path) -> None:
    (bucket / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"tokenizer\.model: not the tokenizer"):
        fetch(f"file://{bucket}", tmp_path / "cache")


def test_a_disk_without_room_is_an_error_before_anything_is_copied(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(UserError, match=r"are free; name a folder on another disk, data.cache=DIR"):
        fetch(f"file://{bucket}", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_of_two_copies_into_one_folder_the_second_waits_and_fetches_nothing(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    begun, waiting = threading.Event(), threading.Event()

    def change(path: str, first: int, content: bytes) -> bytes:
        if path.endswith(".bin"):
            begun.set()
            assert waiting.wait(10)
        return content

    broken = Broken(monkeypatch, change)
    first = threading.Thread(target=fetch, args=(f"file://{bucket}", tmp_path / "cache"))
    second = threading.Thread(target=fetch, args=(f"file://{bucket}", tmp_path / "cache"))
    first.start()
    assert begun.wait(10)
    second.start()
    heard = ""
    while "waiting for another process" not in heard:
        heard += capfd.readouterr().err
    waiting.set()
    first.join()
    second.join()
    assert broken.read == sum(shard.bytes for shard in read_manifest(bucket).all_shards)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///no/such", r"file:///no/such/manifest\.json: the store has no such file; name the URL of"),
        ("nowhere://bucket", r"nowhere://bucket: Protocol not known: nowhere; name a store that fsspec knows"),
    ],
)
def test_a_wrong_url_is_one_line(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_manifest(url, str(tmp_path), 10)


def test_a_store_without_its_package_or_rights_is_one_line(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(known_implementations, "zz", {"class": "no_such_package.Files", "err": "Install it"})
    with pytest.raises(UserError, match="Install it: pip install no_such_package"):
        open_manifest("zz://bucket/shards", "cache", 10)

    def refuse(path: str, first: int, content: bytes) -> bytes:
        raise PermissionError("403")

    Broken(monkeypatch, refuse)
    with pytest.raises(UserError, match=r"manifest\.json: the store refuses it \(PermissionError: 403\)"):
        open_manifest(f"file://{bucket}", "cache", 10)


def test_a_manifest_cannot_name_files_outside_of_its_folder(bucket: Path) -> None:
    tree = json.loads((bucket / "manifest.json").read_text())
    tree["tokenizer"]["files"] = ["../tokenizer.model"]
    (bucket / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match="is not the name of a file in this directory"):
        open_manifest(f"file://{bucket}", "cache", 0)


# What users see.


def test_only_data_may_be_in_an_object_store(write_config: WriteConfig, llm_here: Llm, small_shards: Path) -> None:
    for key in ("checkpoint.dir", "data.cache", "train.init_from"):
        code, _, err = llm_here("train", "--config", write_config(), f"{key}=s3://bucket/x")
        assert (code, err.count("\n")) == (1, 1)
        assert f'{key} = "s3://bucket/x": a path of this machine is due' in err
    for verb in (
        ("inspect", "s3://bucket/x"),
        ("prepare_data", "--input", small_shards, "--tok", small_shards, "--out_dir", "s3://bucket/x"),
    ):
        code, _, err = llm_here(*verb)
        assert (code, err.count("\n")) == (1, 1)
        assert "s3://bucket/x: commands read and write files of this machine" in err


def test_a_plan_and_the_doctor_take_the_manifest_from_the_store(
    write_config: WriteConfig, llm_here: Llm, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    broken = Broken(monkeypatch, lambda path, first, content: content)
    config = write_config(data__path=f"file://{bucket}")
    code, out, err = llm_here("plan", "--config", config)
    assert code == 0, err
    assert "if the text is English from the web" in out
    assert broken.read == 0
    (finding,) = check_data(f"file://{bucket}")[1]
    assert (finding.level, "are copied to each node" in finding.text) == ("fine", True)
    assert data_hash(f"file://{bucket}") == read_manifest(bucket).dataset_hash
    (finding,) = check_data(f"file://{bucket}/no")[1]
    assert finding.level == "wrong"
    data = find_data(load_config(config).data)
    assert data is not None
    assert data.sources[0].dataset_hash == read_manifest(bucket).dataset_hash


def test_a_run_from_a_store_is_the_run_from_a_folder(
    write_config: WriteConfig, llm_here: Llm, bucket: Path, small_shards: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    url = f"file://{bucket}"
    sources = [{"path": str(small_shards), "weight": 1.0}, {"path": url, "weight": 1.0}]
    config = write_config(data__path=None, data__sources=sources, train__total_tokens=2_048)
    code, _, err = llm_here("train", "--config", config)
    assert code == 0, err
    assert "copying file://" in err
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert set(lines[-1]["val_loss_by_source"]) == {str(small_shards), url}
    assert [path.parent.name for path in Path("data/cache").glob("*/manifest.json")] == [
        f"shards-{read_manifest(bucket).dataset_hash[:12]}"
    ]


@pytest.mark.slow
def test_two_ranks_of_a_node_copy_once_and_train_as_from_a_folder(
    serve: Any, bucket: Path, tmp_path: Path, no_pauses: None
) -> None:
    server = serve(faults=("drop", "truncate"), chance=0.1)
    configs = []
    for path in ("s3://bucket/shards", bucket):
        tree = small_config(path, tmp_path / f"run{len(configs)}")  # type: ignore[arg-type]
        tree["data"] |= {"cache": str(tmp_path / "cache")}
        configs.append(tmp_path / f"config{len(configs)}.json")
        configs[-1].write_text(json.dumps(tree))
    for config in configs:
        deepspeed_module(2, "llm", "train", "--config", config)
    assert read_losses(tmp_path / "run0") == read_losses(tmp_path / "run1")
    hashes = {json.loads((tmp_path / f"run{i}/latest/state.json").read_text())["data"]["dataset_hash"] for i in (0, 1)}
    assert len(hashes) == 1
    # What was cut off was sent, too.
    size = sum(shard.bytes for shard in read_manifest(bucket).all_shards)
    assert size <= server.sent() < 2 * size
    run_llm("train", "--config", configs[0], f"checkpoint.dir={tmp_path / 'again'}")
    assert server.sent() < 2 * size


@pytest.mark.slow
def test_the_ranks_end_with_one_line_if_the_copy_fails(bucket: Path, tmp_path: Path) -> None:
    (bucket / "train-00001.bin").unlink()
    config = tmp_path / "config.json"
    tree = small_config(tmp_path, tmp_path / "run")
    tree["data"] = {"path": f"file://{bucket}", "cache": str(tmp_path / "cache")}
    config.write_text(json.dumps(tree))
    command = ["-m", "llm", "train", "--config", str(config)]
    ranks = start_two([sys.executable, *command], stderr=subprocess.PIPE, text=True)
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    lines = [line for text in errors for line in text.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert "train-00001.bin: the store has no such file" in lines[0]
