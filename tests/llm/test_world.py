"""Errors that concern all ranks of a run, or its devices."""

from pathlib import Path

import pytest
import torch
from running import small_config

import kernels
from kernels import dispatch
from llm.config_file import parse_config
from llm.errors import ReportedByRank0, UserError, exit_code
from llm.world import World, device_name, oom_as_user_error, pick_dtype


def test_what_fails_on_rank_0_ends_the_others_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise UserError("no such file")

    monkeypatch.setattr(World, "broadcast", lambda self, value: (None, False))  # what rank 0 sends when it fails
    codes = []
    for rank in (0, 1):
        world = World(rank, rank, 2, torch.device("cpu"), torch.float32)
        codes.append(exit_code(lambda world=world: world.first_rank_only(fail)))
    assert codes == [1, 1]
    assert capsys.readouterr().err == "error: no such file\n"
    with pytest.raises(ReportedByRank0):
        world.first_rank_only(fail)


def test_ranks_wait_for_a_work_of_one_without_a_long_collective_and_share_its_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llm.world.POLL_SECONDS", 0)
    others = iter([1, 1, 0, 0, 2])  # the states of the other rank
    monkeypatch.setattr(World, "agree", lambda self, state: max(state, next(others)))
    world = World(1, 1, 2, torch.device("cpu"), torch.float32)
    mine = iter([False, True, False, True])
    world.wait_for_all(lambda: next(mine))  # all are done at the fourth exchange
    with pytest.raises(ReportedByRank0):
        world.wait_for_all(lambda: True)
    monkeypatch.undo()

    def fail() -> bool:
        raise UserError("no room")

    with pytest.raises(UserError, match="no room"):
        World(0, 0, 1, torch.device("cpu"), torch.float32).wait_for_all(fail)


def test_a_gpus_full_memory_is_one_line_with_the_way_out() -> None:
    with pytest.raises(UserError) as caught, oom_as_user_error("lower --batch_size"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore.")
    expected = "the GPU's memory is full; lower --batch_size (CUDA out of memory. Tried to allocate 9 GiB.)"
    assert str(caught.value) == expected


def test_a_processor_has_its_model_and_the_cores_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3}, raising=False)
    text = "processor : 0\nmodel name\t: Some CPU @ 2 GHz\nprocessor : 1\nmodel name\t: Some CPU @ 2 GHz\n"
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_, **__: text)
    assert device_name(torch.device("cpu")) == "Some CPU @ 2 GHz, 1 core"
    # Linux on ARM lists no model.
    text = "processor : 0\n"
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert device_name(torch.device("cpu")) == "aarch64, 1 core"


@pytest.mark.parametrize(
    ("gpu", "bf16", "capability", "stage", "expected"),
    [
        ("T4", False, (7, 5), 1, torch.float16),
        ("T4 without a scaled loss", False, (7, 5), 0, torch.float32),
        ("P100", False, (6, 0), 1, torch.float32),
        ("RTX 3090", True, (8, 6), 1, torch.bfloat16),
    ],
)
def test_auto_is_the_precision_that_a_gpu_multiplies_fast(monkeypatch, gpu, bf16, capability, stage, expected) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    device = torch.device("cuda", 7)  # none that another test has asked for
    tree = small_config(Path("shards"), Path("run"), train__precision="auto", deepspeed__zero_stage=stage)
    assert pick_dtype(parse_config(tree, "test"), device) == expected
    dispatch.capability.cache_clear()
    (chosen,) = {op["backend"] for op in kernels.describe(device).values()}
    assert chosen == ("triton" if bf16 else "torch")
    if not bf16:
        reason = kernels.describe(device)["attention"]["reason"]
        assert f"compute capability 8.0, and {gpu} has {capability[0]}.{capability[1]}" in reason
    dispatch.capability.cache_clear()
