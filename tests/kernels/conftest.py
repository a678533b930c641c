"""Fixtures of the kernels' tests."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton.runtime.interpreter import TensorHandle

from kernels.launch import INTERPRETED


@pytest.fixture
def unwritten_is_nan() -> Iterator[None]:
    """New tensors begin as NaN: else what a kernel leaves out could still hold an earlier test's right values."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=INTERPRETED)
def what_the_compiler_is_told_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    """A false tl.multiple_of would be a wide load from a wrong address, which only a GPU shows."""
    trusted = TensorHandle.set_attr

    def checked(handle: TensorHandle, key: str, value: Any) -> None:
        if key == "tt.divisibility":
            assert (handle.data % value == 0).all(), f"{handle.data} is no multiple of {value}"
        trusted(handle, key, value)

    monkeypatch.setattr(TensorHandle, "set_attr", checked)
