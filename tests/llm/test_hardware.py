"""hardware.json: every device is found by its name, and its values are possible."""

import pytest

from llm.errors import UserError
from llm.hardware import known, named, recognised


def test_a_name_is_found_in_any_case() -> None:
    for hardware in known():
        assert named(hardware.name.lower()) is hardware
        assert recognised(f"NVIDIA {hardware.name} 24GB") is hardware
    with pytest.raises(UserError, match=r"choose from T4, A100, .*H200"):
        named("Banana")


def test_the_values_are_possible() -> None:
    for hardware in known():
        assert hardware.source
        # Products of large matrices are bound by computation, and the own memory is faster than the link.
        assert 30 < hardware.tflops * 1e3 / hardware.bandwidth_gbs < 600
        assert hardware.host_gbs <= hardware.link_gbs < hardware.bandwidth_gbs
        assert hardware.triton >= hardware.bf16
