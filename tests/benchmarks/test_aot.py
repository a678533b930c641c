"""The ahead-of-time gate: what the compiler makes of shipped kernels fits the hardware, and changes only in sight."""

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import tritons
from running import REPOSITORY

import kernels
from benchmarks import aot
from kernels import launch

ALL_GOLDEN = {path.stem: json.loads(path.read_text())["binaries"] for path in aot.GOLDEN.parent.glob("*.json")}
GOLDEN = ALL_GOLDEN.get(triton.__version__)
PINNED = re.search(r"^triton==(\S+)", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)[1]  # type: ignore[index]


def assert_ships(architecture: str, op: str, calls: list[aot.Call]) -> set[str]:
    """Asserts that what these calls compile may ship and is what the golden file says; returns its names."""
    found = aot.binaries(architecture, op, calls)
    for binary in found:
        assert not binary.faults(architecture), f"{architecture} {binary.name}: {binary.faults(architecture)}"
        if GOLDEN is not None and architecture in GOLDEN:
            golden = GOLDEN[architecture].get(binary.name)
            assert binary.facts() == golden, f"{architecture} {binary.name} changed: `python -m benchmarks.aot --write`"
    return {binary.name for binary in found}


def test_the_pinned_and_the_outermost_versions_have_golden_files() -> None:
    assert set(ALL_GOLDEN) == {PINNED, *tritons.VERSIONS}


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["aot", *arguments])
    return aot.main()


def test_every_kernel_with_tiles_is_gated() -> None:
    assert set(aot.OPS) == {path.stem for path in launch.TILES.glob("*.json")}
    assert set(ALL_GOLDEN[PINNED]) == set(launch.ARCHITECTURES)
    for op, gated in aot.OPS.items():
        assert set(gated.variants) == set(launch.kernels_of(op))
        assert all(n > 0 for n in gated.variants.values())


@pytest.mark.parametrize("version", ALL_GOLDEN)
def test_nothing_golden_spills_or_overflows(version: str) -> None:
    assert ALL_GOLDEN[version].keys() >= set(tritons.ARCHITECTURES)
    for architecture, found in ALL_GOLDEN[version].items():
        assert found
        for name, facts in found.items():
            binary = aot.Binary(kernel="", tile="", dtype="", **facts)
            assert not binary.faults(architecture), f"{architecture} {name}: {binary.faults(architecture)}"


@pytest.mark.parametrize("op", aot.OPS)
def test_kernels_of_a_usual_call_ship_for_sm_90(op: str) -> None:
    assert assert_ships("sm_90", op, [(2, aot.OPS[op].width, aot.OPS[op].size)])


@pytest.mark.slow
@pytest.mark.parametrize("op", aot.OPS)
@pytest.mark.parametrize("architecture", launch.ARCHITECTURES)
def test_every_shipped_kernel_ships(architecture: str, op: str) -> None:
    """aot.binaries holds the number of binaries to the tables: the kernels' variants for each row and dtype."""
    names = assert_ships(architecture, op, aot.calls_of(op, architecture))
    if GOLDEN is not None and architecture in GOLDEN:
        assert names == aot.names_of(op, GOLDEN[architecture])


@pytest.mark.parametrize("architecture", launch.ARCHITECTURES)
def test_calls_take_every_row_of_every_table(architecture: str) -> None:
    for op in aot.OPS:
        calls = aot.calls_of(op, architecture)
        for kernel in (f"{op}.{name}" for name in launch.kernels_of(op)):
            taken = [launch.row_of(kernel, architecture, *call) for call in calls]
            assert all(row in taken for row in launch.rows(kernel, architecture))


def test_a_row_that_no_call_takes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = launch.rows("swiglu.forward", "sm_90")
    monkeypatch.setattr(launch, "rows", lambda *_: [*shipped, shipped[0] | {"width": 64}])
    with pytest.raises(aot.Incomplete, match=r"swiglu\.forward on sm_90: an earlier row covers .*'width': 64"):
        aot.calls_of("swiglu", "sm_90")


# The launchers of a decoding step are no ops of torch, so they have no fakes that could replace them.
@pytest.mark.parametrize("op", [op for op in aot.OPS if op not in ("cached_attention", "sampling")])
def test_an_op_without_a_binary_is_an_error(
    op: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when meta tensors went to the ops' fakes: nothing was launched, and nothing was wrong."""
    monkeypatch.setattr(launch, "launch_on_meta", nullcontext)
    assert run_main(monkeypatch, "--architecture", "sm_90", "--op", op) == 1
    assert capsys.readouterr().err == f"error: {op} on sm_90: no binary; its launchers did not run\n"


def forward_alone(dtype: torch.dtype, width: int, size: int) -> None:
    x, weight = (aot.empty(*shape, dtype=dtype) for shape in ((size, width), (width,)))
    kernels.rms_norm(x, weight, backend="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"call": forward_alone}, r"rms_norm\.backward on sm_90: 0 binaries instead of 2"),
        ({"variants": {"forward": 1, "backward": 2}}, r"rms_norm\.forward on sm_90: 2 binaries instead of 1"),
        ({"variants": {"forward": 2, "backward": 3}}, r"rms_norm\.backward on sm_90: 2 binaries instead of 3"),
    ],
)
def test_another_number_of_binaries_than_of_the_table_is_an_error(
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(aot.OPS, "rms_norm", replace(aot.OPS["rms_norm"], **change))
    with pytest.raises(aot.Incomplete, match=f"{message} for 2 bytes, width 768, size 4096"):
        aot.binaries("sm_90", "rms_norm", [(2, 768, 4096)])


def test_a_tile_that_spills_is_found() -> None:
    """256 values of each input a thread, which has 255 registers at most."""
    with launch.force_tile("swiglu.forward", {"ROWS": 4, "BLOCK_F": 2048, "num_warps": 1}):
        found = aot.binaries("sm_90", "swiglu", [(2, 2048, 4096)])
    backward, forward = found
    assert (backward.kernel, forward.kernel) == ("_swiglu_backward_kernel", "_swiglu_forward_kernel")
    assert [fault.split()[0] for fault in forward.faults("sm_90")] == ["spills"]
    assert not backward.faults("sm_90")


def test_a_golden_binary_that_nothing_compiles_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(aot, "binaries", lambda *_: [])
    assert run_main(monkeypatch, "--architecture", "sm_90", "--op", "swiglu") == 1
    assert capsys.readouterr().out.count(" is gone\n") == len(
        aot.names_of("swiglu", ALL_GOLDEN[triton.__version__]["sm_90"])
    )


def test_binaries_of_one_name_are_told_apart_in_any_order() -> None:
    two = [aot.Binary("_k", "BLOCK=16", "float32", registers, 0, 0, 4) for registers in (136, 133)]
    for order in (two, two[::-1]):
        names = {binary.name: binary.registers for binary in aot.numbered(order)}
        assert names == {"_k[float32 BLOCK=16]": 133, "_k[float32 BLOCK=16] 2": 136}


def test_meta_tensors_are_launched_inside_the_gate_alone() -> None:
    x, weight = (aot.empty(*shape, dtype=torch.bfloat16) for shape in ((4, 64), (64,)))
    for _ in range(2):
        assert kernels.rms_norm(x, weight, backend="triton").shape == x.shape  # there is no device to launch on
        with aot.compiling("sm_90") as compiled:
            kernels.rms_norm(x, weight, backend="triton")
        assert [each.kernel for each in compiled] == ["rms_norm.forward"]


def test_a_kernel_that_spills_or_overflows_is_found() -> None:
    facts: dict[str, Any] = {
        "kernel": "k",
        "tile": "",
        "dtype": "bfloat16",
        "registers": 255,
        "spilled": 8,
        "shared": 101 * 1024,
    }
    binary = aot.Binary(**facts, warps=16)
    assert len(binary.faults("sm_86")) == 3
    assert len(binary.faults("sm_90")) == 2
