"""Counts what steps of training and decoding ask of the device: launches, copies, waits of the host, and memory.

python -m tests.stub_gpu --write    counts every case again: benchmarks/results/stub-gpu.json
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.training_step import TrainingStep
from llm.atomic import atomic_text
from llm.config_file import load_config
from llm.inference.device_decoder import DeviceDecoder, workspace
from llm.inference.sampling import Sampler, Sampling
from llm.model.hf import to_hf
from llm.model.transformer import Transformer
from llm.tools.plan import forecast
from llm.training.engine import Engine, stop
from llm.training.gathering import CopyStream, gather
from llm.training.rules import follow

from .counts import LAUNCHES, PAGEABLE, Counts, counting

T = TypeVar("T")

COMMITTED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "stub-gpu.json"
VOCABULARY, ACCUMULATION = 32_000, 3
CUBLAS_WORKSPACES = 2 * 32 * 2**20
"""Bytes that torch takes from its allocator on sm_90 for cuBLAS: once for the thread of the forward pass, once for
backward's. `llm plan` does not count them.
"""
PARTS = ("first micro-batch", "micro-batch", "update")


@dataclass(frozen=True)
class Case:
    config: str
    micro_batch: int
    overrides: tuple[str, ...] = ()

    @property
    def waits_once(self) -> bool:
        """Whether the host waits for the gradient's norm alone. DeepSpeed's ZeRO 3 waits more often."""
        return "deepspeed.zero_stage=3" not in self.overrides

    def __str__(self) -> str:
        return " ".join([f"{self.config} {self.micro_batch}", *self.overrides])


ADAMW = "optimizer.kind=adamw"
CASES = [
    Case("125m", 16),
    Case("125m", 16, (ADAMW,)),
    Case("125m", 16, (ADAMW, "train.precision=fp32")),
    Case("125m", 16, (ADAMW, "train.activation_checkpointing=selective")),
    Case("125m", 16, (ADAMW, "train.activation_checkpointing=full")),
    Case("125m", 16, (ADAMW, "model.qk_norm=false")),
    Case("125m", 16, ("train.same_bits=true", "deepspeed.zero_stage=0")),
    Case("125m", 16, (ADAMW, "deepspeed.zero_stage=3")),
    Case("350m", 16, (ADAMW,)),
    Case("1.3b", 8, (ADAMW,)),
    Case("1.3b", 16, (ADAMW,)),
]


@dataclass(frozen=True)
class Decoding:
    config: str
    batch: int
    temperature: float = 0

    def __str__(self) -> str:
        return f"decoding {self.config} {self.batch}" + (" drawn" if self.temperature else "")


DECODING = [Decoding(config, batch) for config in ("125m", "1.3b") for batch in (1, 16)]
DECODING += [Decoding("125m", batch, temperature=1) for batch in (1, 16)]
PROMPT = 100


@dataclass(frozen=True)
class Save:
    """A save between two steps of the model of configs/tiny.json."""

    overrides: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join(["save", *self.overrides])


SAVES = [
    Save((ADAMW, "deepspeed.zero_stage=0")),
    Save(("optimizer.kind=muon", "deepspeed.zero_stage=0")),
    Save((ADAMW, "train.same_bits=true", "deepspeed.zero_stage=0")),
    Save((ADAMW, "train.precision=fp16", "deepspeed.zero_stage=1")),
    Save((ADAMW, "train.precision=fp16", "deepspeed.zero_stage=2")),
    Save((ADAMW, "deepspeed.zero_stage=3")),
]
SAVE_PARTS = ("update before", "save", "micro-batch", "update", "writer")


def count_save(case: Save) -> dict[str, Any]:
    """The counts of a save: of the host's part, of the next step, and of the thread that then writes the tensors.

    wrong: the weights in the host's memory that differ from those on the device, where they are read in place.
    """
    overrides = [f"model.vocab_size={VOCABULARY}", "train.device=cuda", "train.micro_batch=1", *case.overrides]
    loaded = load_config("configs/tiny.json", [*overrides, "train.global_batch_tokens=512", "data.seq_len=512"])
    config, _ = follow(loaded, None)
    step = TrainingStep(config, document=None)
    engine, targets = step.engine, step.plan.tokens_per_step
    assert isinstance(engine, Engine)
    step()
    found: dict[str, Any] = {"reads_in_place": engine.reads_in_place}

    def counted(name: str, call: Callable[[], T]) -> T:
        with counting() as counts:
            result = call()
        found[name] = summary(counts) | {kind: counts.number(kind) for kind in ("record", "wait_on_device")}
        return result

    copies = CopyStream(step.world.device, lambda line: None)
    first = gather(engine, config, 1, {}, copies)
    first.wait()
    (batch,) = step.batches
    engine.backward(batch, targets)
    engine.update(step.lr)
    engine.backward(batch, targets)
    counted(SAVE_PARTS[0], lambda: engine.update(step.lr))
    gathered = counted(SAVE_PARTS[1], lambda: gather(engine, config, 1, first.files, copies))
    found["wrong"] = [
        key
        for name in engine.parameters
        for key, part in to_hf(config.model, name, engine.read_parameter(name)).items()
        if engine.reads_in_place and not same_bits(part.cpu(), gathered.files["model"][key])
    ]
    counted(SAVE_PARTS[2], lambda: engine.backward(batch, targets))
    counted(SAVE_PARTS[3], lambda: engine.update(step.lr))
    counted(SAVE_PARTS[4], gathered.wait)
    found["tensors"] = sum(map(len, gathered.files.values()))
    stop()
    return found


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bytes(a.contiguous().numpy().data) == bytes(b.contiguous().numpy().data)


@torch.inference_mode()
def count_decoding(case: Decoding) -> dict[str, Any]:
    """The counts of one step, a token for each sequence, and the nodes of its CUDA graph."""
    config = load_config(f"configs/{case.config}.json", [f"model.vocab_size={VOCABULARY}"])
    with torch.device("cuda"):
        model = Transformer(config.model).to(torch.bfloat16).requires_grad_(False)
    sequences, prompts = range(case.batch), [[1] * PROMPT] * case.batch
    sampler = Sampler(Sampling(temperature=case.temperature), prompts, VOCABULARY, [0] * case.batch)
    with workspace(model, case.batch, PROMPT + 8) as held:
        decoder = DeviceDecoder(model, held, prompts, 8, sampler)
        for _ in range(2):  # the prompts; two steps are begun, and the first captures the graph
            decoder.choose(sequences)
        with counting() as counts:
            decoder.choose(sequences)
    (contents,) = counts.calls["graph"]
    return {**summary(counts), "graph": contents}


def count_training(case: Case) -> dict[str, Any]:
    """The counts of a step's first micro-batch, of another, and of the update; and the allocator's peak in bytes."""
    path = f"configs/{case.config}.json"
    sequence = load_config(path).model.max_seq_len
    keys = {
        "model.vocab_size": VOCABULARY,
        "data.seq_len": sequence,
        "train.micro_batch": case.micro_batch,
        "train.global_batch_tokens": ACCUMULATION * case.micro_batch * sequence,
    }
    overrides = [*(f"{key}={value}" for key, value in keys.items()), *case.overrides]
    step = TrainingStep(load_config(path, overrides), document=None)
    targets = step.plan.tokens_per_step
    step()
    step()  # kernels are compiled, and the optimizer has its state
    torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = {"parameters": step.plan.parameters, "zero_stage": step.engine.stage}
    for i, batch in enumerate(step.batches):
        with counting() as counts:
            step.engine.backward(batch, targets)
        found[PARTS[min(i, 1)]] = summary(counts)
    with counting() as counts:
        step.engine.update(step.lr)
    found[PARTS[2]] = summary(counts)
    found["peak_bytes"] = torch.cuda.max_memory_allocated()
    planned = forecast(path, overrides, device_name="H100", memory_gb=1000, say=lambda line: None)
    found["planned_bytes"] = planned["memory_bytes"]
    stop()
    return found


def summary(counts: Counts) -> dict[str, Any]:
    copies = ("host_to_device", "device_to_host", "device_to_device", "memset")
    kinds = (*LAUNCHES, *copies, *PAGEABLE, "collective", "wait", "unknown")
    found = {kind: number for kind in kinds if (number := counts.number(kind))}
    return {"launches": counts.launches, **found, "where": dict(sorted(counts.where.items()))}


def count_apart(case: Case | Decoding | Save) -> dict[str, Any]:
    """The counts of a case, made in a process of its own, because a process has one engine and one peak of memory.

    Only small copies to the device are made there, so that its memory is zeroes and the gradient's norm not garbage.
    ZeRO 3 compares lists of parameters on the device. A save has weights that are not zero.
    """
    command = [sys.executable, "-m", "tests.stub_gpu.steps", str(case)]
    limit = {"STUB_GPU_COPY_LIMIT": str(2**20 if isinstance(case, Save) else 4096)}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **limit})
    if done.returncode:
        raise RuntimeError(f"{case}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


COUNT: dict[type, Callable[[Any], dict[str, Any]]] = {Case: count_training, Decoding: count_decoding, Save: count_save}


def main(arguments: list[str]) -> None:
    if arguments != ["--write"]:
        case = next(case for case in [*CASES, *DECODING, *SAVES] if str(case) == arguments[0])
        print(json.dumps(COUNT[type(case)](case)))
        return
    import deepspeed
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "deepspeed": deepspeed.__version__}
    training = {str(case): count_apart(case) for case in CASES}
    decoding = {str(case): count_apart(case) for case in DECODING}
    table = {"versions": versions, "training": training, "decoding": decoding}
    atomic_text(COMMITTED, json.dumps(table, indent=1) + "\n")
    for name, found in training.items():
        launches = [found[part]["launches"] for part in PARTS]
        peak, planned = found["peak_bytes"] / 1e9, found["planned_bytes"] / 1e9
        print(f"{name:<70} launches {launches}, peak {peak:.2f} GB, planned {planned:.2f}")
    for name, found in decoding.items():
        print(f"{name:<70} launches {found['launches']} and a graph of {found['graph']}; waits {found['wait']}")


if __name__ == "__main__":
    main(sys.argv[1:])
