"""The datasheet values of devices, from hardware.json."""

import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from llm.errors import UserError


@dataclass(frozen=True)
class Hardware:
    """A kind of GPU."""

    name: str
    tflops: float
    """Dense half-precision products with fp32 sums, in 10^12 FLOP/s."""
    memory_gb: float
    bandwidth_gbs: float
    """Of its memory, in 10^9 bytes/s."""
    link: str
    link_gbs: float
    """To another device of the same machine, in 10^9 bytes/s, one direction."""
    host_link: str
    host_gbs: float
    """To the host's memory, likewise."""
    bf16: bool
    """False: it has fp16 alone."""
    triton: bool
    """False: too old for the Triton kernels; the reference implementations run."""
    source: str

    @property
    def flops(self) -> float:
        return 1e12 * self.tflops


@cache
def known() -> tuple[Hardware, ...]:
    """Returns all devices of hardware.json."""
    devices = json.loads((files("llm") / "hardware.json").read_text("utf-8"))["devices"]
    return tuple(Hardware(name, **values) for name, values in devices.items())


def named(name: str) -> Hardware:
    """Returns the device of this name, in any case. Raises UserError if there is none."""
    for hardware in known():
        if hardware.name.lower() == name.lower():
            return hardware
    names = ", ".join(hardware.name for hardware in known())
    raise UserError(f"--device {name}: no datasheet peak is known for it; choose from {names}")


def recognised(device_name: str) -> Hardware | None:
    """Returns the device that the driver calls so ("NVIDIA H100 80GB HBM3"); None if it is not known."""
    # Longer names first, because "H100 PCIe" contains "H100"; whole words, because "GH200" contains "H200".
    for hardware in sorted(known(), key=lambda hardware: -len(hardware.name)):
        if re.search(rf"\b{re.escape(hardware.name)}\b", device_name):
            return hardware
    return None
