"""Kills training runs at random: python kills.py CONFIG FOLDER KILLS SEED.

Each run is a fork of this process, which has imported all there is to import, so that little time passes outside of
training. Half are killed after a random time, half as they are about to make their n-th change to the run's folder:
that is inside a save, mostly. Runs are started again until they are complete, and begun anew until there were KILLS.
FOLDER/whole is the run that was never killed; FOLDER/0, FOLDER/1, ... the others; FOLDER/kills.json what was done.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

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
    """Runs it in a fork; returns its status as os.waitpid gives it, and how long it took."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        count = changes(run, kill_at)
        code = cli.main(["train", "--config", config, f"checkpoint.dir={run}"])
        (run / "changes").write_text(str(count[0]))
        os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return status, time.monotonic() - began


def main() -> None:
    config, folder, kills, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
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
