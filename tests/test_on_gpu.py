"""What only a GPU can show: ops against their references in bf16, and training, killed and resumed, on the device."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from running import read_losses, small_config
from torch.func import functional_call

import kernels
from kernels import parity, reference
from llm.config import ActivationCheckpointing, ModelConfig
from llm.errors import STOPPED
from llm.model.transformer import Transformer

pytestmark = pytest.mark.gpu

Llm = Callable[..., tuple[int, str, str]]


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_ops_agree_with_their_references(dtype: torch.dtype) -> None:
    rows, width, vocab = 384, 256, 1000
    doc_start = torch.tensor([[0] * 100 + [100] * 156, [0] * 255 + [255]], dtype=torch.int32, device="cuda")
    target = torch.arange(rows, device="cuda") * 7 % vocab
    target[::5] = -100
    cases = {
        "attention": (
            partial(kernels.attention, doc_start=doc_start),
            partial(reference.attention, doc_start=doc_start),
            [normal(2, 256, heads, 64, dtype=dtype) for heads in (6, 2, 2)],
            {},
        ),
        "rms_norm": (
            kernels.rms_norm,
            reference.rms_norm,
            [normal(rows, width, dtype=dtype), normal(width, dtype=dtype)],
            {"gradient 1": rows},
        ),
        "swiglu": (kernels.swiglu, reference.swiglu, [normal(rows, 2 * width, dtype=dtype)], {}),
        "linear_cross_entropy": (
            lambda x, weight: kernels.linear_cross_entropy(x, weight, target, reduction="sum"),
            lambda x, weight, **upcast: reference.linear_cross_entropy(x, weight, target, reduction="sum", **upcast),
            [normal(rows, width, dtype=dtype) / width**0.5, normal(vocab, width, dtype=dtype)],
            {"output 0": rows, "gradient 1": rows},
        ),
    }
    failed = [
        (op, result)
        for op, (function, reference, inputs, summed) in cases.items()
        for result in parity.check(function, reference, inputs, rows=summed)
        if not result.agrees
    ]
    assert not failed


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_add_gradients_that_are_nearer_to_fp32_than_autograds(
    dtype: torch.dtype, checkpointing: ActivationCheckpointing
) -> None:
    """Of fp32 weights after three micro-batches, in two steps with other weights."""
    shape = {"n_layers": 2, "d_model": 256, "n_heads": 4, "n_kv_heads": 2, "d_ff": 384, "vocab_size": 1000}
    kinds = {"max_seq_len": 256, "qk_norm": True, "attention_bias": "qkvo"}
    config = ModelConfig.model_validate(shape | kinds)
    batches = [torch.arange(i, i + 512).mul(i).remainder(1000).view(2, 256).to("cuda") for i in (3, 7, 11)]

    exact, plain, ours = models = (
        Transformer(config),
        Transformer(config, compute_dtype=dtype),
        Transformer(config, compute_dtype=dtype, activation_checkpointing=checkpointing),
    )
    for model in models:
        model.init_weights(0)
        model.to("cuda")
    masters = ours.master_weights()
    assert len(masters.weights) == len(list(ours.parameters())) - 1  # not the embedding
    for _ in range(2):
        for ids in batches:
            exact(ids, labels=ids).backward()
            # Of 16-bit weights, whose gradients autograd widens and adds.
            rounded = {name: p.to(dtype) for name, p in plain.named_parameters() if "embed" not in name}
            expected = functional_call(plain, rounded, (ids,), {"labels": ids})
            expected.backward()
            with masters:
                loss = ours(ids, labels=ids)
                torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
                loss.backward()
        for (name, p), q, r in zip(ours.named_parameters(), plain.parameters(), exact.parameters(), strict=True):
            error, of_plain = ((x.grad - r.grad).norm() / r.grad.norm() for x in (p, q))
            assert (p.grad - q.grad).norm() <= torch.finfo(dtype).eps * q.grad.norm(), name
            assert error <= 1.1 * of_plain, name
        for model in models:
            model.zero_grad()
            for p in model.parameters():
                p.data.mul_(0.9)
        masters.changed()


@pytest.fixture
def train(llm_here: Llm, small_shards: Path, tmp_path: Path) -> Callable[..., list[float]]:
    """train(name, *overrides): the losses of a run of twenty steps, or of what is left of it."""
    pytest.importorskip("deepspeed")

    def call(name: str, *overrides: str) -> list[float]:
        changes = {"train__device": "cuda", "train__total_tokens": 20 * 512, "checkpoint__every_steps": 8}
        (tmp_path / "config.json").write_text(json.dumps(small_config(small_shards, tmp_path / name, **changes)))
        code, _, err = llm_here("train", "--config", tmp_path / "config.json", *overrides)
        assert code == (STOPPED if STOP in overrides else 0), err
        return read_losses(tmp_path / name)

    return call


# The schedule looks ahead to the horizon, so a stop is by the clock, after the first step.
STOP = "train.max_minutes=1e-9"


def test_stages_agree_and_a_resume_changes_no_bit(train: Callable[..., list[float]]) -> None:
    expected = train("fp32-1")
    for stage in (0, 2, 3):
        losses = train(f"fp32-{stage}", f"deepspeed.zero_stage={stage}")
        assert losses == pytest.approx(expected, rel=0, abs=1e-5)
    for precision, stage in (("bf16", 0), ("bf16", 1), ("bf16", 2), ("bf16", 3), ("fp16", 1), ("fp16", 2), ("fp16", 3)):
        settings = [f"train.precision={precision}", f"deepspeed.zero_stage={stage}"]
        whole = train(f"{precision}-{stage}", *settings)
        assert whole == pytest.approx(expected, rel=0, abs=0.05)
        train(f"stopped-{precision}-{stage}", *settings, STOP)
        assert train(f"stopped-{precision}-{stage}", *settings) == whole


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_optimizer_on_the_host_computes_the_same(train: Callable[..., list[float]], stage: int) -> None:
    """From the start, and in a run that moves there or back."""
    device = ["train.precision=bf16", f"deepspeed.zero_stage={stage}"]
    host = [*device, "deepspeed.offload=cpu"]
    expected = train("device", *device)
    assert train("host", *host) == pytest.approx(expected, rel=0, abs=1e-3)
    for name, first, then in (("there", device, host), ("back", host, device)):
        train(name, *first, STOP)
        assert train(name, *then) == pytest.approx(expected, rel=0, abs=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_muon_learns_and_is_resumed_bit_for_bit(train: Callable[..., list[float]], precision: str) -> None:
    settings = [f"train.precision={precision}", "optimizer.kind=muon", "deepspeed.zero_stage=0"]
    whole = train("whole", *settings)
    assert whole[-1] < whole[0] - 0.2
    train("stopped", *settings, STOP)
    assert train("stopped", *settings) == whole
