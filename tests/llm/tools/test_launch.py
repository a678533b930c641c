"""`llm launch`: the files are what their programs read, and every one of them starts, stops and goes on with a run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import REPOSITORY, environment, read_losses, run_llm

from llm.config_file import load_config
from llm.tools.launch import write_launch

WriteConfig = Callable[..., Path]
Llm = Callable[..., tuple[int, str, str]]
KINDS = ("slurm", "hosts", "k8s", "skypilot")


@pytest.fixture
def write(write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes the launch of a small run; returns its folder. The plan, which takes seconds, is a constant."""
    monkeypatch.chdir(REPOSITORY)
    plan = {"tokens_per_second": 1e5, "hours": 2.0, "memory_bytes": 1e9}
    monkeypatch.setattr("llm.tools.launch.forecast", lambda *_, **__: plan)

    def launch(kind: str, changes: dict[str, Any] | None = None, overrides: Sequence[str] = (), **flags: Any) -> Path:
        folder = tmp_path / kind
        config = write_config(**(changes or {}))
        flags["out_dir"] = str(folder)
        result = write_launch(kind, str(config), overrides, say=lambda line: None, **flags)
        assert sorted(result["files"]) == sorted(str(path) for path in folder.iterdir())
        return folder

    return launch


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_travels_with_its_overrides_and_nothing_that_follows(write: Any, kind: str, tmp_path: Path) -> None:
    folder = write(kind, overrides=("train.seed=7", "optimizer.lr=null"))
    stated = json.loads((folder / "config.json").read_text())
    assert stated["train"]["seed"] == 7
    assert "warmup_steps" not in stated["schedule"]
    assert load_config(folder / "config.json") == load_config(
        tmp_path / "config.json", ["train.seed=7", "optimizer.lr=null"]
    )


def test_scripts_pass_shellcheck(write: Any) -> None:
    scripts = [write("slurm") / "train.sbatch", write("hosts") / "train.sh"]
    for script in scripts:
        assert os.access(script, os.X_OK)
        subprocess.run(["bash", "-n", script], check=True)
        # SC1091: the environment's script is not there to follow.
        subprocess.run([Path(sys.executable).parent / "shellcheck", "-e", "SC1091", script], check=True)


def test_a_name_with_a_blank_and_a_quote_stays_one_word(write: Any, tmp_path: Path) -> None:
    folder = write("slurm", {"checkpoint__dir": str(tmp_path / "a run's folder")})
    program = 'cd() { :; }; srun() { printf "%s\\n" "$@"; exit; }; source "$1"'
    done = subprocess.run(
        ["bash", "-c", program, "-", folder / "train.sbatch"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1] == f"checkpoint.dir={tmp_path / chr(97)} run's folder"


def test_the_job_asks_for_what_was_said_and_for_its_signal(write: Any) -> None:
    text = (write("slurm", nodes=3, gpus=4, max_hours=1.5) / "train.sbatch").read_text()
    asked = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines() if "#SBATCH --" in line
    )
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("3", "4", "4")
    assert (asked["time"], asked["signal"]) == ("01:30:00", "TERM@300")
    assert "requeue" in asked


def test_hosts_are_named_or_to_be_replaced(write: Any) -> None:
    folder = write("hosts", nodes=2, gpus=4, hosts=["alpha"])
    assert (folder / "hostfile").read_text() == "alpha slots=4\nnode1 slots=4\n"
    assert (write("hosts", hosts=["a", "b", "c"]) / "hostfile").read_text().count("slots=8") == 3


def test_the_manifest_is_a_pytorchjob_whose_config_is_the_runs(write: Any) -> None:
    folder = write("k8s", nodes=3, gpus=4, image="registry/llm:1")
    config_map, job = yaml.safe_load_all((folder / "train.yaml").read_text())
    assert json.loads(config_map["data"]["config.json"]) == json.loads((folder / "config.json").read_text())
    assert (job["kind"], job["spec"]["nprocPerNode"]) == ("PyTorchJob", "4")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {name: replica["replicas"] for name, replica in replicas.items()} == {"Master": 1, "Worker": 2}
    for replica in replicas.values():
        assert replica["restartPolicy"] == "OnFailure"  # a stopped run ends with 75
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == "registry/llm:1"
        assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    _, alone = yaml.safe_load_all((write("k8s") / "train.yaml").read_text())
    assert set(alone["spec"]["pytorchReplicaSpecs"]) == {"Master"}


def test_the_task_of_skypilot_takes_spot_machines_and_a_bucket(write: Any) -> None:
    task = yaml.safe_load((write("skypilot", nodes=2, device_name="H200") / "train.sky.yaml").read_text())
    assert (task["num_nodes"], task["resources"]) == (2, {"accelerators": "H200:8", "use_spot": True})
    assert task["file_mounts"]["~/work"]["mode"] == "MOUNT"


def test_the_verb_says_what_it_planned_wrote_and_how_to_start(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path
) -> None:
    flags = ("--config", write_config(), "--out_dir", tmp_path / "out")
    code, out, err = llm_here("launch", "slurm", *flags, "train.total_tokenz=1")
    assert (code, out) == (1, "")
    assert "total_tokens" in err
    assert not (tmp_path / "out").exists()
    code, out, _ = llm_here("launch", "slurm", *flags, "--nodes", 2)
    assert code == 0
    assert "on 16 H100" in out
    assert f"to start    sbatch {tmp_path}/out/train.sbatch" in out


# What the written files start: each run once, on this machine, with the programs of a cluster replaced.

LONG = {"train__total_tokens": 60 * 512, "checkpoint__every_steps": 1000}


def losses(run: Path) -> list[float]:
    status = json.loads((run / "status.json").read_text())
    assert status["status"] == "complete", status
    return read_losses(run)


@pytest.fixture
def unbroken(write_config: WriteConfig, tmp_path: Path) -> list[float]:
    """The losses of the same run in one process and without a stop."""
    config = write_config(**LONG)
    run_llm("train", "--config", config, f"checkpoint.dir={tmp_path / 'unbroken'}")
    return losses(tmp_path / "unbroken")


SBATCH = """#!/bin/bash
# One job after another, as long as scontrol puts it into the queue again.
export SLURM_JOB_ID=7 SLURM_JOB_NODELIST=localhost
while rm -f "$QUEUE/again"; bash "$1"; code=$?; [ -f "$QUEUE/again" ]; do echo job >> "$QUEUE/requeued"; done
exit $code
"""
SRUN = """#!/bin/bash
# Two tasks on this machine. The first two jobs get their signal after some steps, as before the end of their time.
shift
pids=()
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=localhost SLURM_STEP_ID=0 "$@" &
  pids+=($!)
done
if [ "$(wc -l < "$QUEUE/requeued")" -lt 2 ]; then
  seen=$(wc -l < "$RUN/metrics.jsonl" 2> /dev/null || echo 0)
  until [ "$(wc -l < "$RUN/metrics.jsonl" 2> /dev/null || echo 0)" -gt $((seen + 8)) ]; do
    kill -0 "${pids[@]}" || exit 1
    sleep 0.05
  done
  kill -TERM "${pids[@]}"
fi
code=0
for pid in "${pids[@]}"; do wait "$pid"; last=$?; [ $last -le $code ] || code=$last; done
exit $code
"""


@pytest.mark.slow
def test_a_job_that_is_stopped_twice_ends_with_the_losses_of_an_unbroken_run(
    write: Any, unbroken: list[float], tmp_path: Path
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", '#!/bin/sh\ntouch "$QUEUE/again"\n')):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "requeued").touch()
    folder, run = write("slurm", LONG), tmp_path / "run"
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = environment() | {"PATH": path, "QUEUE": str(tmp_path), "RUN": str(run), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["sbatch", folder / "train.sbatch"], env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "requeued").read_text() == "job\njob\n"
    assert done.stdout.count("into the queue again") == 2
    assert losses(run) == pytest.approx(unbroken, rel=1e-4)


def test_a_person_who_asks_to_stop_is_not_queued_again(write: Any, tmp_path: Path) -> None:
    folder, run = write("slurm"), tmp_path / "run"
    run.mkdir()
    program = 'cd() { :; }; srun() { return 75; }; scontrol() { echo queued; }; source "$1"'

    def end(reason: str | None, status: str = "stopped") -> tuple[int, bool]:
        (run / "status.json").write_text(json.dumps({"status": status, "result": {"stopped": reason}, "message": ""}))
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", program, "-", folder / "train.sbatch"],
            capture_output=True,
            text=True,
            env=environment() | {"PATH": path},
            cwd=tmp_path,
        )
        return done.returncode, "queued" in done.stdout

    assert end("SIGTERM") == (0, True)
    assert end("train.max_minutes is over") == (0, True)
    assert end("the file stop asks for it") == (75, False)
    assert end(None, "failed") == (75, False)


def machines(commands: list[tuple[list[Any], dict[str, str]]], **options: Any) -> list[str]:
    """Runs a command as each machine's, at the same time; returns what they printed."""
    running = [
        subprocess.Popen(
            command,
            env=environment() | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            **options,
        )
        for command, variables in commands
    ]
    try:
        printed = [process.communicate(timeout=900)[0] for process in running]
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    for process, text in zip(running, printed, strict=True):
        assert process.returncode == 0, text
    return printed


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_two_machines_train_together_without_ssh(
    write: Any, unbroken: list[float], tmp_path: Path, launcher: str
) -> None:
    folder = write("hosts", LONG, gpus=1, hosts=["127.0.0.1", "localhost"])
    port = str(20_000 + os.getpid() % 10_000)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    machines(
        [
            ([folder / "train.sh"], {"NODE_RANK": rank, "WITH": launcher, "MASTER_PORT": port, "PATH": path})
            for rank in ("0", "1")
        ]
    )
    assert losses(tmp_path / "run") == pytest.approx(unbroken, rel=1e-4)


@pytest.mark.slow
def test_the_pods_of_the_manifest_train_together(write: Any, unbroken: list[float], tmp_path: Path) -> None:
    folder = write("k8s", LONG, nodes=2, gpus=1)
    _, job = yaml.safe_load_all((folder / "train.yaml").read_text())
    command = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["command"]
    command = [part.replace("/config/config.json", str(folder / "config.json")) for part in command]
    port = str(20_000 + os.getpid() % 10_000)
    # What the training operator sets for torchrun.
    variables = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": job["spec"]["nprocPerNode"], "PET_MASTER_ADDR": "127.0.0.1"}
    variables |= {"PET_MASTER_PORT": port, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    machines([(command, variables | {"PET_NODE_RANK": rank}) for rank in ("0", "1")])
    assert losses(tmp_path / "run") == pytest.approx(unbroken, rel=1e-4)


@pytest.mark.slow
def test_the_task_of_skypilot_goes_on_after_a_preemption(write: Any, unbroken: list[float], tmp_path: Path) -> None:
    folder = write("skypilot", {**LONG, "checkpoint__every_steps": 10}, nodes=2, gpus=1)
    task = yaml.safe_load((folder / "train.sky.yaml").read_text())
    home = tmp_path / "home"
    (home / "work").mkdir(parents=True)
    shutil.copy(folder / "config.json", home / "config.json")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def start(port: int) -> list[tuple[list[Any], dict[str, str]]]:
        given = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "1", "SKYPILOT_NODE_IPS": "127.0.0.1\n::1"}
        script = task["run"].replace("--master_port 29400", f"--master_port {port}")
        return [
            (["bash", "-c", script], given | {"SKYPILOT_NODE_RANK": rank, "HOME": str(home), "PATH": path})
            for rank in ("0", "1")
        ]

    # Both machines vanish without a word, after a checkpoint.
    first = [
        subprocess.Popen(
            command, env=environment() | {"OMP_NUM_THREADS": "1"} | variables, cwd=REPOSITORY, start_new_session=True
        )
        for command, variables in start(20_000 + os.getpid() % 5_000)
    ]
    end = time.monotonic() + 600
    run = tmp_path / "run"
    while time.monotonic() < end and not list(run.glob("step-*")):
        time.sleep(0.05)
    for process in first:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert json.loads((run / "status.json").read_text())["status"] == "running"
    machines(start(25_000 + os.getpid() % 5_000), cwd=REPOSITORY)
    assert losses(run) == pytest.approx(unbroken, rel=1e-4)
