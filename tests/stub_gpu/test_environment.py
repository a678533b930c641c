"""What `make stub-gpu` does before any test: it finds or installs a CUDA build, and generates what the stub lacks."""

import subprocess
import sys
from pathlib import Path

import pytest
from stub_gpu import environment
from stub_gpu.missing import called, defined, missing

LIBRARY = environment.LIBRARY


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Nothing is installed; returns the requirements that pip was asked for."""
    asked: list[str] = []

    def run(command: list[object], **options: object) -> subprocess.CompletedProcess[str]:
        words = list(map(str, command))
        if "install" in words:
            asked.append(" ".join(words[words.index("--disable-pip-version-check") + 1 :]))
        return subprocess.CompletedProcess(words, int("===" in words[-1]))  # pip has no version without a suffix

    monkeypatch.setattr(environment, "FOLDER", tmp_path)
    monkeypatch.setattr(environment.subprocess, "run", run)
    return asked


def test_a_cuda_build_in_the_environment_is_used(monkeypatch: pytest.MonkeyPatch, pip: list[str]) -> None:
    monkeypatch.setattr(environment, "has_cuda_build", lambda python: True)
    assert environment.python_with_cuda() == Path(sys.executable)
    assert not pip


@pytest.mark.parametrize("url", [None, "https://example.org/cu130"])
def test_where_pip_has_only_a_cpu_build_one_line_says_how_to_name_another_index(
    monkeypatch: pytest.MonkeyPatch, pip: list[str], url: str | None
) -> None:
    monkeypatch.setattr(environment, "has_cuda_build", lambda python: False)
    monkeypatch.setenv("CUDA_INDEX", url or "")
    with pytest.raises(SystemExit) as ended:
        environment.python_with_cuda()
    assert "CUDA_INDEX=" in str(ended.value.code)
    assert "\n" not in str(ended.value.code)
    version = pip[-1].rpartition("==")[2]
    expected = [f"--index-url {url} torch=={version}"] if url else [f"torch==={version}", f"torch=={version}"]
    assert pip == expected


def test_what_the_sources_lack_is_generated() -> None:
    sources = sorted(LIBRARY.glob("*.cpp"))
    assert {"cudaMalloc", "cuLaunchKernel", "ncclAllReduce", "cublasLtMatmul"} <= defined(sources)
    assert called([], "x = cuCtxSetLimit(1); cuLaunchKernel(f);") == {"cuCtxSetLimit", "cuLaunchKernel"}
    source = missing([], "cuCtxSetLimit(1); cuLaunchKernel(f); cuNew(1);", sources)
    assert "int cuCtxSetLimit() { return 0; }" in source
    assert 'count(stub::Kind::unknown, "cuNew"), 801' in source
    assert "cuLaunchKernel" not in source
