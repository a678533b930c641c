"""The environment of `make stub-gpu`: a CUDA build of torch, and the stub that it finds in place of CUDA.

Both lie in build/stub-gpu. If the torch of .venv is a CUDA build, it is used; otherwise the pinned version is installed
beside it (4.7 GB with NVIDIA's libraries), and everything else is .venv's.
"""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from .missing import missing

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "build" / "stub-gpu"
LIBRARY = Path(__file__).parent / "library"
NO_CUDA_BUILD = (
    "stub-gpu: pip finds only a CPU build of torch {version} here: "
    "make stub-gpu CUDA_INDEX=https://download.pytorch.org/whl/cu130 names an index with CUDA builds"
)


def python_with_cuda() -> Path:
    """Returns a Python that has a CUDA build of torch; makes one if .venv, which runs this, has none.

    Raises:
        SystemExit: pip finds only a CPU build.
    """
    if has_cuda_build(Path(sys.executable)):
        return Path(sys.executable)
    python = FOLDER / "venv" / "bin" / "python"
    if python.exists() and has_cuda_build(python):
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", FOLDER / "venv"], check=True)
    version = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]  # type: ignore[index]
    # With ===, pip does not take a local version such as 2.13.0+cpu, which it prefers otherwise. On PyPI, the version
    # without a suffix is the CUDA build.
    requirements = [f"torch=={version}"] if index() else [f"torch==={version}", f"torch=={version}"]
    print(f"stub-gpu: installing a CUDA build of torch {version} into {FOLDER / 'venv'}", file=sys.stderr, flush=True)
    for requirement in requirements:
        command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *index(), requirement]
        if subprocess.run(command).returncode == 0:
            break
    if not has_cuda_build(python):
        sys.exit(NO_CUDA_BUILD.format(version=version))
    # The packages of .venv come after those of this environment, which has torch, Triton and NVIDIA's alone.
    folder = sysconfig.get_path("purelib", vars={"base": str(FOLDER / "venv")})
    Path(folder, "venv.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return python


def index() -> list[str]:
    """What tells pip the index that the user chose."""
    url = os.environ.get("CUDA_INDEX")
    return ["--index-url", url] if url else []


def has_cuda_build(python: Path) -> bool:
    program = "import torch; raise SystemExit(torch.version.cuda is None)"
    return subprocess.run([python, "-c", program], capture_output=True).returncode == 0


def build(python: Path) -> Path:
    """Compiles the stub for the torch of `python`, if it is not newer than its sources. Returns the library's path."""
    stub = FOLDER / "libcuda.so.1"
    sources = sorted(LIBRARY.glob("*.cpp"))
    packages = "import torch, triton; print(torch.__path__[0], triton.__path__[0], sep='\\n')"
    torch, triton = map(Path, subprocess.check_output([python, "-c", packages], text=True).splitlines())
    read = [*sources, *LIBRARY.glob("*.hpp"), Path(__file__).parent / "missing.py", torch / "version.py"]
    if stub.exists() and all(path.stat().st_mtime < stub.stat().st_mtime for path in read):
        return stub
    headers = next(torch.parent.glob("nvidia/*/include/driver_types.h")).parent
    launcher = (triton / "backends/nvidia/driver.c").read_text()
    FOLDER.mkdir(parents=True, exist_ok=True)
    generated = FOLDER / "missing.cpp"
    generated.write_text(missing((torch / "lib").glob("lib*.so"), launcher, sources))
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    # libstdc++ is linked in, because this library comes before the one that torch brings.
    link = ["-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL", "-Wl,-soname,libcuda.so.1", "-ldl", "-lrt"]
    includes = [f"-I{LIBRARY}", f"-I{headers}"]
    command = ["g++", *flags, *includes, *sources, generated, "-o", stub.with_suffix(".new"), "-lpthread", *link]
    subprocess.run(command, check=True)
    stub.with_suffix(".new").rename(stub)
    return stub


def variables(stub: Path) -> dict[str, str]:
    """The environment variables with which a process, and those that it starts, sees the stub."""
    folder = str(stub.parent)
    return {
        "LD_PRELOAD": str(stub),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [folder, os.environ.get("LD_LIBRARY_PATH")])),
        "TRITON_LIBCUDA_PATH": folder,  # Triton links its launcher with the library of this folder
        "TRITON_CACHE_DIR": str(stub.parent / "triton"),
        "OMP_NUM_THREADS": "1",
        # DeepSpeed compiles its CPU optimizer for the torch that it finds.
        "TORCH_EXTENSIONS_DIR": str(stub.parent / "torch_extensions"),
        "STUB_GPU": "1",
    }
