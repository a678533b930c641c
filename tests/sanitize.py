"""Runs the tests of csrc/ on extensions built with the compiler's sanitizers: `make sanitize`. Linux with gcc.

First address (memory errors) with undefined (undefined behaviour), then thread (data races). Each gets a copy of the
sources under build/, so that the usual build stays as it is. If the kernel or the compiler does not allow one, the
script prints the reason and runs the rest.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
# The tests of csrc/shards/, csrc/encoder/ and csrc/decoder/; KERNELS are those of csrc/cpu/.
THREADED = [
    "llm/data/test_shards.py",
    "llm/data/test_order.py",
    "llm/data/test_loader.py",
    "llm/data/test_loader_damage.py",
    "llm/data/test_mixture.py",
    "llm/data/test_fuzz.py",
    "llm/data/test_tokenizer.py",
    "llm/inference/test_decode.py",
    "llm/inference/test_sampling.py",
]
KERNELS = [f"kernels/test_{name}.py" for name in ("cpu", "attention", "rms_norm", "rope", "swiglu")]
# Tests that train, or start programs, test other things than csrc/.
LEFT_OUT = (
    "not test_a_run_trains and not test_a_program_may_end and not test_a_killed_program and not TestTraining "
    "and not instruction_set and not compiled and not opcheck"
)
SANITIZERS = {
    # name: (libraries to load before Python, options of its run time, files, the tests in them that it can follow)
    "address,undefined": (
        ["libasan.so", "libubsan.so", "libstdc++.so"],
        # Python itself frees little at exit.
        {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"},
        THREADED + KERNELS,
        LEFT_OUT,
    ),
    "thread": (
        ["libtsan.so", "libstdc++.so"],
        # It cannot see how OpenMP's threads synchronize: torch's, and those of the kernels.
        {"TSAN_OPTIONS": "halt_on_error=1:die_after_fork=0:ignore_noninstrumented_modules=1"},
        THREADED,
        LEFT_OUT + " and not forked",  # it cannot follow threads that start after a fork
    ),
}


def main() -> int:
    failed = [name for name in SANITIZERS if not passes(name)]
    print("sanitize: " + (f"{' and '.join(failed)} failed" if failed else "clean"), flush=True)
    return 1 if failed else 0


def passes(name: str) -> bool:
    """Builds and runs one; True as well if it cannot run here (it prints why)."""
    libraries, options, files, chosen = SANITIZERS[name]
    print(f"sanitize: {name}", flush=True)
    paths = [run("gcc", f"-print-file-name={library}").stdout.strip() for library in libraries]
    if missing := [path for path in paths if not Path(path).is_absolute()]:
        print(f"sanitize: {name} skipped: gcc here has no {', '.join(missing)}", flush=True)
        return True
    # The address space of a process is laid out at random; the thread sanitizer cannot follow where that is very wide.
    start = ["setarch", "--addr-no-randomize"] if name == "thread" and shutil.which("setarch") else []
    environment = os.environ | options | {"LD_PRELOAD": " ".join(paths), "OMP_NUM_THREADS": "1"}
    tried = run(*start, sys.executable, "-c", "pass", env=environment)
    if tried.returncode:
        reason = (tried.stderr.strip() or f"exit code {tried.returncode}").splitlines()[-1]
        print(f"sanitize: {name} skipped: it does not start on this kernel: {reason}", flush=True)
        return True

    copy = REPOSITORY / "build" / f"sanitize-{name.replace(',', '-')}"
    shutil.rmtree(copy, ignore_errors=True)
    for folder in ("csrc", "llm", "kernels", "tests", "configs"):
        shutil.copytree(REPOSITORY / folder, copy / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for file in ("setup.py", "pyproject.toml", "llm_from_scratch.py"):
        shutil.copy(REPOSITORY / file, copy)
    flags = f"-fsanitize={name} -fno-omit-frame-pointer -g"
    built = run(
        *(sys.executable, "setup.py", "-q", "build_ext", "--inplace"),
        cwd=copy,
        env=os.environ | {"CFLAGS": flags, "LDFLAGS": flags},
    )
    if built.returncode:
        print(built.stderr, file=sys.stderr)
        return False
    tests = [f"tests/{file}" for file in files]
    command = [*start, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    # A sanitizer reports to stderr itself and ends the process.
    command += ["-m", "not slow and not gpu", "-k", chosen, "--capture=sys"]
    return subprocess.run(command, cwd=copy, env=environment, check=False).returncode == 0


def run(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


if __name__ == "__main__":
    sys.exit(main())
