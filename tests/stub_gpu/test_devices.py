"""What is launched where: a bound binary, a model on the second of two devices, two ranks over the stub's NCCL."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from running import REPOSITORY, environment, small_config
from stub_gpu import host_time
from stub_gpu.test_verbs import FRESH, MODEL, json_alone

from kernels import launch

pytestmark = [pytest.mark.stub_gpu, pytest.mark.slow]

# The current device is the first. The stub refuses a launch on a stream of another device, as CUDA does.
ON_THE_SECOND = f"""
import json
import torch
from llm.config import ModelConfig
from llm.inference.decode import generate_batch
from llm.inference.sampling import Sampling
from llm.model.transformer import Transformer
from stub_gpu.counts import counting

model = Transformer(ModelConfig(vocab_size=512, **{MODEL})).to("cuda:1")
tokens = torch.zeros(2, 64, dtype=torch.int64, device="cuda:1")
doc_start = torch.zeros(2, 64, dtype=torch.int32, device="cuda:1")
model(tokens, labels=tokens, doc_start=doc_start, reduction="sum").backward()
with counting() as counts:
    for _ in generate_batch(model, [[1, 2, 3]], max_new_tokens=4, sampling=Sampling(temperature=0)):
        pass
print(json.dumps([str(model.lm_head.weight.grad.device), torch.cuda.current_device(), counts.calls["graph"]]))
"""

RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")


def python(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    two = {"STUB_GPU_COUNT": "2", "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment() | two | variables)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done


def test_a_model_on_the_second_device_learns_and_decodes_there() -> None:
    """The first token is the prompt's; each other one is a launch of a graph, which holds the whole step."""
    device, current, graphs = json.loads(python("-c", ON_THE_SECOND).stdout)
    assert (device, current) == ("cuda:1", 0)
    ((contents, (launches, _)),) = graphs.items()
    assert launches == 3
    assert int(contents.split()[0]) > 20, contents  # nodes


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_and_resume(small_shards: Path, tmp_path: Path, stage: int) -> None:
    changes = {"train__device": "cuda", "train__precision": "bf16", "deepspeed__zero_stage": stage}
    tree = small_config(small_shards, tmp_path / "run", checkpoint__every_steps=2, train__micro_batch=2, **changes)
    tree["model"] = MODEL
    (tmp_path / "config.json").write_text(json.dumps(tree))
    command = (*RANKS, "llm", "train", "--config", tmp_path / "config.json", "--json")
    assert json_alone(python(*command, **FRESH))
    assert "resumed" in python(*command, "train.total_tokens=6144", **FRESH).stderr


def test_two_ranks_score_text(random_checkpoint: Path, small_corpus: Path) -> None:
    command = (*RANKS, "llm", "eval", "--ckpt", random_checkpoint / "step-00000000", "--input", small_corpus, "--json")
    assert json_alone(python(*command))


def test_a_bound_binary_is_the_one_that_triton_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, call in host_time.cases().items():
        monkeypatch.setattr(launch, "_bound", {})
        for _ in range(2):
            call()
        arguments = host_time.last_launch(call)
        assert (arguments is None) == (name == "torch.add")
        if arguments is not None:
            kernel, grid, args, meta = arguments
            found = kernel[grid](*args, enable_fp_fusion=True, **meta)
            ((_, bound, _),) = launch._bound.values()
            assert bound is found, name
