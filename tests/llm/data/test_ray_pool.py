"""Shards that a Ray cluster made are those of one process, whatever dies on the way; nothing of Ray is left behind."""

import contextlib
import csv
import gzip
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import REPOSITORY, environment

from benchmarks.bench_ray import local_cluster
from llm.data import blocks, packing, ray_pool
from llm.data.blocks import Block, Place
from llm.data.packing import WorkerFailed, in_order
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


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# The order of results and the number of groups under way, without Ray.


@given(st.integers(0, 40), st.lists(st.integers(1, 9), min_size=1, max_size=40))
def test_results_come_in_order_and_never_more_groups_are_under_way_than_the_limit_of_the_moment(
    count: int, limits: list[int]
) -> None:
    taken, sent, received, limit = 0, 0, 0, limits[0]

    def groups() -> Iterator[list[Block]]:
        nonlocal taken, limit
        for number in range(count):
            taken, limit = taken + 1, limits[number % len(limits)]
            yield [Block(Path("a"), "chunk", Place(number))]

    def send(group: list[Block]) -> int:
        nonlocal sent
        sent += 1
        assert sent - received <= limit
        return group[0].place.file

    def receive(number: int) -> Any:
        nonlocal received
        received += 1
        return number

    done = []
    for group, result in in_order(groups(), send, receive, lambda: limit):
        assert group[0].place.file == result
        assert taken <= received + max(limits)  # no more of the input is read than can be sent
        done.append(result)
    assert done == list(range(count))


def test_of_what_ray_prints_the_first_sentence_is_passed_on() -> None:
    told: list[str] = []
    notices = ray_pool._Notices(told.append)
    print("\x1b[33m(raylet)\x1b[0m A worker died. Lease ID: bf00 [repeated 7x across cluster]\x1b[0m", file=notices)
    print("(raylet) Raylet 1.2 ended\n    [state-dump] a. b.", file=notices)
    assert told == ["Ray: (raylet) A worker died. [repeated 7x across cluster]", "Ray: (raylet) Raylet 1.2 ended"]


# What is found before anything starts.


@pytest.mark.parametrize("address", ["local", "ray://head:10001", "head", ":6379", "head:port", "", "head:6379/x"])
def test_what_is_no_address_is_an_error_with_the_way_out(tok: Tokenizer, address: str) -> None:
    with (
        pytest.raises(UserError, match=rf"^--ray {address}: is auto or HOST:PORT .*; `ray start --head`"),
        ray_pool.cluster(address, tok, print),
    ):
        pass


def test_an_address_where_nothing_listens_is_an_error_at_once(
    llm_here: Callable[..., tuple[int, str, str]], tok: Tokenizer, tmp_path: Path
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        (tmp_path / "a.txt").write_text(words(1, 500))
        options = ["--input", tmp_path / "a.txt", "--tok", tok.path, "--out_dir", tmp_path / "out"]
        code, out, err = llm_here("prepare_data", *options, "--ray", address)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith(f"error: --ray {address}: no cluster answers there")
    assert not (tmp_path / "out").exists()


def test_auto_means_the_address_in_the_environment(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(UserError, match="--ray ray://head:10001: is auto or"), ray_pool.cluster("auto", tok, print):
        pass


def test_without_the_package_the_error_names_the_command(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with (
        pytest.raises(UserError, match=r"needs the package ray .*: pip install 'llm-from-scratch\[cluster\]'$"),
        ray_pool.cluster("auto", tok, print),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "said"), [({"workers": 2}, "--workers is for"), ({"vocab_size": 300, "tok": None}, "--ray needs --tok")]
)
def test_flags_that_a_cluster_has_no_use_for_are_errors(
    tok: Tokenizer, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    (tmp_path / "a.txt").write_text("the cat")
    arguments: dict[str, Any] = {"tok": tok.path, "out_dir": tmp_path / "out", "seq_len": 16, "shard_tokens": 100}
    with pytest.raises(UserError, match=said):
        prepare_data([tmp_path / "a.txt"], ray="auto", **arguments | options)


# A cluster. One serves all tests.


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            patch.setenv(name, "")  # to be put back at the end
        folder = tmp_path_factory.mktemp("ray")
        with local_cluster(folder, 4, PYTHONPATH=str(REPOSITORY)) as (address, process):
            yield address, process
            left = psutil.Process(process.pid).children(recursive=True)
    _, alive = psutil.wait_procs(left, timeout=30)
    assert not alive
    assert list(folder.iterdir())  # Ray's files were here


@pytest.fixture
def address(head: tuple[str, subprocess.Popen[str]]) -> str:
    return head[0]


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks: many more groups than are under way at once."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 9000)
    monkeypatch.setattr(packing, "GROUP_BYTES", 9000)


def busy_workers(node: subprocess.Popen[str] | psutil.Popen) -> list[psutil.Process]:
    """The processes of a node that run a task of ours."""
    found = []
    for process in psutil.Process(node.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[:1] == ["ray::_pack"]:
                found.append(process)
    return found


def write_inputs(folder: Path, kind: str) -> tuple[list[Path], dict[str, Any]]:
    """Text of one kind, with equal documents and, but for the tables, some that are longer than a block or a chunk."""
    folder.mkdir()
    texts = [words(seed % 300, 5 + 400 * (seed % 97 == 0) + seed % 40) for seed in range(600)]
    long = [words(1000, 120_000), words(1001, 2000)]
    if kind == "running text":
        (folder / "a.txt").write_text("\n\n" + words(1, 25_000))
        return [folder / "a.txt"], {}
    if kind == "lines":
        lines = [text.replace("\n", " ").encode() for text in [*texts, *long, *long, "caf"]]
        (folder / "a.txt").write_bytes(b"\n".join([*lines[:300], b"\xff", *lines[300:]]))
        return [folder / "a.txt"], {"documents": "line", "dedup": "exact"}
    if kind == "paragraphs":
        (folder / "a.txt.gz").write_bytes(gzip.compress("\n\n".join(texts).encode()))
        (folder / "b.txt").write_bytes(b"\xff\n\nfine\n\n" + words(2, 3000).replace("\n", "").encode())
        return [folder / "a.txt.gz", folder / "b.txt"], {"documents": "paragraph"}
    if kind == "tables":
        pq.write_table(pa.table({"text": [*texts[:200], None, *long]}), folder / "a.parquet", row_group_size=50)
        with open(folder / "b.csv", "w", newline="") as file:
            csv.writer(file).writerows([["text"], *([text] for text in texts[200:400])])
        (folder / "c.json").write_text(json.dumps([{"text": text} for text in texts[400:]], indent=1))
        return [folder], {"dedup": "exact"}
    records = [json.dumps({"text": text}) + "\n" for text in [*texts[:300], *long, *texts[300:], "{"]]
    (folder / "a.jsonl").write_text("".join(records))
    if kind == "archive":
        with tarfile.open(folder / "a.tar", "w") as archive:
            archive.add(folder / "a.jsonl", "one/a.jsonl")
            archive.add(folder / "a.jsonl", "two/b.jsonl")
        (folder / "a.jsonl").unlink()
    return [folder], {"dedup": "exact", "val_fraction": 0.1}


@pytest.mark.slow
class TestCluster:
    @pytest.mark.parametrize("kind", ["running text", "lines", "paragraphs", "tables", "records", "archive"])
    def test_the_bytes_are_those_of_one_process(
        self,
        tok: Tokenizer,
        tmp_path: Path,
        often: None,
        address: str,
        kind: str,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)  # the workers have another current folder
        path = os.path.relpath(tok.path)
        inputs, options = write_inputs(tmp_path / "in", kind)
        options = {"seq_len": 16, "shard_tokens": 5000, "val_fraction": 0.05} | options
        expected = prepare_data(inputs, tok.path, tmp_path / "whole", workers=1, **options)
        result = prepare_data(inputs, path, tmp_path / "out", ray=address, **options)
        assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
        assert result == expected | {"out_dir": str(tmp_path / "out")}
        shown = capfd.readouterr()
        assert shown.out == ""
        assert f"--ray {address}: 1 node, 4 CPUs" in shown.err

    def test_workers_that_are_killed_at_random_change_nothing(
        self, tok: Tokenizer, tmp_path: Path, head: tuple[str, subprocess.Popen[str]], capfd: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "a.jsonl").write_text(
            "".join(json.dumps({"text": words(seed % 300, 3000)}) + "\n" for seed in range(600))
        )
        options: dict[str, Any] = {"seq_len": 16, "shard_tokens": 10**6, "dedup": "exact"}
        expected = prepare_data([tmp_path / "a.jsonl"], tok.path, tmp_path / "whole", workers=1, **options)
        chance, ended, kills = random.Random(0), threading.Event(), 0

        def kill() -> None:
            nonlocal kills
            while not ended.wait(chance.uniform(0.05, 0.3)):
                busy = busy_workers(head[1])
                if busy and kills < 8:
                    chance.choice(busy).kill()
                    kills += 1

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            result = prepare_data([tmp_path / "a.jsonl"], tok.path, tmp_path / "out", ray=head[0], **options)
        finally:
            ended.set()
            killer.join()
        assert kills >= 2
        assert result["dataset_hash"] == expected["dataset_hash"]
        assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
        shown = capfd.readouterr()
        assert shown.out == ""
        assert (
            "Ray: (raylet) A worker died or was killed while executing a task by an unexpected system error."
            in shown.err
        )

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
    def test_the_same_command_goes_on_after_its_end(
        self,
        tok: Tokenizer,
        tmp_path: Path,
        head: tuple[str, subprocess.Popen[str]],
        number: signal.Signals,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        (tmp_path / "a.jsonl").write_text(
            "".join(json.dumps({"text": words(seed % 300, 3000)}) + "\n" for seed in range(600))
        )
        options: dict[str, Any] = {"seq_len": 16, "shard_tokens": 100_000}
        command = [sys.executable, "-m", "llm", "prepare_data", "--input", tmp_path / "a.jsonl", "--tok", tok.path]
        command += ["--out_dir", tmp_path / "out", "--ray", "auto", "--seq_len", "16", "--shard_tokens", "100_000"]
        driver = subprocess.Popen(
            list(map(str, command)),
            env=environment() | {"RAY_ADDRESS": head[0], "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        journal = tmp_path / "out" / ".incomplete" / "journal.json"
        deadline = time.monotonic() + 120
        while not journal.exists():
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        driver.send_signal(number)
        out, err = driver.communicate(timeout=60)
        assert out == ""
        if number == signal.SIGINT:
            assert driver.returncode == 130
            assert err.splitlines()[-1].startswith("interrupted: it ends; the same command goes on")
            assert "Traceback" not in err
        while busy_workers(head[1]):  # its tasks end too
            assert time.monotonic() < deadline
            time.sleep(0.1)
        prepare_data([tmp_path / "a.jsonl"], tok.path, tmp_path / "out", ray=head[0], **options)
        assert "goes on with the interrupted run" in capfd.readouterr().err
        prepare_data([tmp_path / "a.jsonl"], tok.path, tmp_path / "whole", workers=1, **options)
        assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")

    def test_a_fault_of_the_input_is_the_same_error(self, tok: Tokenizer, tmp_path: Path, address: str) -> None:
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": words(seed, 9)}) + "\n" for seed in range(300)))
        (tmp_path / "a.jsonl").open("a").write("{")
        options: dict[str, Any] = {"seq_len": 16, "shard_tokens": 500, "strict": True}
        with pytest.raises(UserError, match=r"a\.jsonl:301: not JSON"):
            prepare_data([tmp_path / "a.jsonl"], tok.path, tmp_path / "out", ray=address, **options)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("how", "said"),
        [
            ("goes", r"spm\.model: no such tokenizer.*; name a file that all nodes have"),
            ("is another", r"spm\.model: is another tokenizer there; name a file that all nodes have"),
            ("other sources", r"has llm .* in .*, not 9\.9 \(else\); install the same one on all nodes"),
        ],
    )
    def test_a_node_that_cannot_do_the_work_is_named_before_the_first_task(
        self, tok: Tokenizer, tmp_path: Path, address: str, how: str, said: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "spm.model").write_bytes(tok.path.read_bytes())
        here = load_tokenizer(tmp_path / "spm.model")
        (tmp_path / "spm.model").unlink()
        if how == "is another":
            (tmp_path / "a.txt").write_text(words(0, 5000))
            train_tokenizer([tmp_path / "a.txt"], tmp_path / "spm", 280)
        if how == "other sources":
            here = tok
            monkeypatch.setattr(ray_pool, "_sources", lambda: "9.9 (else)")
        with pytest.raises(UserError, match=rf"^--ray .*: node \S+: .*{said}"), ray_pool.cluster(address, here, str):
            pass

    def test_another_machine_without_the_project_is_named_and_one_that_dies_is_made_up_for(
        self,
        tok: Tokenizer,
        tmp_path: Path,
        address: str,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)  # Ray's workers also import from the folder in which the command runs
        (tmp_path / "stub" / "llm").mkdir(parents=True)
        (tmp_path / "stub" / "llm" / "__init__.py").touch()
        node = start_node(address, PYTHONPATH=str(tmp_path / "stub"))
        try:
            with (
                pytest.raises(UserError, match=r"node \S+: has no llm of this version \(.*\); install the same one"),
                ray_pool.cluster(address, tok, str),
            ):
                pass
        finally:
            end(node)
        (tmp_path / "a.jsonl").write_text(
            "".join(json.dumps({"text": words(seed % 300, 3000)}) + "\n" for seed in range(600))
        )
        options: dict[str, Any] = {"seq_len": 16, "shard_tokens": 10**6}
        prepare_data([tmp_path / "a.jsonl"], tok.path, tmp_path / "whole", workers=1, **options)
        node = start_node(address, PYTHONPATH=str(REPOSITORY))
        capfd.readouterr()  # with what Ray printed while the nodes were awaited
        killer = threading.Thread(target=end_when_busy, args=[node])
        killer.start()
        try:
            prepare_data([tmp_path / "a.jsonl"], tok.path, tmp_path / "out", ray=address, **options)
        finally:
            end(node)
            killer.join()
        assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")
        shown = capfd.readouterr()
        assert shown.out == ""
        assert "2 nodes, 6 CPUs" in shown.err

    @pytest.mark.parametrize(
        ("how", "said"), [("it ends the worker", "WorkerCrashedError: .*"), ("it fails", "ImportError: no llm")]
    )
    def test_a_task_that_cannot_be_done_is_given_up_with_one_line(
        self, tok: Tokenizer, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, said: str
    ) -> None:
        def fatal(*arguments: Any) -> Any:
            if how == "it fails":
                raise ImportError("no llm\nand more")
            os._exit(1)

        monkeypatch.setattr(ray_pool, "RETRIES", 1)
        monkeypatch.setattr(ray_pool, "_pack", fatal)
        block = Block(tmp_path, "line", Place(), b"the cat\n")
        with (
            ray_pool.cluster(address, tok, str) as pack_all,
            pytest.raises(WorkerFailed, match=rf"^Ray could not finish a task \({said}\); the same command goes on"),
        ):
            list(pack_all([[block]], packing.Settings(tok.path)))


def start_node(address: str, **variables: str) -> psutil.Popen:
    """Starts another node of the cluster on this machine; returns when it has joined."""
    wait_for_nodes(address, 1)  # Ray notices after seconds that one has died
    command = [Path(sys.executable).parent / "ray", "start", "--block", "--address", address, "--num-cpus", "2"]
    options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    node = psutil.Popen(
        [*map(str, command), "--object-store-memory", "200000000"],
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"} | variables,
        **options,
    )
    try:
        wait_for_nodes(address, 2)
    except BaseException:
        end(node)
        raise
    return node


def wait_for_nodes(address: str, number: int) -> None:
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    try:
        deadline = time.monotonic() + 120
        while sum(node["Alive"] for node in ray.nodes()) != number:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        ray.shutdown()


def end_when_busy(node: psutil.Popen) -> None:
    while node.is_running() and not busy_workers(node):
        time.sleep(0.05)
    time.sleep(0.3)
    end(node)


def end(node: psutil.Popen) -> None:
    """Kills a node at once, with all its processes."""
    if not node.is_running():
        return
    everything = [*node.children(recursive=True), node]
    for process in everything:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(everything, timeout=30)
