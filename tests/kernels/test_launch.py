"""Between ops and kernels: tiles by architecture, launching, registration, and life without Triton."""

import subprocess
import sys

import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st
from machines import EXACT, Machine

import kernels
from kernels import launch
from llm.tools import step_trace

OPS = sorted(path.stem for path in launch.TILES.glob("*.json"))


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_100"),
        ((12, 1), "sm_120"),
        ((13, 0), "sm_86"),
    ],
)
def test_every_device_has_tiles_that_fit_it(
    capability: tuple[int, int], architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "capability", lambda device: capability)
    assert launch.architecture(torch.device("cuda")) == architecture


@pytest.mark.parametrize("op", OPS)
def test_tables_name_only_known_architectures_and_go_from_narrow_to_wide(op: str) -> None:
    for kernel in launch.kernels_of(op):
        for architecture in launch.ARCHITECTURES:
            rows = launch.rows(f"{op}.{kernel}", architecture)
            assert rows
            keys = [(row["bytes"], row["width"] or torch.inf, row["size"] or torch.inf) for row in rows]
            assert keys == sorted(keys), f"a row of {op}.{kernel} for {architecture} can never be taken"
            assert len(keys) == len(set(keys))
            assert {2, 4} <= {row["bytes"] for row in rows}
        assert set(launch.tables(op)[kernel]) <= {"*", *launch.ARCHITECTURES}


def test_the_first_row_that_covers_a_call_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"bytes": 2, "width": 64, "size": 128, "BLOCK": 16, "num_warps": 4},
        {"bytes": 2, "width": 64, "size": None, "BLOCK": 32, "num_warps": 4},
        {"bytes": 2, "width": 128, "size": None, "BLOCK": 64, "num_warps": 8},
    ]
    monkeypatch.setattr(launch, "tables", lambda op: {"k": {"*": rows, "sm_80": rows[2:]}})
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    x = torch.empty(0, dtype=torch.float16)
    assert launch.tile("op.k", x, 64, 128) == {"BLOCK": 16, "num_warps": 4}
    assert launch.tile("op.k", x, 48, 129)["BLOCK"] == 32
    assert launch.tile("op.k", x, 65, 1)["BLOCK"] == 64
    with pytest.raises(LookupError, match=r"no tile of op\.k on sm_90 for 2 bytes, width 129"):
        launch.tile("op.k", x, 129, 1)
    with pytest.raises(LookupError, match="for 4 bytes"):
        launch.tile("op.k", x.float(), 64, 1)
    with launch.force_tile("op.k", {"BLOCK": 1}):
        assert launch.tile("op.k", x, 64, 128) == {"BLOCK": 1}
    assert launch.tile("op.k", x, 64, 128)["BLOCK"] == 16
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_80")
    assert launch.tile("op.k", x, 64, 128)["BLOCK"] == 64


def test_a_tile_may_be_changed_by_who_asked_for_it() -> None:
    x = torch.empty(0, dtype=torch.float16)
    launch.tile("rms_norm.backward", x, 64, 1).clear()
    assert launch.tile("rms_norm.backward", x, 64, 1)


def test_an_empty_grid_is_nothing_to_do() -> None:
    launch.launch(None, (3, 0), torch.empty(0))


class SearchedKernel:
    """A kernel that counts how often Triton searches for its binary, and what the binary was launched with."""

    arg_names = ("out", "x", "n", "eps", "BLOCK", "ROWS")

    def __init__(self) -> None:
        self.searches = 0
        self.launches: list[tuple[tuple[int, ...], tuple[object, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]):
        def search(*args: object, enable_fp_fusion: bool, **meta: object) -> SearchedBinary:
            self.searches += 1
            return SearchedBinary(self)

        return search


class SearchedBinary:
    def __init__(self, kernel: SearchedKernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args: self.kernel.launches.append((grid, args))


X = torch.zeros(64)
ARGUMENTS = {"out": X, "x": X, "n": 32, "eps": 1e-6}
META = {"num_warps": 4, "ROWS": 2, "BLOCK": 16}


def bound_launch(kernel: SearchedKernel, arguments: dict[str, object], meta: dict[str, int]) -> None:
    launch._launch_bound(kernel, (7,), tuple(arguments.values()), meta)


def test_triton_searches_for_a_binary_once() -> None:
    """A binary's launcher takes three axes, and the constexpr values in the order of the signature."""
    kernel = SearchedKernel()
    for eps in (1e-6, 1e-5, 1e-5):  # Triton does not specialise floats
        bound_launch(kernel, ARGUMENTS | {"eps": eps}, META)
    assert kernel.searches == 1  # which launched, too
    assert kernel.launches == [((7, 1, 1), (X, X, 32, 1e-5, 16, 2))] * 2


@pytest.mark.parametrize(
    ("arguments", "meta"),
    [
        ({"x": X.half()}, {}),
        ({"x": X[1:]}, {}),  # 4 bytes past a multiple of 16
        ({"x": None}, {}),
        ({"n": 33}, {}),
        ({"n": 1}, {}),
        ({"n": 2**31}, {}),
        ({"eps": 1}, {}),
        ({}, {"BLOCK": 32}),
        ({}, {"num_warps": 8}),
        ({}, {"num_warps": 4, "num_stages": 2}),
    ],
    ids=str,
)
def test_another_specialisation_is_searched_for(arguments: dict[str, object], meta: dict[str, int]) -> None:
    kernel = SearchedKernel()
    bound_launch(kernel, ARGUMENTS, META)
    bound_launch(kernel, ARGUMENTS | arguments, META | meta)
    assert (kernel.searches, kernel.launches) == (2, [])
    other = SearchedKernel()
    bound_launch(other, ARGUMENTS, META)
    assert other.searches == 1


def test_bound_binaries_are_limited_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_bound", {})
    monkeypatch.setattr(launch, "BOUND", 3)
    kernel = SearchedKernel()
    for n in range(10):
        bound_launch(kernel, ARGUMENTS | {"n": n}, META)
        assert len(launch._bound) <= 3
    bound_launch(kernel, ARGUMENTS | {"n": 9}, META)
    assert kernel.searches == 10


@given(a=st.integers(0, 10**6), b=st.integers(1, 10**6))
def test_sizes_of_a_grid_are_those_of_triton(a: int, b: int) -> None:
    assert launch.cdiv(a, b) == triton.cdiv(a, b)
    assert launch.next_power_of_2(b) == triton.next_power_of_2(b)


def test_without_triton_the_others_compute_and_an_explicit_triton_says_why() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch, kernels
y = kernels.rms_norm(torch.ones(2, 4), torch.ones(4))
assert y.shape == (2, 4)
assert kernels.describe("cpu")["rms_norm"]["backend"] == "cpp"
try:
    kernels.rms_norm(torch.ones(2, 4), torch.ones(4), backend="triton")
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kernels.rms_norm: backend 'triton' cannot run here: " in done.stdout


@pytest.mark.parametrize("machine", EXACT)
def test_a_profiler_finds_our_kernels_in_eager_calls(machine: Machine) -> None:
    x = machine.randn(4, 16).requires_grad_()
    with torch.profiler.profile(acc_events=True) as profiler:
        kernels.swiglu(x, backend=machine.backend).sum().backward()
    events = profiler.events()
    ours = [event for event in events if event.name.startswith("llm::")]
    assert {event.name for event in ours} == {"llm::swiglu_forward", "llm::swiglu_backward"}
    assert not any(event.is_user_annotation for event in ours)  # to which torch traces no kernel back
    if machine.device == "cuda":
        assert step_trace.Attribution(events, on_device=True).our_kernels() > 0
