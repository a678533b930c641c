"""Kills commands at random: python kills.py CONFIG FOLDER KILLS SEED kills training runs, python kills.py verbs FOLDER
KILLS SEED the other commands that write (see `kill_verbs`), python kills.py processes CONFIG FOLDER KILLS SEED training
runs on several processes (see `kill_processes`).

Each run is a fork of this process, which has imported all there is to import, so that little time passes outside of
training. Half are killed after a random time, half as they are about to make their n-th change to the run's folder:
that is inside a save, mostly. Runs are started again until they are complete, and begun anew until there were KILLS.
FOLDER/whole is the run that was never killed; FOLDER/0, FOLDER/1, ... the others; FOLDER/kills.json what was done.
"""

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # as pytest does for tests

from running import numbers_of

import llm.tools.average
import llm.tools.export
import llm.tools.import_model
import llm.training.saving
import llm.training.train  # noqa: F401 (forks begin with it)
from llm import cli
from llm.training import engine

CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "shutil.copyfile", "shutil.copymode", "open")


def changes(run: Path, kill_at: int | None) -> list[int]:
    """Counts this process's changes to a run's folder in the list that it returns; kills it at one of them."""
    count = [0]

    def hook(event: str, arguments: tuple) -> None:
        if event not in CHANGES or not any(str(argument).startswith(str(run)) for argument in arguments):
            return
        if event == "open" and "w" not in str(arguments[1]):
            return
        count[0] += 1
        if count[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def train(config: str, run: Path, *, kill_at: int | None = None, kill_after: float | None = None) -> tuple[int, float]:
    status, seconds, count = fork(["train", "--config", config, f"checkpoint.dir={run}"], run, kill_at, kill_after)
    if count is not None:
        (run / "changes").write_text(str(count))
    return status, seconds


def fork(
    command: list[str], folder: Path, kill_at: int | None, kill_after: float | None
) -> tuple[int, float, int | None]:
    """Runs a command in a fork; returns its status as os.waitpid gives it, how long it took, and how many changes it
    made to the folder; None: it was killed.
    """
    began = time.monotonic()
    counts, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = changes(folder, kill_at)
        code = cli.main(command)
        os.write(writer, str(count[0]).encode())
        os._exit(code)
    os.close(writer)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    count = os.read(counts, 100)
    os.close(counts)
    return status, time.monotonic() - began, int(count) if count else None


def contents(folder: Path) -> dict[str, bytes]:
    """Returns {path: contents} of the files in a folder, as if every folder had the same path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes().replace(bytes(folder), b"FOLDER") for path in files}


def kill_verbs(folder: Path, kills: int, seed: int) -> list[dict]:
    """Kills train_tokenizer, prepare_data, export, import and average KILLS times in all, in turn.

    FOLDER has text.jsonl, tok.model, a run and an export. After each kill a result is complete, equal to one that was
    never killed, or absent; and the same command again makes an equal one, or refuses a complete one.
    """
    inputs = {name: str(folder / name) for name in ("text.jsonl", "tok.model", "run", "export")}
    commands: dict[str, list[str]] = {
        "train_tokenizer": ["--input", inputs["text.jsonl"], "--vocab_size", "400", "--model_prefix", "{}/out"],
        "prepare_data": [
            *("--input", inputs["text.jsonl"], "--tok", inputs["tok.model"], "--seq_len", "64", "--workers", "1"),
            *("--shard_tokens", "5000", "--val_fraction", "0.1", "--out_dir", "{}/out"),
        ],
        "export": ["--ckpt", inputs["run"], "--max_file_bytes", "20000", "--out_dir", "{}/out"],
        "import": ["--from", inputs["export"], "--out_dir", "{}/out"],
        "average": [inputs["run"], "--out_dir", "{}/out"],
    }
    # Without it a result is not complete.
    last = {"train_tokenizer": "out.model", "prepare_data": "out/manifest.json", "export": "out/config.json"}
    last |= dict.fromkeys(("import", "average"), "out/state.json")
    whole, limits = {}, {}
    for verb, arguments in commands.items():
        place = folder / f"whole-{verb}"
        place.mkdir()
        status, seconds, total = fork([verb, *(a.format(place) for a in arguments)], place, None, None)
        assert status == 0, verb
        whole[verb], limits[verb] = contents(place), (seconds, total)
    chance = random.Random(seed)
    done: list[dict] = []
    for number in range(kills):
        verb = list(commands)[number % len(commands)]
        place = folder / f"killed-{number}"
        place.mkdir()
        if number % 3 == 0:  # an empty folder that exists stays, as a mount point
            (place / "out").mkdir()
        command = [verb, *(a.format(place) for a in commands[verb])]
        tries = 0
        while True:
            seconds, total = limits[verb]
            assert total is not None
            by_time = chance.random() < 0.5
            when = (None, chance.uniform(0, seconds)) if by_time else (chance.randrange(1, total + 1), None)
            status, _, _ = fork(command, place, *when)
            complete = (place / last[verb]).exists()
            if complete:  # nothing that is there differs; what a kill has left otherwise is hidden
                found = {name: data for name, data in contents(place).items() if not is_hidden(name)}
                assert found == whole[verb], (verb, when, sorted(found))
            done.append({"verb": verb, "killed": os.WIFSIGNALED(status), "complete": complete})
            tries += 1
            if tries == 3 or complete or not os.WIFSIGNALED(status):
                break
        status, _, _ = fork(command, place, None, None)
        refused = os.waitstatus_to_exitcode(status) == 1 and verb in ("export", "import", "average")
        assert status == 0 or (refused and complete), (verb, when, status)
        found = {name: data for name, data in contents(place).items() if not is_hidden(name)}
        assert found == whole[verb], (verb, when, sorted(found))
    return done


def kill_processes(config: str, folder: Path, kills: int, seed: int) -> list[dict]:
    """Kills runs of 1, 2 and 4 processes at random moments, and starts them again on others, at another ZeRO stage.

    Every run has the checkpoints of a run of one process that was never killed, byte for byte, and its metrics.
    """
    chance = random.Random(seed)
    status, seconds = train(config, folder / "whole")
    assert status == 0
    done: list[dict] = []
    run = 0
    while len(done) < kills:
        processes, stage = chance.choice([1, 2, 4]), chance.choice([0, 1])
        when = chance.uniform(0.2, 1.0) * seconds * processes**0.5
        if start(config, folder / str(run), processes, stage, when):
            compare(folder / "whole", folder / str(run))
            run += 1
        else:
            done.append({"run": run, "processes": processes, "stage": stage, "after": when})
    assert start(config, folder / str(run), 2, 1, None)
    compare(folder / "whole", folder / str(run))
    return done


def start(config: str, run: Path, processes: int, stage: int, kill_after: float | None) -> bool:
    """Runs a training run on so many forks; returns whether it came to its end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    forks = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            if processes > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os._exit(cli.main(["train", "--config", config, f"checkpoint.dir={run}", f"deepspeed.zero_stage={stage}"]))
        forks.append(child)
    if kill_after is not None:
        time.sleep(kill_after)
        for child in random.Random(kill_after).sample(forks, len(forks)):
            os.kill(child, signal.SIGKILL)
    codes = [os.waitpid(child, 0)[1] for child in forks]
    assert all(code == 0 or os.WIFSIGNALED(code) for code in codes), codes
    return not any(codes)


def compare(whole: Path, run: Path) -> None:
    files = sorted(path.relative_to(whole) for path in whole.glob("step-*/*.safetensors"))
    assert files
    assert files == sorted(path.relative_to(run) for path in run.glob("step-*/*.safetensors"))
    for file in files:
        assert (whole / file).read_bytes() == (run / file).read_bytes(), file
    assert numbers_of(run) == numbers_of(whole)


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def main() -> None:
    *what, config, folder, kills, seed = sys.argv[1:]
    folder, kills, seed = Path(folder), int(kills), int(seed)
    if what == ["processes"]:
        engine.import_deepspeed(torch.device("cpu"))
        (folder / "kills.json").write_text(json.dumps(kill_processes(config, folder, kills, seed)))
        return
    if config == "verbs":
        (folder / "kills.json").write_text(json.dumps(kill_verbs(folder, kills, seed)))
        return
    engine.import_deepspeed(torch.device("cpu"))
    status, seconds = train(config, folder / "whole")
    assert status == 0
    total = int((folder / "whole/changes").read_text())
    chance = random.Random(seed)
    done: list[dict] = []
    run = 0
    while len(done) < kills:
        by_time = len(done) % 2 == 1
        when = {"kill_after": chance.uniform(0, seconds)} if by_time else {"kill_at": chance.randrange(1, total)}
        status, _ = train(config, folder / str(run), **when)
        if os.WIFSIGNALED(status):
            saves = sorted(path.name for path in (folder / str(run)).glob("*step-*"))
            done.append({"run": run, **when, "left": saves})
        else:  # complete before it could be killed
            assert status == 0
            run += 1
    assert train(config, folder / str(run))[0] == 0
    (folder / "kills.json").write_text(json.dumps(done))


if __name__ == "__main__":
    main()
