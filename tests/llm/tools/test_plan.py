"""`llm plan`: its memory against what really lives, and its arithmetic."""

import json
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from running import environment

from kernels.work import Work
from llm import device_rates
from llm.config import ActivationCheckpointing, Config
from llm.config_file import parse_config
from llm.data.manifest import read_manifest
from llm.hardware import named
from llm.model.flops import recomputed_work
from llm.model.transformer import Transformer
from llm.tools import roofline
from llm.tools.plan import best_interval
from llm.tools.plan_network import Link, slowest_link, traffic
from llm.training.engine import REDUCE_BUCKET
from llm.training.memory import (
    COPIED_GRADIENTS,
    LIVE_PARAMETERS,
    Activations,
    State,
    activation_bytes,
    state_bytes,
    traced_step,
)
from llm.training.optim import matrix_shapes
from llm.world import DTYPES

SHAPE = {"n_layers": 5, "d_model": 128, "n_heads": 4, "n_kv_heads": 2, "d_ff": 344, "vocab_size": 1024}
BF16, FP32 = torch.bfloat16, torch.float32


def config(layers: int = 5, checkpointing: str = "none", **changes: object) -> Config:
    train = {"total_tokens": 1, "global_batch_tokens": 1, "activation_checkpointing": checkpointing}
    return parse_config({"model": {**SHAPE, "n_layers": layers}, "train": train, **changes}, "test")


@pytest.mark.parametrize(("dtype", "processes"), [(FP32, 1), (BF16, 1), (BF16, 2)])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_activations_are_those_that_a_real_step_holds(checkpointing, dtype, processes):
    """Traced from two and three blocks without memory, against five that run. One process rounds fp32 weights."""
    predicted = activation_bytes(config(5, checkpointing), processes, 3, 256, dtype, "cpu")
    model = Transformer(config().model, activation_checkpointing=checkpointing, compute_dtype=dtype)
    model.init_weights(0)
    model.to(FP32 if processes == 1 else dtype)
    ids = torch.randint(900, (3, 256))
    doc_start = torch.zeros(3, 256, dtype=torch.int32)
    counted = traced_step(model, lambda: model(ids, labels=ids, doc_start=doc_start))
    assert predicted.held == pytest.approx(counted.held, rel=0.05)
    assert predicted.peak == pytest.approx(counted.peak, rel=0.05)


def test_activations_on_a_gpu_are_those_that_the_kernels_keep():
    """Of a block: two residual streams and their norms, q, k, v, attention's output, gate, up and their product."""
    one, two = (activation_bytes(config(n), 2, 3, 256, BF16, "cuda").held for n in (1, 2))
    width, heads, d_ff = 128, 4, 344
    elements = 2 * width + 2 * width + 2 * width + (width + width // 2) + width + 3 * d_ff
    statistics = 2 + heads  # fp32: of each norm, and of each head's softmax
    assert two - one == pytest.approx(3 * 256 * (2 * elements + 4 * statistics), rel=0.01)


def test_state_follows_the_stage():
    n = sum(p.numel() for p in Transformer(config().model).parameters())

    def total(stage: int, processes: int, dtype: torch.dtype = BF16, device: str = "cpu", **changes: object) -> int:
        state = state_bytes(config(**changes), stage, processes, dtype, device)
        return state.total - state.objects

    assert total(0, 4, FP32) == total(0, 4) == n * (4 + 4 + 8)
    assert total(1, 1, torch.float16) == n * (2 + 4 + 4 + 8)
    for dtype in (BF16, FP32):
        assert total(1, 1, dtype) == total(2, 1, dtype) == total(0, 1, dtype), "one process has nothing to partition"
    assert total(1, 2, FP32) == n * (4 + 4 + (4 + 8) // 2), "on a CPU a bucket takes the place of gradients"
    assert total(1, 2, FP32, "cuda") == n * (4 + 4 + (4 + 8) // 2) + 4 * REDUCE_BUCKET
    assert total(1, 1, FP32, "cuda", deepspeed={"offload": "cpu"}) == n * (4 + 4) + 4
    assert total(1, 1, FP32, deepspeed={"offload": "cpu"}) > n * (4 + 4 + 4 + 8 + 4), "a CPU's memory is the host's"
    assert total(1, 4) == n * (2 + 4 + (4 + 8) // 4)
    assert total(1, 1, BF16, "cuda", deepspeed={"offload": "cpu"}) == n * (2 + 4) + 4
    muon = {"optimizer": {"kind": "muon"}}
    assert n * (4 + 4 + 4) < total(0, 1, FP32, **muon) < total(0, 1, FP32)
    assert total(0, 1, FP32) - total(0, 1, FP32, **muon) == 2 * (total(1, 2) - total(1, 2, **muon)), "is partitioned"
    assert total(2, 4) < total(2, 1)
    assert state_bytes(config(), 3, 4, BF16).gathered == 2 * n, "DeepSpeed keeps a small model's weights gathered"
    large = config().model_copy(update={"model": config(40).model.model_copy(update={"d_model": 4096, "d_ff": 11008})})
    assert state_bytes(large, 3, 4, BF16).gathered == 2 * LIVE_PARAMETERS
    assert state_bytes(large, 3, 64, BF16).total < state_bytes(large, 2, 64, BF16).total


def test_muons_update_is_a_peak_of_its_own():
    """No activations are left in it. With offload the GPU gets the host's momentum, one partition."""

    def state(stage: int, processes: int, device: str = "cpu", **changes: object) -> State:
        muon = config(optimizer={"kind": "muon"}, **changes)
        return state_bytes(muon, stage, processes, FP32, device)

    nothing = Activations(0, 0)
    assert state_bytes(config(optimizer={"kind": "adamw"}), 0, 1, FP32, "cpu").update == 0
    one = state(0, 1)
    assert one.peak(nothing) == one.total + one.update > one.total
    blocks = sum(rows * columns for rows, columns in matrix_shapes(config().model))
    assert one.update > 8 * blocks // 5, "the matrices of one block are kept for the check of the first update"
    on_gpu, offloaded = (state(1, 2, "cuda", deepspeed={"offload": offload}) for offload in ("none", "cpu"))
    assert offloaded.update > on_gpu.update + 4 * blocks // 2
    # DeepSpeed has freed the gradients of the blocks by then, at stage 1 those of all ranks.
    assert state(1, 2, "cuda").update < state(2, 2, "cuda").update < state(0, 2, "cuda").update


def test_stage_0_of_several_processes_copies_the_gradients_to_reduce_them():
    n = sum(p.numel() for p in Transformer(config().model).parameters())
    assert state_bytes(config(), 0, 2, FP32).passing == 4 * n
    assert state_bytes(config(), 0, 1, FP32).passing == 0
    # The copy and the activations are never there together.
    state, activations = state_bytes(config(), 0, 2, FP32), activation_bytes(config(), 2, 1, 64, FP32, "cpu")
    assert state.peak(activations) == state.total + max(4 * n, activations.peak)
    large = config().model_copy(update={"model": config(40).model.model_copy(update={"d_model": 4096, "d_ff": 11008})})
    assert 4 * COPIED_GRADIENTS < state_bytes(large, 0, 2, FP32).passing < 5 * COPIED_GRADIENTS


def test_plans_by_datasheet_without_data(llm_here, write_config):
    config = write_config(data__path="/nowhere", model__vocab_size=500, data__seq_len=64, train__total_tokens=10**9)
    arguments = ("plan", "--config", config, "--device", "h100", "--mfu", 0.5, "--price", 2, "--json")
    code, out, err = llm_here(*arguments)
    result = json.loads(out)
    assert code == 0
    assert result["tokens_per_second"] == pytest.approx(0.5 * 989.4e12 / result["flops_per_token"]["usual"])
    assert result["cost"] == 2 * result["device_hours"] == 2 * result["hours"]
    assert result["hours"] == pytest.approx(1e9 / result["tokens_per_second"] / 3600)
    assert result["memory_bytes"] == (sum(result["state_bytes"].values()) + result["activation_bytes"]["none"]["peak"])
    assert "assuming 50% of 989.4 TFLOP/s (H100's datasheet, dense bf16)" in err
    assert llm_here("plan", "--config", config)[0] == 0  # on this machine, measured


def test_the_recommended_choice_is_the_configs_unless_another_is_faster(llm_here, write_config):
    arguments = ("plan", "--config", write_config(model__vocab_size=500, data__seq_len=64), "--device", "H100")
    _, out, _ = llm_here(*arguments)
    assert re.search(r"\nrecommended deepspeed.zero_stage=\d .*: as the config has it", out)
    _, out, _ = llm_here(*arguments, "train.activation_checkpointing=full")
    assert re.search(r"\nrecommended .*checkpointing=none .*: \d+% less time", out)


def test_a_t4_computes_in_fp16_with_the_reference_implementations(llm_here, write_config):
    config = write_config(data__path="/nowhere", model__vocab_size=500, train__precision="auto")
    code, out, err = llm_here("plan", "--config", config, "--device", "t4", "--json")
    assert code == 0
    assert "precision   float16 with fp32 masters; T4 is too old for the Triton kernels" in err
    assert min(choice["stage"] for choice in json.loads(out)["choices"]) == 1, "stage 0 does not scale the loss"
    _, out, _ = llm_here("plan", "--config", config, "--device", "t4", "deepspeed.zero_stage=0")
    assert "precision   fp32; T4" in out


def test_a_plan_without_data_says_that_their_length_is_unknown(llm_here, write_config, small_shards):
    arguments = ("model.vocab_size=null", "train.total_tokens=null", "--device", "H100")
    _, out, _ = llm_here("plan", "--config", write_config(data__path="/nowhere"), *arguments)
    assert "assumed     as much text as a run needs" in out
    _, out, _ = llm_here("plan", "--config", write_config(data__path=str(small_shards)), *arguments)
    assert "assumed" not in out
    assert " device-hours, without validation and saving" in out


def test_memory_lowers_the_micro_batch_or_says_what_would_help(llm_here, write_config):
    config = write_config(model__vocab_size=500, data__seq_len=64, deepspeed__zero_stage=0)
    arguments = ("plan", "--config", config, "--json", "--memory_gb")
    at_ease = json.loads(llm_here(*arguments, 100)[1])
    room = 0.8 * at_ease["memory_bytes"] / 0.9
    tight = json.loads(llm_here(*arguments, room / 1e9)[1])
    assert tight["micro_batch"] < at_ease["micro_batch"]
    assert tight["memory_bytes"] <= 0.9 * room
    code, _, err = llm_here(*arguments, 1e-3)
    assert code == 1
    assert "do not fit" in err
    assert "nothing fits: take more --gpus" in err
    code, _, err = llm_here(*arguments, 0.99 * at_ease["memory_bytes"] / 0.9e9, "train.micro_batch=8")
    assert code == 1
    assert "set deepspeed.zero_stage=0 train.activation_checkpointing=selective train.micro_batch=8" in err


def test_refuses_a_device_that_it_does_not_know(llm_here, write_config):
    code, _, err = llm_here("plan", "--config", write_config(model__vocab_size=500), "--device", "Banana")
    assert code == 1
    assert "choose from T4, A100" in err


def test_several_numbers_of_devices_are_compared(llm_here, write_config, tmp_path):
    config = write_config(data__path="/nowhere", model__vocab_size=500, data__seq_len=64, train__total_tokens=10**6)
    arguments = ("plan", "--config", config, "--device", "H100", "--price", 3)
    code, out, _ = llm_here(*arguments, "--gpus", "1..6", "--picture", tmp_path / "scaling.png", "--json")
    assert code == 0
    rows = json.loads(out)["scaling"]
    assert [row["gpus"] for row in rows] == [1, 2, 4, 6]
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    # A small step: the link costs more than the devices gain, and there are not enough sequences for all.
    assert rows[0]["bound"] == "compute"
    assert rows[0]["cost"] == pytest.approx(3 * rows[0]["hours"])
    code, _, err = llm_here(*arguments, "--picture", tmp_path / "one.png")
    assert code == 1
    assert "give --gpus as 1..64" in err


def test_the_size_that_hours_allow_is_written_and_planned(llm_here, write_config, tmp_path):
    config = write_config(data__path="/nowhere", model__vocab_size=500, data__seq_len=64, train__total_tokens=None)
    arguments = ("plan", "--config", config, "--device", "T4", "--write", tmp_path / "mine.json")
    code, out, err = llm_here(*arguments, "--hours", 0.001, "--json")
    assert code == 0, err
    small = json.loads(out)
    assert small["hours"] == pytest.approx(0.001, rel=0.05)
    written = json.loads((tmp_path / "mine.json").read_text())
    stated = json.loads(config.read_text())
    assert written["optimizer"] == stated["optimizer"], "what is neither shape nor length stays"
    code, out, _ = llm_here("plan", "--config", tmp_path / "mine.json", "--device", "T4", "--json")
    assert json.loads(out)["parameters"] == small["parameters"]
    assert "exists; name a new file" in llm_here(*arguments, "--hours", 1)[2]
    longer = json.loads(llm_here(*arguments[:5], "--hours", 0.01, "--json")[1])
    assert longer["expected_loss"] < small["expected_loss"]
    assert "give both" in llm_here(*arguments)[2]


def test_a_run_from_trained_weights_has_no_expected_loss(llm_here, write_config, small_shards):
    """The law knows nothing of weights that have learned before."""
    command = ("plan", "--config", write_config(), "--device", "T4", "--json")
    keys = ("expected_loss", "expected_loss_band", "expected_bits_per_byte")
    code, out, err = llm_here(*command)
    assert code == 0, err
    assert all(json.loads(out)[key] for key in keys)
    epochs = 8 * 512 / (64 * read_manifest(small_shards).sequences("train", 64))
    assert re.search(rf"^run .* tokens per parameter; {epochs:,.2f} epochs$", err, re.M)
    code, out, err = llm_here(*command, "train.init_from=artifacts/other/latest")
    assert code == 0, err
    assert [json.loads(out)[key] for key in keys] == [None] * 3
    assert "expected" not in err


def test_recomputing_takes_the_flops_and_bytes_of_the_blocks():
    """Full: their forward pass. Selective: the bytes of norms with residual streams, QK-norm with RoPE, and SwiGLU."""
    model = config(5).model
    matrices = 128 * (128 + 2 * 64) + 128 * 128 + 3 * 128 * 344

    def total(tokens: int, checkpointing: ActivationCheckpointing) -> Work:
        return sum(recomputed_work(model, tokens, 256, 2, checkpointing).values(), Work())

    full = total(1, "full")
    assert full.flops == 5 * (2 * matrices + 4 * 256 * 128)
    selective = total(1000, "selective")
    assert selective.flops == 0
    assert selective.moved == 5 * 2 * 1000 * (2 * 4 * 128 + 2 * (128 + 64) + 3 * 344)
    assert total(1, "none") == Work()


def test_saving_is_planned_by_the_time_between_failures():
    # Daly 2006: at a save of 1 minute and 200 minutes between failures, 20 - 1 minutes.
    assert best_interval(200, 1) == pytest.approx(19)
    assert best_interval(1, 10) == 10


def test_a_gpu_computes_by_its_ops_and_others_at_40_percent(llm_here, write_config, monkeypatch):
    """A GPU of this machine at its measured rates; a CPU, and a GPU that has no Triton kernels, at an assumed MFU."""
    config = write_config(data__path="/nowhere", model__vocab_size=500, train__precision="fp32")

    def planned(*arguments: object) -> dict[str, Any]:
        code, out, err = llm_here("plan", "--config", config, "--json", *arguments)
        assert code == 0, err
        result = json.loads(out)
        assert (result["assumed"]["mfu"] is None) == (" each op at its share of " in err)
        return result

    monkeypatch.setattr(device_rates, "measure_matmul_flops", lambda device, dtype: 1e14)
    monkeypatch.setattr(device_rates, "measure_copy_bytes", lambda device: 1e12)
    t4, here, h200, a100 = (
        planned("--device", "T4"),
        planned(),
        planned("--device", "H200"),
        planned("--device", "A100"),
    )
    assert t4["assumed"]["mfu"] == here["assumed"]["mfu"] == 0.4
    assert here["tokens_per_second"] == pytest.approx(0.4e14 / here["flops_per_token"]["usual"])
    assert h200["assumed"]["flops"] == roofline.MEASURED["H200"].products
    assert a100["assumed"]["flops"] == pytest.approx(0.8 * 312e12)
    assert a100["assumed"]["bytes_per_second"] == pytest.approx(0.9 * 2039e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    slower = planned("train.device=auto")
    measured = {"mfu": None, "flops": 1e14, "bytes_per_second": 1e12, "source": "measured on this machine"}
    assert slower["assumed"] == measured
    assert slower["tokens_per_second"] < 0.3 * h200["tokens_per_second"]


def test_a_ring_sends_what_the_collectives_of_a_stage_need():
    model = config(5)
    n = sum(p.numel() for p in Transformer(model.model).parameters())
    by_stage = [traffic(model, stage, 4, BF16, micro_batches=3) for stage in range(4)]
    assert [t.all_reduce for t in by_stage] == [4 * n, 4 * n, 12 * n, 0]
    assert [t.reduce_scatter for t in by_stage] == [0, 0, 0, 12 * n]
    assert [t.all_gather for t in by_stage] == [0, 2 * n, 2 * n, 2 * n]
    assert traffic(model, 1, 1, BF16, 3).total == 0
    assert by_stage[0].sent(4) == 2 * 0.75 * 4 * n
    h100 = named("H100")
    assert slowest_link(h100, 8, 8, 50.0).name == "NVLink 4"
    assert slowest_link(h100, 16, 8, 50.0) == Link("network", 50e9)
    assert slowest_link(named("T4"), 16, 8, 50.0).name == "PCIe 3", "the slower one counts"


def same_bits(**changes: object) -> Config:
    """Eight micro-batches a step."""
    train = {"total_tokens": 1, "global_batch_tokens": 8 * 512, "same_bits": True, "micro_batch": 1, **changes}
    return config(train=train, data={"seq_len": 512})


def test_same_bits_need_whole_fp32_weights_and_partial_sums():
    n = sum(p.numel() for p in Transformer(config().model).parameters())

    def total(stage: int, processes: int) -> int:
        state = state_bytes(same_bits(), stage, processes, BF16, "cpu")
        return state.total - state.objects

    assert total(1, 1) == total(0, 1) == n * (4 + 4 + 8 + 2 * 4)
    assert total(0, 2) == n * (4 + 4 + 8 + 4)
    assert total(1, 4) == n * (4 + 4 + 8 // 4)
    assert state_bytes(same_bits(), 1, 2, BF16, "cpu").passing == 4 * (n // 2)
    assert state_bytes(same_bits(micro_batch=None), 1, 1, BF16, "cpu").partial_sums == 0, "one micro-batch"
    assert traffic(same_bits(), 0, 4, BF16, 2).sent(4) == traffic(config(), 0, 4, BF16, 2).sent(4)
    assert traffic(same_bits(), 1, 4, BF16, 2).sent(4) == 0.75 * (4 * n + 4 * n)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1])
def test_two_processes_with_same_bits_send_and_hold_what_the_plan_says(stage, tmp_path):
    """Counted: what they give to isend in a step, with the paddings of 4 groups of parameters to 2 x 4,096."""
    (tmp_path / "count.py").write_text(COUNT_SAME_BITS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(tmp_path / "count.py"), str(stage)], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    parsed = parse_config(json.loads(counted["config"]), "t")
    padding = 4 * 4 * 2 * 4096
    assert 0 <= counted["sent"] - traffic(parsed, stage, 2, FP32, 4).sent(2) < padding
    state = state_bytes(parsed, stage, 2, FP32, "cpu")
    flat = state.weights + state.gradients + state.partial_sums
    assert 0 <= counted["held"] - flat < 3 * padding
    assert 0 <= counted["moments"] - state.moments < 2 * padding


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "precision", "optimizer"),
    [
        (0, "fp32", "adamw"),
        (1, "fp32", "adamw"),
        (1, "bf16", "adamw"),
        (2, "bf16", "adamw"),
        (3, "bf16", "adamw"),
        (0, "bf16", "muon"),
        (1, "fp32", "muon"),
        (2, "bf16", "muon"),
    ],
)
def test_two_processes_send_what_the_plan_says(stage, precision, optimizer, tmp_path):
    """Counted: the tensors that DeepSpeed and Muon give to collectives in a step."""
    (tmp_path / "count.py").write_text(COUNT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(tmp_path / "count.py"), str(stage), precision, optimizer]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    tree = json.loads(counted.pop("config"))
    planned = traffic(parse_config(tree, "t"), stage, 2, DTYPES[precision], micro_batches=2)
    assert counted["all_gather_into_tensor"] == planned.all_gather
    assert counted["reduce_scatter_tensor"] == planned.reduce_scatter
    assert counted["all_to_all_single"] == planned.all_to_all
    assert (planned.all_to_all > 0) == (optimizer == "muon" and stage > 0)
    # The rest are the scalars of the norm and of the check for overflows.
    assert 0 <= counted["all_reduce"] - planned.all_reduce < 32


COUNT = """
import json, sys
from collections import Counter
import torch
from llm.config_file import parse_config
from llm.data.manifest import read_manifest
from llm.model.transformer import Transformer, initial_value
from llm.training.engine import Engine, start

stage, precision = int(sys.argv[1]), sys.argv[2]
# Three blocks, so that a matrix lies in the partitions of both processes.
shape = dict(n_layers=3, d_model=64, n_heads=2, n_kv_heads=2, d_ff=176, vocab_size=512, max_seq_len=64)
rates = dict(kind=sys.argv[3], lr=1e-3, embed_lr=1e-3, head_lr=1e-3, norm_lr=1e-3, beta2=0.95, weight_decay=0.1)
if sys.argv[3] == "muon":
    rates["muon_lr"] = 1e-3
train = dict(precision=precision, device="cpu", global_batch_tokens=512, total_tokens=5120)
tree = dict(model=shape, data=dict(path="none", seq_len=64), optimizer=rates, schedule=dict(warmup_tokens=0),
            train=train, deepspeed=dict(zero_stage=stage))
config = parse_config(tree, "count")
world = start(config)
engine = Engine(lambda: Transformer(config.model, compute_dtype=world.dtype), config, world, 2, 2)
for name in engine.parameters:
    engine.write_parameter(name, initial_value(config.model, name, 0))
from deepspeed.comm import comm

counted = Counter()
class Counting:
    def __init__(self, backend):
        self.backend = backend
    def __getattr__(self, name):
        found = getattr(self.backend, name)
        if not name.startswith(("all_", "reduce", "broadcast")) or not callable(found):
            return found
        def count(*arguments, **options):
            if name == "all_to_all_single":  # what is sent; the rank that sends most counts
                counted[name] += arguments[1].numel() * arguments[1].element_size()
                return found(*arguments, **options)
            tensors = [value for value in (*arguments, *options.values()) if isinstance(value, torch.Tensor)]
            counted[name] += max((tensor.numel() * tensor.element_size() for tensor in tensors), default=0)
            return found(*arguments, **options)
        return count
comm.cdb = Counting(comm.cdb)
from llm.training import muon
muon.dist = Counting(muon.dist)
ids, start = torch.randint(0, 500, (2, 64)), torch.zeros(2, 64, dtype=torch.int32)
for _ in range(2):
    counted.clear()
    for _ in range(2):
        engine.backward(dict(input_ids=ids, labels=ids, doc_start=start), 512)
    engine.update(1e-3)
counted["all_to_all_single"] = world.agree(counted["all_to_all_single"])
if world.rank == 0:
    names = ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "all_to_all_single")
    print(json.dumps({"config": json.dumps(tree), **{name: counted[name] for name in names}}))
"""

COUNT_SAME_BITS = """
import json, sys
import torch
from llm.config_file import parse_config
from llm.data.manifest import read_manifest
from llm.model.transformer import Transformer, initial_value
from llm.training import same_bits
from llm.training.engine import Engine, start

stage, precision = int(sys.argv[1]), "fp32"
shape = dict(n_layers=2, d_model=64, n_heads=2, n_kv_heads=2, d_ff=176, vocab_size=512, max_seq_len=64)
rates = dict(kind="adamw", lr=1e-3, embed_lr=1e-3, head_lr=1e-3, norm_lr=1e-3, beta2=0.95, weight_decay=0.1)
train = dict(precision=precision, device="cpu", global_batch_tokens=512, total_tokens=5120,
             same_bits=True, micro_batch=1)
tree = dict(model=shape, data=dict(path="none", seq_len=64), optimizer=rates, schedule=dict(warmup_tokens=0),
            train=train, deepspeed=dict(zero_stage=stage))
config = parse_config(tree, "count")
world = start(config)
engine = Engine(lambda: Transformer(config.model, compute_dtype=world.dtype), config, world, 1, 4)
for name in engine.parameters:
    engine.write_parameter(name, initial_value(config.model, name, 0))
exchange, sent = same_bits._exchange, []
def counted(out, received, other):
    sent.append(out.nbytes)
    exchange(out, received, other)
same_bits._exchange = counted
ids, start = torch.randint(0, 500, (1, 64)), torch.zeros(1, 64, dtype=torch.int32)
for _ in range(2):
    sent.clear()
    for _ in range(4):
        engine.backward(dict(input_ids=ids, labels=ids, doc_start=start), 512)
    engine.update(1e-3)
tree_sum = engine._same_bits._sum
held = [engine._same_bits._weights, tree_sum.current, *tree_sum._held, *tree_sum._spare]
moments = [value for state in engine.optimizer.state.values() for name, value in state.items() if name != "step"]
if world.rank == 0:
    print(json.dumps({"config": json.dumps(tree), "sent": sum(sent), "held": sum(one.nbytes for one in held),
                      "moments": sum(one.nbytes for one in moments)}))
"""
