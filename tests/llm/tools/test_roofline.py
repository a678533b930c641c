"""The roofline of a training step: laws of its arithmetic, and its error against measured steps."""

import json
from pathlib import Path

import pytest
import torch

from llm.config import Config
from llm.config_file import load_config
from llm.hardware import known, named
from llm.tools import roofline
from llm.tools.roofline import Rates, nominal_rates, passes_work, seconds, update_work
from llm.training.resolve import resolve

BF16 = torch.bfloat16
H200 = Path(__file__).parents[3] / "benchmarks" / "results" / "nvidia-h200"


def config(name: str = "125m", **changes: object) -> Config:
    asked = load_config(f"configs/{name}.json", ["model.vocab_size=32000", *(f"{k}={v}" for k, v in changes.items())])
    return resolve(asked, None)[0]


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_no_op_is_faster_than_its_bytes_and_its_products(kind, checkpointing):
    model, limits = config(**{"optimizer.kind": kind}), Rates(1e14, 1e12)
    works = passes_work(model, 4, BF16, checkpointing) | update_work(model, 1, BF16)
    times = {key: max(roofline.op_seconds(*key, work, limits).values()) for key, work in works.items()}
    for key, work in works.items():
        assert times[key] >= work.seconds(limits.copy, limits.products) > 0, key
    assert sum(times.values()) < seconds(works, limits)
    # Twice the rates take half the time, and one of them alone no more than both.
    half = seconds(works, Rates(2e14, 2e12))
    assert half == pytest.approx(seconds(works, limits) / 2)
    assert half < seconds(works, Rates(2e14, 1e12)) < seconds(works, limits)


def test_a_small_micro_batch_takes_longer_for_each_sequence():
    """It reads the weights as often."""
    limits, model = nominal_rates(named("H200"))[0], config()
    per_sequence = [seconds(passes_work(model, size, BF16), limits) / size for size in (1, 2, 4, 8)]
    assert per_sequence == sorted(per_sequence, reverse=True)


def test_recomputing_adds_time_and_full_at_most_the_forward_pass():
    limits, model = nominal_rates(named("H200"))[0], config()
    works = passes_work(model, 8, BF16)
    none, selective, full = (
        seconds(passes_work(model, 8, BF16, name), limits) for name in ("none", "selective", "full")
    )
    forward = seconds({key: work for key, work in works.items() if key[0] == "forward"}, limits)
    assert none < selective < full < none + forward


def test_a_window_leaves_less_attention():
    whole, windowed = config(), config(**{"model.sliding_window": 512})
    limits = Rates(1e14, 1e12)
    assert seconds(passes_work(windowed, 1, BF16), limits) < seconds(passes_work(whole, 1, BF16), limits)
    pairs = sum(min(position + 1, 512) for position in range(2048))
    flops = passes_work(windowed, 1, BF16)["forward", "attention"].flops
    assert flops == 12 * 4 * 768 * pairs


def test_processes_share_the_update():
    for kind in ("muon", "adamw"):
        model = config(**{"optimizer.kind": kind, "deepspeed.zero_stage": 1})
        one, eight = (seconds(update_work(model, count, BF16), Rates(1e14, 1e12)) for count in (1, 8))
        assert eight < one / 6


def test_every_share_is_of_an_op_that_a_step_has():
    """A renamed op would silently get the share of others."""
    model = config()
    works = passes_work(model, 1, BF16) | update_work(model, 1, BF16)
    assert set(roofline.PRODUCT_SHARES) == {key for key, work in works.items() if work.flops}
    assert set(roofline.COPY_SHARES) <= set(works)
    assert set(roofline.MEASURED) <= {hardware.name for hardware in known()}
    for share in (
        *roofline.PRODUCT_SHARES.values(),
        *roofline.COPY_SHARES.values(),
        roofline.OTHER_COPY,
        roofline.BUSY,
    ):
        assert 0 < share <= 1


@pytest.mark.parametrize(("name", "micro_batch", "result"), [("125m", 16, "train-125m"), ("1.3b", 8, "train-1.3b")])
def test_it_is_within_15_percent_of_the_steps_that_an_h200_measured(name, micro_batch, result):
    measured = json.loads((H200 / f"{result}.json").read_text())
    tokens = micro_batch * measured["seq_len"]
    assert measured["micro_batch"] == micro_batch
    model, limits = config(name), nominal_rates(named("H200"))[0]
    step = measured["accumulation"] * seconds(passes_work(model, micro_batch, BF16), limits)
    step += seconds(update_work(model, 1, BF16), limits)
    assert measured["accumulation"] * tokens / step == pytest.approx(measured["tokens_per_second"], rel=0.15)


def test_the_shares_are_those_of_the_profile():
    profile = json.loads((H200 / "profile-125m.json").read_text())
    reached = {(row["phase"], row["kind"]): row["least_ms"] / row["ms"] for row in profile["work"] if row["least_ms"]}
    for phase in ("forward", "backward"):
        for op in ("matmul", "attention"):
            assert roofline.PRODUCT_SHARES[phase, op] == pytest.approx(reached[phase, op], abs=0.01)
    assert roofline.COPY_SHARES["backward", "add_rms_norm"] == pytest.approx(reached["backward", "norm"], abs=0.01)
    kernels = sum(row["ms"] for row in profile["work"])
    assert pytest.approx(kernels / profile["step_ms"], abs=0.01) == roofline.BUSY
