"""Errors that concern all ranks of a run, or its devices."""

import pytest
import torch

from llm.errors import ReportedByRank0, UserError, exit_code
from llm.world import World, device_name, oom_as_user_error


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
