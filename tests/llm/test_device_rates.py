import pytest
import torch

from llm.device_rates import measure_matmul_flops, peak_flops, peak_memory_bytes


def test_a_cpu_has_no_datasheet_peak_and_a_measured_matmul_rate() -> None:
    cpu = torch.device("cpu")
    assert peak_flops(cpu) is None
    assert 1e8 < measure_matmul_flops(cpu, torch.float32, seconds=0.01) < 1e14
    assert peak_memory_bytes(cpu) > 10_000_000


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", None),  # begins as the one before, and is not in the table
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_datasheet_peak_is_found_by_the_devices_name(
    name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak
