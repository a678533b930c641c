"""The ahead-of-time gate: what the compiler makes of shipped kernels fits the hardware, and changes only in sight."""

import json

import pytest
import triton

from benchmarks import aot
from kernels import launch

GOLDEN = json.loads(aot.GOLDEN.read_text())


def assert_ships(architecture: str, op: str, calls: list[tuple[int, int, int]]) -> None:
    for name, binary in aot.binaries(architecture, op, calls).items():
        assert not binary.faults(architecture), f"{architecture} {name}: {binary.faults(architecture)}"
        if triton.__version__ == GOLDEN["triton"]:  # another compiler makes other binaries
            golden = GOLDEN["binaries"][architecture].get(name)
            assert binary.facts() == golden, f"{architecture} {name} changed: `python -m benchmarks.aot --write`"


def test_every_op_with_tiles_is_gated() -> None:
    assert set(aot.OPS) == {path.stem for path in launch.TILES.glob("*.json")}
    assert set(GOLDEN["binaries"]) == set(launch.ARCHITECTURES)


def test_nothing_golden_spills_or_overflows() -> None:
    for architecture, found in GOLDEN["binaries"].items():
        for name, facts in found.items():
            binary = aot.Binary(kernel="", tile="", dtype="", **facts)
            assert not binary.faults(architecture), f"{architecture} {name}: {binary.faults(architecture)}"


@pytest.mark.parametrize("op", aot.OPS)
def test_kernels_of_a_usual_call_ship_for_sm_90(op: str) -> None:
    _, width, size = aot.OPS[op]
    assert_ships("sm_90", op, [(2, width, size)])


@pytest.mark.slow
@pytest.mark.parametrize("op", aot.OPS)
@pytest.mark.parametrize("architecture", launch.ARCHITECTURES)
def test_every_shipped_kernel_ships(architecture: str, op: str) -> None:
    assert_ships(architecture, op, aot.calls_of(op, architecture))


def test_a_kernel_that_spills_or_overflows_is_found() -> None:
    facts = {"kernel": "k", "tile": "", "dtype": "bfloat16", "registers": 255, "spilled": 8, "shared": 101 * 1024}
    binary = aot.Binary(**facts, warps=16)
    assert len(binary.faults("sm_86")) == 3
    assert len(binary.faults("sm_90")) == 2
