"""A training step on the real CUDA builds: what it asks of the device, and the memory that it takes."""

import json
from functools import cache
from typing import Any

import pytest
import torch
from stub_gpu.counts import counting
from stub_gpu.steps import (
    CASES,
    COMMITTED,
    CUBLAS_WORKSPACES,
    DECODING,
    PARTS,
    SAVE_PARTS,
    SAVES,
    Case,
    Decoding,
    Save,
    count_apart,
)

pytestmark = [pytest.mark.stub_gpu, pytest.mark.slow]

TABLE = json.loads(COMMITTED.read_text("utf-8"))
SAME_VERSIONS = "torch {torch}, triton {triton}, deepspeed {deepspeed}".format(**TABLE["versions"])
found = cache(count_apart)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_launches_no_more_than_the_committed_table(case: Case) -> None:
    """Fewer are a gain: `python -m tests.stub_gpu --write` commits it."""
    committed, now = TABLE["training"][str(case)], found(case)
    for part in PARTS:
        for kind, number in numbers(now[part]).items():
            most = committed[part].get(kind, 0)
            assert number <= most, f"{part}: {number} x {kind}, committed: {most} ({SAME_VERSIONS})"
        assert "unknown" not in now[part]  # a call that the stub does not have


def numbers(part: dict[str, Any]) -> dict[str, int]:
    return {kind: value for kind, value in part.items() if isinstance(value, int)}


@pytest.mark.parametrize("case", [case for case in CASES if case.waits_once], ids=str)
def test_the_host_waits_once_a_step_and_never_in_a_micro_batch(case: Case) -> None:
    now = found(case)
    assert "wait" not in now["first micro-batch"]
    assert "wait" not in now["micro-batch"]
    assert now["update"]["wait"] == 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_allocators_peak_is_what_the_plan_says(case: Case) -> None:
    now = found(case)
    assert now["planned_bytes"] == pytest.approx(now["peak_bytes"] - CUBLAS_WORKSPACES, rel=0.01)


@pytest.mark.parametrize("case", DECODING, ids=str)
def test_a_token_needs_no_more_than_the_committed_table(case: Decoding) -> None:
    """A node is a kernel or a copy that the device starts by itself."""
    committed, now = TABLE["decoding"][str(case)], count_apart(case)
    assert int(now["graph"].split()[0]) <= int(committed["graph"].split()[0]), f"{now['graph']} ({SAME_VERSIONS})"
    for kind, number in numbers(now).items():
        assert number <= committed.get(kind, 0), f"{number} x {kind} ({SAME_VERSIONS})"
    assert (now["device_to_host"], now["wait"]) == (1, 1)


@pytest.mark.parametrize("case", SAVES, ids=str)
def test_the_host_waits_for_no_copy_of_a_save_and_the_next_update_for_one_event(case: Save) -> None:
    """Each wait of a save is one of DeepSpeed's, as it puts a partitioned tensor together."""
    now = count_apart(case)
    before, save, micro_batch, update, writer = (now[part] for part in SAVE_PARTS)
    assert save["device_to_host"] == now["tensors"]
    assert "device_to_pageable" not in save
    assert all("Engine._read" in where for where in save["where"]), save["where"]
    assert now["wrong"] == []
    if now["reads_in_place"]:
        # One event of the computing stream, for which the copies wait, and one of theirs.
        assert (save["launches"], save.get("wait", 0), save["record"], save["wait_on_device"]) == (0, 0, 2, 1)
        assert "wait" not in micro_batch
        assert update["wait"] == before["wait"] == 1
    assert update["wait_on_device"] == before["wait_on_device"] + 1
    assert (writer["wait"], [where.split(":")[0] for where in writer["where"]]) == (1, ["wait cudaEventSynchronize"])


def test_the_table_has_every_case() -> None:
    assert list(TABLE["training"]) == [str(case) for case in CASES]
    assert list(TABLE["decoding"]) == [str(case) for case in DECODING]


def test_the_stub_counts_launches_copies_and_waits() -> None:
    """What the other tests rely on."""
    x = torch.ones(1000, device="cuda")
    with counting() as counts:
        y = x + x
        host = torch.ones(1000).pin_memory()
        host.copy_(y, non_blocking=True)
        assert float(y[0]) == 0  # a kernel computes nothing
        _ = x.cpu()
    assert counts.launches == 1
    assert counts.number("device_to_host", "device_to_pageable") == 3
    assert counts.number("device_to_pageable") == 1  # `float` has pinned memory of its own
    assert counts.number("wait") >= 2
    assert counts.where.total() == counts.number("wait", "device_to_pageable")
