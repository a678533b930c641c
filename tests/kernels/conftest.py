"""Fixtures of the kernels' tests."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def unwritten_is_nan() -> Iterator[None]:
    """New tensors begin as NaN: else what a kernel leaves out could still hold an earlier test's right values."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
