"""`llm doctor` on one machine: limits, memory, /dev/shm, folders and GPUs that are not as they should be."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from running import environment, result_of

from llm.tools import doctor_folders, doctor_node
from llm.tools.doctor_node import Rates, check_limits, check_memory, check_nvidia_smi, check_triton, judge_rates

CPU = torch.device("cpu")
HEALTHY = "580.65, Enabled, 0, No, 0x0000000000000000, 41"


def in_mounts(*mounts: tuple[str, str], arguments: tuple[object, ...]) -> subprocess.CompletedProcess[str]:
    """`llm ARGUMENTS` where small file systems are mounted: (folder, size) each. Skips without the right to mount."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount")
    lines = [f"mount -t tmpfs -o size={size} tmpfs {folder}" for folder, size in mounts]
    command = ["unshare", "-m", "sh", "-c", " && ".join([*lines, 'exec "$@"']), "sh", sys.executable, "-m", "llm"]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, env=environment())


def levels(result: dict) -> dict[str, str]:
    return {finding["part"]: finding["level"] for finding in result["findings"]}


@pytest.mark.slow
def test_finds_a_small_shm_and_a_full_disk(write_config, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    config = write_config(checkpoint__dir=str(full / "run"))
    arguments = ("doctor", "--config", config, "--seconds", 0.1, "--json")
    done = in_mounts(("/dev/shm", "64m"), (str(full), "16m"), arguments=arguments)
    assert done.returncode == 1
    assert "shm         WARNING: /dev/shm: 64 of 64 MiB free; NCCL may fail with a bus error" in done.stderr
    assert "--shm-size=8g" in done.stderr
    assert f"disk        WRONG: {full}/run (in {full}, it is not there yet) is full: 64 MiB do not fit" in done.stderr
    result = result_of(done)
    assert result["failed"] == ["disk"]
    assert "shm" in result["warnings"]
    done = in_mounts(("/dev/shm", "64m"), arguments=("doctor", "--seconds", 0.1, "--json"))
    assert (done.returncode, result_of(done)["failed"]) == (0, []), "a warning is no failure"


def test_a_small_shm_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**26, used=0, free=2**26))
    measured, found = check_memory()
    assert measured["shm"] == 2**26
    assert levels({"findings": [vars(one) for one in found]})["shm"] == "warning"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**34, used=0, free=2**34))
    assert [one.level for one in check_memory()[1] if one.part == "shm"] == ["fine"]


def test_low_limits_are_warnings(monkeypatch):
    limits = {resource.RLIMIT_NOFILE: 512, resource.RLIMIT_MEMLOCK: 65536}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], limits[kind]))
    files, locked = check_limits(1)
    assert (files.level, files.text) == ("warning", "open files: 512, below 1,024")
    assert (locked.level, locked.text) == (
        "fine",
        "locked memory: 64 KiB (it matters for InfiniBand, which is not here)",
    )
    limits[resource.RLIMIT_NOFILE] = 2048
    assert next(check_limits(1)).level == "fine"
    assert next(check_limits(512)).text == "open files: 2,048, below 8,192", "each process opens sockets to the others"


def test_too_little_space_for_a_runs_checkpoints_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_folders, "PROBE_BYTES", doctor_folders.BLOCK)
    rates, found = doctor_folders.check_checkpoints(str(tmp_path), 10**15)
    assert set(rates) == {"write", "read"}
    assert [one.level for one in found] == ["fine", "wrong", "fine"]
    assert "for this run's checkpoints of 1000000.00 GB" in found[1].text
    assert list(tmp_path.iterdir()) == [], "nothing is left"


@pytest.mark.parametrize(
    ("broken", "what", "level"), [("symlink", "links", "wrong"), ("flock", "locks", "warning")], ids=["links", "locks"]
)
def test_a_file_system_without_links_or_locks(tmp_path, monkeypatch, broken, what, level):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "not here")

    monkeypatch.setattr(doctor_folders, "PROBE_BYTES", doctor_folders.BLOCK)
    if broken == "symlink":
        monkeypatch.setattr(os, "symlink", refuse)
    else:
        monkeypatch.setattr(doctor_folders, "_is_free", lambda folder: True)
    _, found = doctor_folders.check_checkpoints(str(tmp_path), None)
    assert (found[-1].level, found[-1].text) == (level, f"{tmp_path}: no {what} there")


def test_shards_are_read_and_damage_is_wrong(small_shards, tmp_path):
    rates, (found,) = doctor_folders.check_data(str(small_shards))
    assert rates["data"] > 0
    assert found.level == "fine"
    (tmp_path / "manifest.json").write_text("{}")
    assert doctor_folders.check_data(str(tmp_path))[1][0].level == "wrong"
    _, (nothing,) = doctor_folders.check_data(str(tmp_path / "none"))
    assert (nothing.level, nothing.mend) == ("fine", "llm prepare_data")


def test_a_device_that_cools_down_its_clock_is_a_warning():
    (fine,) = judge_rates(Rates(1e12, 1e9, 0.97), CPU, 10)
    (slow,) = judge_rates(Rates(1e12, 1e9, 0.6), CPU, 10)
    assert (fine.level, slow.level) == ("fine", "warning")
    assert "the last of 10 seconds at 60% of the first" in slow.text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (HEALTHY, {"driver": "fine", "ecc": "fine"}),
        (HEALTHY.replace(", 0,", ", 3,"), {"driver": "fine", "ecc": "wrong"}),
        (HEALTHY.replace("No", "Yes"), {"driver": "fine", "ecc": "wrong"}),
        (HEALTHY.replace("Enabled, 0", "Disabled, [N/A]"), {"driver": "fine", "ecc": "warning"}),
        (HEALTHY.replace("Enabled, 0", "[N/A], [N/A]"), {"driver": "fine", "ecc": "fine"}),
        (
            HEALTHY.replace("0x0000000000000000", "0x0000000000000028"),
            {"driver": "fine", "ecc": "fine", "throttling": "warning"},
        ),
        ("Field is not valid", {"ecc": "warning"}),
    ],
    ids=["healthy", "errors", "pending", "off", "without", "throttled", "unknown"],
)
def test_what_nvidia_smi_tells(monkeypatch, tmp_path, line, expected):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{line}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = list(check_nvidia_smi("GPU-1"))
    assert {one.part: one.level for one in found} == expected
    if "throttling" in expected:
        assert "hardware slowdown, heat" in found[-1].text


def test_a_compiler_that_is_missing_is_wrong(monkeypatch):
    monkeypatch.setattr(doctor_node, "device_obstacle", lambda backend, device: None)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nMore")

    monkeypatch.setattr(doctor_node.kernels, "rms_norm", fail)
    found = check_triton(CPU)
    assert (found.level, found.text) == ("wrong", "a kernel does not run: RuntimeError: Failed to find C compiler.")
    monkeypatch.setattr(doctor_node.kernels, "rms_norm", lambda x, *_, **__: x)
    assert "result is off by" in check_triton(CPU).text
    monkeypatch.setattr(doctor_node, "device_obstacle", lambda backend, device: "too old")
    assert check_triton(CPU).level == "fine"
