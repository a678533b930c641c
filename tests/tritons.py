"""Compiles and tests the kernels with the first and the last version of Triton that pyproject.toml allows.

    make tritons [ARGS="--write"]

Each version is installed into a folder of its own under build/, which comes before .venv on Python's path. Its binaries
are compared with benchmarks/results/aot/VERSION.json, which --write replaces; then the tests of the kernels run in its
interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
# The ends of the range, and what each needs; constraints.txt has the one between them. The interpreter of 3.6.0 takes
# an array of one element for a number, which numpy 2.4 refuses.
VERSIONS = {"3.6.0": ["numpy<2.4"], "3.9.0": []}
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


def main(arguments: list[str]) -> int:
    failed = [version for version in VERSIONS if not passes(version, arguments)]
    print("tritons: " + (f"{' and '.join(failed)} failed" if failed else "all pass"), flush=True)
    return 1 if failed else 0


def passes(version: str, arguments: list[str]) -> bool:
    folder = REPOSITORY / "build" / "tritons" / version
    if not (folder / f"triton-{version}.dist-info").exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--upgrade"]
        subprocess.run([*pip, "--target", folder, f"triton=={version}", *VERSIONS[version]], check=True)
    path = os.pathsep.join(map(str, (folder, REPOSITORY)))
    environment = os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(folder / "cache")}
    compiled = ["-m", "benchmarks.aot", *arguments, "--architecture", *ARCHITECTURES]
    tested = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/test_interpreter.py"]
    return all(run(version, command, environment) for command in (compiled, tested))


def run(version: str, command: list[str], environment: dict[str, str]) -> bool:
    print(f"Triton {version}: python {' '.join(command)}", flush=True)
    return subprocess.run([sys.executable, *command], cwd=REPOSITORY, env=environment).returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
