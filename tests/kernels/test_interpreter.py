"""Runs the tests marked `interpreter`: in processes of their own, since Triton reads TRITON_INTERPRET at decoration."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(
    path.name for path in HERE.glob("test_*.py") if "machines" in path.read_text() and path.name != Path(__file__).name
)


@pytest.mark.parametrize("file", FILES)
def test_triton_kernels_in_the_interpreter(file: str, request: pytest.FixtureRequest) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / file]
    command += ["-m", request.config.option.markexpr or "not slow and not gpu"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout[-2000:]
