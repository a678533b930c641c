"""What `llm doctor` checks on one machine: GPU, Triton, rates, limits, shared and free memory."""

import os
import resource
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import kernels
from kernels import reference
from kernels.dispatch import device_obstacle
from llm import device_rates
from llm.hardware import Hardware, recognised

SHM = Path("/dev/shm")
SHM_BYTES = 2**30
"""NCCL's processes of a machine meet there, and need tens of MB for each pair; a container has 64 MiB by default."""
OPEN_FILES = 1024
FILES_A_PROCESS = 16
"""A process opens a few sockets to each other one."""
MEMORY_BYTES = 2 * 2**30
WINDOWS = 8
COOLED, COPY_PEAK, MATMUL_PEAK = 0.85, 0.7, 0.5
"""Warnings: the rate of the last seconds against the first ones; a rate against the datasheet's."""
# NVML's nvmlClocksThrottleReason: the hardware's slowdown, heat (software and hardware), and the power brake.
THROTTLED = {0x8: "hardware slowdown", 0x20: "heat", 0x40: "heat, by hardware", 0x80: "power brake"}
SMI_FIELDS = (
    "driver_version",
    "ecc.mode.current",
    "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.pending",
    "clocks_throttle_reasons.active",
    "temperature.gpu",
)


@dataclass(frozen=True)
class Finding:
    """What a check has found. mend: what to do about it."""

    part: str
    text: str
    level: Literal["fine", "warning", "wrong"] = "fine"
    """wrong: it stops training here, or falsifies it."""
    mend: str = ""

    def lines(self, ranks: str = "") -> Iterator[str]:
        """ranks: whose finding it is, if not everybody's."""
        mark = {"fine": "", "warning": "WARNING: ", "wrong": "WRONG: "}[self.level]
        yield f"{self.part:<11} {mark}{ranks}{self.text}"
        if self.mend:
            yield f"{'':<11} mend: {self.mend}"


@dataclass(frozen=True)
class Rates:
    """Mean FLOP/s and bytes/s (read plus written) of a device while it is busy. cooled: last seconds against first."""

    matmul_flops: float
    copy_bytes: float
    cooled: float


def check_limits(processes: int) -> Iterator[Finding]:
    """processes: of the run; each has connections to others."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = max(OPEN_FILES, FILES_A_PROCESS * processes)
    text = f"open files: {_limit(files)}"
    if files != resource.RLIM_INFINITY and files < needed:
        yield Finding("limits", f"{text}, below {needed:,}", "warning", "ulimit -n 65536 before the launcher starts")
    else:
        yield Finding("limits", text)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    infiniband = any(Path("/sys/class/infiniband").glob("*"))
    text = f"locked memory: {_limit(locked, 'KiB', 1024)}"
    if infiniband and locked != resource.RLIM_INFINITY:
        mend = "ulimit -l unlimited (in a container: --ulimit memlock=-1); InfiniBand registers its buffers"
        yield Finding("limits", text, "warning", mend)
    else:
        yield Finding("limits", text + ("" if infiniband else " (it matters for InfiniBand, which is not here)"))


def _limit(value: int, unit: str = "", size: int = 1) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value // size:,} {unit}".strip()


def check_memory() -> tuple[dict[str, float], list[Finding]]:
    """Returns the free bytes of the host's memory and of /dev/shm, and what they mean."""
    memory = free_memory()
    text = f"{memory / 2**30:.1f} GiB free"
    low = memory < MEMORY_BYTES
    mend = "end other programs, or raise the container's limit; the system kills a process that takes more"
    findings = [Finding("memory", text, "warning", mend) if low else Finding("memory", text)]
    if not SHM.exists():
        return {"memory": memory}, [*findings, Finding("shm", f"{SHM} is not there", "warning")]
    usage = shutil.disk_usage(SHM)
    text = f"{SHM}: {usage.free / 2**20:,.0f} of {usage.total / 2**20:,.0f} MiB free"
    if usage.free < SHM_BYTES:
        mend = (
            "docker run --shm-size=8g (or --ipc=host); else mount -o remount,size=8G /dev/shm; delete old files there"
        )
        findings.append(Finding("shm", f"{text}; NCCL may fail with a bus error", "warning", mend))
    else:
        findings.append(Finding("shm", text))
    return {"memory": memory, "shm": usage.free}, findings


def free_memory() -> float:
    """Returns the bytes that this process can still take: of the system and of its control group."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        free = next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        group = Path("/sys/fs/cgroup")
        try:
            free = min(free, float((group / limit).read_text()) - float((group / used).read_text()))
        except (OSError, ValueError):  # none, or "max"
            continue
    return free


def check_gpu(device: torch.device) -> Iterator[Finding]:
    """Driver, ECC, throttling and Triton's compiler."""
    if device.type != "cuda":
        yield Finding("gpu", "none: training runs on the CPU", "warning")
        return
    yield Finding("cuda", f"torch is built for CUDA {torch.version.cuda}")
    yield from check_nvidia_smi(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    yield check_triton(device)


def check_nvidia_smi(uuid: str) -> Iterator[Finding]:
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits", f"--id={uuid}"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        found = dict(zip(SMI_FIELDS, map(str.strip, told.splitlines()[0].split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        yield Finding("ecc", "nvidia-smi does not tell: driver, ECC and heat are unknown", "warning")
        return
    yield Finding("driver", f"{found['driver_version']}, {found['temperature.gpu']} degrees Celsius")
    errors = found["ecc.errors.uncorrected.volatile.total"]
    reset = "drain the node, then nvidia-smi --gpu-reset or reboot; if it comes back, have the GPU replaced"
    if errors.isdecimal() and int(errors):
        yield Finding("ecc", f"{errors} uncorrected memory errors since the driver started", "wrong", reset)
    elif found["remapped_rows.pending"].lower() in ("yes", "1"):
        yield Finding("ecc", "a row of the memory waits to be replaced", "wrong", reset)
    elif found["ecc.mode.current"] == "Disabled":
        yield Finding("ecc", "off: errors of the memory stay unseen", "warning", "nvidia-smi -e 1, then reboot")
    else:
        yield Finding(
            "ecc", f"{found['ecc.mode.current']}, no uncorrected errors" if errors.isdecimal() else "none here"
        )
    active = found["clocks_throttle_reasons.active"]
    bits = int(active, 16) if active.startswith("0x") else 0
    if reasons := [reason for bit, reason in THROTTLED.items() if bits & bit]:
        mend = "look at cooling and power: nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER"
        yield Finding("throttling", f"the clock is held down: {', '.join(reasons)}", "warning", mend)


def check_triton(device: torch.device) -> Finding:
    """Compiles a kernel, runs it and compares its result with the reference."""
    if obstacle := device_obstacle("triton", device):
        return Finding("triton", f"{obstacle}; the reference implementations run")
    x, weight = torch.randn(64, 256, device=device), torch.ones(256, device=device)
    mend = "Triton compiles its launcher: install gcc and python3-dev; or LLM_KERNELS=torch, which is slower"
    begin = time.perf_counter()
    try:
        difference = float((kernels.rms_norm(x, weight, backend="triton") - reference.rms_norm(x, weight)).abs().max())
    except Exception as error:  # compilers and drivers fail in many ways
        reason = (str(error).splitlines() or [""])[0]
        return Finding("triton", f"a kernel does not run: {type(error).__name__}: {reason}", "wrong", mend)
    if not difference < 1e-4:
        mend = "llm doctor --kernels --config CONFIG shows every kernel; LLM_KERNELS=torch trains without them"
        return Finding("triton", f"a kernel's result is off by {difference:.2g}", "wrong", mend)
    return Finding("triton", f"compiles and runs a kernel ({time.perf_counter() - begin:.1f} s)")


def measure_rates(device: torch.device, dtype: torch.dtype, seconds: float) -> Rates:
    """Copies and multiplies for so many seconds: mostly products, which heat the device."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    c = torch.empty_like(a)
    # Written, not empty: Linux maps unwritten pages to one page of zeros, which would be read from the cache.
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = _per_second(lambda: target.copy_(source), device, 0.2 * seconds)
    window = 0.8 * seconds / WINDOWS
    products = [_per_second(lambda: torch.mm(a, b, out=c), device, window) for _ in range(WINDOWS)]
    return Rates(
        2 * size**3 * statistics.median(products),
        2 * source.nbytes * copies,
        statistics.median(products[-3:]) / statistics.median(products[:3]),
    )


def _per_second(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Returns the mean rate of calls, unlike metrics: what other programs take is missing in training too."""
    call()
    device_rates.synchronize(device)
    begin, calls = time.perf_counter(), 0
    while True:
        call()
        device_rates.synchronize(device)
        calls += 1
        passed = time.perf_counter() - begin
        if passed >= seconds:
            return calls / passed


def judge_rates(rates: Rates, device: torch.device, seconds: float) -> Iterator[Finding]:
    known = recognised(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    of_matmul = _against(rates.matmul_flops, None if known is None else known.flops)
    of_copy = _against(rates.copy_bytes, None if known is None else 1e9 * known.bandwidth_gbs)
    text = (
        f"matmul {rates.matmul_flops / 1e12:.4g} TFLOP/s{of_matmul}, copy {rates.copy_bytes / 1e9:.4g} GB/s{of_copy}, "
        f"the last of {seconds:g} seconds at {rates.cooled:.0%} of the first"
    )
    mend = "look for other programs (nvidia-smi, top) and for heat (nvidia-smi -q -d PERFORMANCE)"
    slow = rates.cooled < COOLED or _slow(rates, known)
    yield Finding("rates", text, "warning", mend) if slow else Finding("rates", text)


def _slow(rates: Rates, known: Hardware | None) -> bool:
    if known is None:
        return False
    return rates.matmul_flops < MATMUL_PEAK * known.flops or rates.copy_bytes < COPY_PEAK * 1e9 * known.bandwidth_gbs


def _against(rate: float, peak: float | None) -> str:
    return "" if peak is None else f" ({rate / peak:.0%} of the datasheet)"
