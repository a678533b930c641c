"""`llm launch`: writes the files that start a training on a cluster, from its config and plan. It submits nothing.

Each kind of cluster gets one file that can be read and changed. They all start the same `llm train`, which finds its
ranks from any launcher (llm/launchers.py), saves when it gets a signal, and goes on where it stopped:

slurm      an sbatch script that asks for a signal before its time is over, and puts itself into the queue again
hosts      DeepSpeed's hostfile and a script that starts by it, over ssh or without; and torchrun's line for each node
k8s        a PyTorchJob of Kubeflow's training operator
skypilot   a task of SkyPilot on spot machines, whose folders are in a bucket

The config travels as a copy in --out_dir, with the overrides in it, so a later change of the original changes no run.
"""

import json
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm.atomic import atomic_text
from llm.config_file import load_config
from llm.tools.plan import forecast

SIGNAL_SECONDS = 300
"""Between the signal and the end of a job's time: for the step that runs, validation, and a checkpoint."""

PORT = 29400
"""torchrun's rendezvous."""

IMAGE = "llm-from-scratch:latest"


@dataclass(frozen=True)
class Launch:
    """What the files of a launch are made of."""

    name: str
    """Of the job: lower-case letters, digits and dashes, as Kubernetes wants it."""

    folder: Path
    run: str
    data: str
    nodes: int
    gpus: int
    device: str
    max_hours: float
    hosts: Sequence[str]
    image: str
    plan: str

    @property
    def config(self) -> str:
        return shlex.quote(str(self.folder / "config.json"))

    @property
    def here(self) -> str:
        """The folder that relative paths in the config start from."""
        return shlex.quote(os.getcwd())


def slurm(launch: Launch) -> dict[str, str]:
    """A job that goes on in the next one, until the run is complete."""
    minutes = round(60 * launch.max_hours)
    return {
        "train.sbatch": f"""\
#!/bin/bash
# Planned: {launch.plan}.
# Add what your cluster asks for, such as #SBATCH --partition and #SBATCH --account.
#SBATCH --job-name={launch.name}
#SBATCH --nodes={launch.nodes}
#SBATCH --ntasks-per-node={launch.gpus}
#SBATCH --gpus-per-node={launch.gpus}
#SBATCH --cpus-per-task=8
#SBATCH --time={minutes // 60:02d}:{minutes % 60:02d}:00
#SBATCH --signal=TERM@{SIGNAL_SECONDS}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={launch.folder}/%x-%j.log

cd {launch.here} || exit 1
[ ! -f .venv/bin/activate ] || source .venv/bin/activate
run={shlex.quote(launch.run)}

# All tasks get the signal; they save and end, rank 0 with 75. After a lost node --requeue starts the job again.
srun --kill-on-bad-exit=1 python -m llm train --config {launch.config} checkpoint.dir="$run"
code=$?

# srun may report another task's code, so the run's status decides. Whoever wrote the file `stop` wants no more.
reason=$(python -c '
import json, sys
ended = json.load(open(sys.argv[1]))
print((ended["result"] or {{}}).get("stopped") or "" if ended["status"] == "stopped" else "")' "$run/status.json")
case $reason in
  "" | *"the file stop"*) exit "$code" ;;
esac
echo "stopped ($reason): into the queue again"
scontrol requeue "$SLURM_JOB_ID"
"""
    }


def hosts(launch: Launch) -> dict[str, str]:
    """DeepSpeed's launcher over ssh; without ssh, or with torchrun, the same script on each machine."""
    first = launch.hosts[0]
    return {
        "hostfile": "".join(f"{host} slots={launch.gpus}\n" for host in launch.hosts),
        "train.sh": f"""\
#!/bin/bash
# Planned: {launch.plan}.
#   {launch.folder}/train.sh                       on one machine, which reaches all of the hostfile by ssh
#   NODE_RANK=0 {launch.folder}/train.sh           on each machine, without ssh: 0 on {first}, 1 on the next line's, ...
#   NODE_RANK=0 WITH=torchrun {launch.folder}/train.sh
# All machines need the same code and packages, and the same files under the same paths.
cd {launch.here} || exit 1
[ ! -f .venv/bin/activate ] || source .venv/bin/activate
hostfile={shlex.quote(str(launch.folder / "hostfile"))}
first=${{MASTER_ADDR:-$(awk '{{print $1; exit}}' "$hostfile")}}
port=${{MASTER_PORT:-{PORT}}}
train=(llm train --config {launch.config} "$@")

if [ "${{WITH:-deepspeed}}" = torchrun ]; then
  exec torchrun --nnodes {launch.nodes} --nproc_per_node {launch.gpus} --node_rank "${{NODE_RANK:?}}" \\
    --master_addr "$first" --master_port "$port" -m "${{train[@]}}"
elif [ -n "${{NODE_RANK:-}}" ]; then
  exec python -m deepspeed.launcher.runner --hostfile "$hostfile" --no_ssh --node_rank "$NODE_RANK" \\
    --master_addr "$first" --master_port "$port" --module "${{train[@]}}"
else
  exec python -m deepspeed.launcher.runner --hostfile "$hostfile" \\
    --master_addr "$first" --master_port "$port" --module "${{train[@]}}"
fi
""",
    }


def kubernetes(launch: Launch) -> dict[str, str]:
    """A PyTorchJob. A pod that ends with 75 is started again, and the run goes on."""

    def replica(kind: str, count: int) -> str:
        return f"""\
    {kind}:
      replicas: {count}
      restartPolicy: OnFailure
      template:
        spec:
          # More than a step, validation and a checkpoint take: the run saves when its pod is evicted.
          terminationGracePeriodSeconds: {SIGNAL_SECONDS}
          containers:
            - name: pytorch
              image: {launch.image}
              workingDir: /workspace
              command: [torchrun, -m, llm, train, --config, /config/config.json]
              resources:
                limits:
                  nvidia.com/gpu: {launch.gpus}
              volumeMounts:
                - {{name: work, mountPath: /workspace}}
                - {{name: config, mountPath: /config}}
                - {{name: shm, mountPath: /dev/shm}}
          volumes:
            # Data and checkpoints: a volume that all pods can write (ReadWriteMany).
            - {{name: work, persistentVolumeClaim: {{claimName: {launch.name}-work}}}}
            - {{name: config, configMap: {{name: {launch.name}-config}}}}
            # NCCL needs more than the 64 MB that a pod has.
            - {{name: shm, emptyDir: {{medium: Memory, sizeLimit: 16Gi}}}}
"""

    replicas = replica("Master", 1) + (replica("Worker", launch.nodes - 1) if launch.nodes > 1 else "")
    config = "".join(f"    {line}\n" for line in (launch.folder / "config.json").read_text("utf-8").splitlines())
    return {
        "train.yaml": f"""\
# Planned: {launch.plan}.
# Relative paths of the config ({launch.data}, {launch.run}) are in the volume claim {launch.name}-work.
apiVersion: v1
kind: ConfigMap
metadata:
  name: {launch.name}-config
data:
  config.json: |
{config}---
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata:
  name: {launch.name}
spec:
  # torchrun reads its arguments from the variables that this sets.
  nprocPerNode: "{launch.gpus}"
  runPolicy:
    backoffLimit: 1000
    cleanPodPolicy: None
  pytorchReplicaSpecs:
{replicas}"""
    }


def skypilot(launch: Launch) -> dict[str, str]:
    """A task on spot machines. After a preemption `sky jobs` finds others, and the run goes on from the bucket."""
    return {
        "train.sky.yaml": f"""\
# Planned: {launch.plan}.
# The config's relative paths ({launch.data}, {launch.run}) are in ~/work, a bucket: put the shards there first.
name: {launch.name}
num_nodes: {launch.nodes}
resources:
  accelerators: {launch.device}:{launch.gpus}
  use_spot: true
workdir: {launch.here}
file_mounts:
  ~/config.json: {launch.folder}/config.json
  ~/work:
    name: {launch.name}-work
    mode: MOUNT
setup: make setup
run: |
  source "$PWD/.venv/bin/activate"
  cd ~/work
  torchrun --nnodes "$SKYPILOT_NUM_NODES" --nproc_per_node "$SKYPILOT_NUM_GPUS_PER_NODE" \\
    --node_rank "$SKYPILOT_NODE_RANK" --master_addr "$(echo "$SKYPILOT_NODE_IPS" | head -n1)" --master_port {PORT} \\
    -m llm train --config ~/config.json
"""
    }


KINDS: dict[str, Callable[[Launch], dict[str, str]]] = {
    "slurm": slurm,
    "hosts": hosts,
    "k8s": kubernetes,
    "skypilot": skypilot,
}
"""{kind of cluster: what writes {name of a file: its text}}"""

START = {
    "slurm": "sbatch {folder}/train.sbatch",
    "hosts": "{folder}/train.sh",
    "k8s": "kubectl apply -f {folder}/train.yaml",
    "skypilot": "sky jobs launch {folder}/train.sky.yaml",
}


def write_launch(
    kind: str,
    config: str,
    overrides: Sequence[str] = (),
    *,
    out_dir: str,
    nodes: int = 1,
    gpus: int = 8,
    device_name: str = "H100",
    max_hours: float = 24.0,
    hosts: Sequence[str] = (),
    image: str = IMAGE,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Writes the files of one kind of cluster into a folder.

    Args:
        kind: a key of KINDS.
        config, overrides: as of `llm train`.
        out_dir: the folder to write into; it has to be one that the cluster's machines see, where they share one.
        nodes, gpus: number of machines, and of GPUs in each.
        device_name: for the plan and for SkyPilot, which rents it; one of `llm plan --device`.
        max_hours: time limit of one job; a longer run goes on in the next one.
        hosts: the names of the machines, for `hosts`; fewer than `nodes` get names to replace.
        image: the container, for k8s.
        say: called with each line to show.

    Returns what `llm launch --json` prints. Raises UserError for a config that cannot be trained or does not fit.
    """
    if len(hosts) > nodes:
        nodes = len(hosts)
    loaded = load_config(config, overrides)
    planned = forecast(
        config, list(overrides), gpus=(nodes * gpus,), device_name=device_name, node_gpus=gpus, say=lambda line: None
    )
    folder = Path(out_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    launch = Launch(
        name=re.sub(r"[^a-z0-9]+", "-", Path(config).stem.lower()).strip("-") or "run",
        folder=folder,
        run=loaded.checkpoint.dir,
        data=loaded.data.paths[0] if loaded.data.paths else "data/shards",
        nodes=nodes,
        gpus=gpus,
        device=device_name,
        max_hours=max_hours,
        hosts=[*hosts, *(f"node{i}" for i in range(len(hosts), nodes))],
        image=image,
        plan=f"{planned['tokens_per_second']:,.0f} tokens/s and {planned['hours']:,.1f} hours on {nodes * gpus} "
        f"{device_name}, {planned['memory_bytes'] / 1e9:.1f} GB each (llm plan)",
    )
    # Without what is null or a default, so that the rules of a later release still fill it in.
    stated = loaded.model_dump(exclude_unset=True)
    atomic_text(folder / "config.json", json.dumps(stated, indent=2) + "\n")
    written = ["config.json"]
    for name, text in KINDS[kind](launch).items():
        atomic_text(folder / name, text)
        written.append(name)
        if name.endswith((".sh", ".sbatch")):
            (folder / name).chmod(0o755)
    say(f"planned     {launch.plan}")
    for name in written:
        say(f"written     {folder / name}")
    start = START[kind].format(folder=shlex.quote(str(folder)), name=launch.name)
    say(f"to start    {start}")
    return {"files": [str(folder / name) for name in written], "start": start, "hours": planned["hours"]}
