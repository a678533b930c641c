"""Makes .venv and installs this package and its pinned dependencies; called by `make setup` and `make setup-dev`.

It runs on the system's Python and needs only the standard library. An old Python can parse it too, so that the user
gets the message that a newer one is needed.

    python3 bootstrap.py [--torch_index URL] [--check]
    python3 bootstrap.py --dev
    python3 bootstrap.py --wheels DIR [--python_version 3.12] [--only missing|PACKAGE ...]
"""

import argparse
import glob
import os
import platform
import shutil
import subprocess
import sys
import sysconfig

ROOT = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(ROOT, ".venv")
VENV_PYTHON = os.path.join(VENV, "bin", "python")
CONSTRAINTS = os.path.join(ROOT, "constraints.txt")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# pip takes each of these names for itself and does not know that a later glibc runs what was built on an earlier one.
PLATFORMS = [f"manylinux_2_{minor}" for minor in range(39, 4, -1)] + ["manylinux2014"]
# What images with PyTorch lack of what this project needs, with the needs of these packages. liger-kernel is a rival
# that the benchmarks compare with.
MISSING = [
    "deepspeed",
    "hjson",
    "pydantic",
    "pydantic_core",
    "annotated-types",
    "typing-inspection",
    "shtab",
    "liger-kernel",
]
CPP_PROGRAM = "#include <optional>\nstd::optional<int> x;\nint main() { if (int y = 1; y) return *x; }\n"


def problems():
    """Yields a line for each thing that this host lacks, with the apt package that contains it. Changes nothing."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        yield f"this runs on Linux on x86-64 or arm64 (WSL2 included), not on {sys.platform} {platform.machine()}"
        return
    python = os.path.basename(sys.executable)
    package = python if python.startswith("python3.") else "python3"
    if sys.version_info < (3, 11):  # noqa: UP036 (this file runs before any other check)
        version = ".".join(map(str, sys.version_info[:3]))
        yield f"Python 3.11 or newer is needed, {python} is {version}: sudo apt install python3.11; PYTHON=python3.11"
        return
    try:
        import ensurepip  # noqa: F401  (Debian ships venv without it)
        import venv  # noqa: F401
    except ImportError:
        yield f"Python's venv module is missing: sudo apt install {package}-venv"
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        yield f"Python's headers (Python.h) are missing: sudo apt install {package}-dev"
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler.split()[0]) is None:
        yield f"a C++ compiler ({compiler}) is missing: sudo apt install g++"
    else:
        command = [*compiler.split(), "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
        if subprocess.run(command, input=CPP_PROGRAM.encode(), capture_output=True).returncode:
            yield f"{compiler} cannot compile C++17: sudo apt install g++ (9 or newer)"


def has_nvidia_device():
    if glob.glob("/dev/nvidia[0-9]*"):
        return True
    # WSL2 does not have this device file, but it has the driver's tool.
    smi = shutil.which("nvidia-smi") or "/usr/lib/wsl/lib/nvidia-smi"
    try:
        return b"GPU 0" in subprocess.run([smi, "-L"], capture_output=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False


def reachable(url):
    # In a separate process, because a slow name server ignores urlopen's timeout.
    probe = [sys.executable, "-c", "import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=6).read(1)", url]
    try:
        return subprocess.run(probe, capture_output=True, timeout=8).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def say(text):
    print(f"setup: {text}", file=sys.stderr, flush=True)


def pip_install(*arguments):
    """Runs pip in .venv with the pins and the user's pip configuration. Returns whether it succeeded.

    pip shows its progress on stderr, because a setup takes minutes and the bars show a slow network.
    """
    environment = {
        **os.environ,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_USER": "0",  # `user = true` cannot work inside a virtual environment
        # deepspeed's setup.py checks whether it can build each CUDA op, and fails if a GPU has no CUDA toolkit.
        # Nothing is prebuilt here, so the check is not needed; the accelerator is detected again at run time.
        "DS_ACCELERATOR": "cpu",
        "DS_BUILD_OPS": "0",
    }
    command = [VENV_PYTHON, "-m", "pip", "install", "-c", CONSTRAINTS, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    return done.returncode == 0


def pin(package):
    with open(CONSTRAINTS) as file:
        return next(line.split("==")[1].strip() for line in file if line.startswith(package + "=="))


def installed_torch():
    """Returns (version, CUDA version or "") of the torch in .venv, or None."""
    command = [VENV_PYTHON, "-c", "import torch; print(torch.__version__, torch.version.cuda or '', sep=',')"]
    result = subprocess.run(command, capture_output=True, text=True)
    return tuple(result.stdout.strip().split(",")) if result.returncode == 0 else None


def install_torch(index, nvidia):
    """Installs the CUDA build if there is an NVIDIA device, else the much smaller CPU build if it is reachable."""
    version, present = pin("torch"), installed_torch()
    if index is None and present and present[0].split("+")[0] == version and (present[1] or not nvidia):
        return True
    requirement = ["--no-deps", f"torch=={version}"]
    if present:
        requirement.append("--force-reinstall")  # same version, other build
    if index:
        say(f"2 of 3, torch {version} from {index}")
        return pip_install(*requirement, "--index-url", index)
    if not nvidia:
        if reachable(f"{CPU_INDEX}/torch/"):
            say(f"2 of 3, torch {version}, CPU build, from {CPU_INDEX}")
            if pip_install(*requirement, "--index-url", CPU_INDEX):
                return True
        say(f"2 of 3, no CPU build of torch from {CPU_INDEX} (it cannot be reached): taking pip's configured index")
    else:
        say(f"2 of 3, torch {version}, CUDA build, for the NVIDIA device of this host")
    return pip_install(*requirement)


def make_venv():
    """Keeps a .venv of this Python version and replaces any other."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    # The base interpreter, because an active .venv must not be made from itself.
    base = getattr(sys, "_base_executable", sys.executable)
    if os.path.exists(VENV):
        command = [VENV_PYTHON, "-c", "import pip, sys; print('%d.%d' % sys.version_info[:2])"]
        try:
            if subprocess.run(command, capture_output=True, text=True).stdout.strip() == version:
                if is_moved():
                    say(".venv was moved here: mending it")
                    # Writes the script `activate` again; what is installed stays.
                    subprocess.run([base, "-m", "venv", VENV], check=True)
                return
        except OSError:
            pass  # no interpreter in it, or a dangling link
        say(f".venv is not a working environment of Python {version}: making it again")
    subprocess.run([base, "-m", "venv", "--clear", VENV], check=True)


def is_moved():
    """Whether the .venv was made under another path, which its scripts name. The Makefile checks the same."""
    try:
        with open(os.path.join(VENV, "bin", "activate")) as file:
            text = file.read()
    except OSError:
        return True
    return VENV not in text and os.path.realpath(VENV) not in text


def mend_scripts():
    """Lets the scripts in .venv/bin that no system could start run on the Python next to them.

    Their first line names the Python of the environment. After a move it is not there any more; and the system reads a
    path with a blank only up to the blank, where an installer did not take care of it.
    """
    folder = os.path.join(VENV, "bin")
    # What pip writes for such a path: sh runs the second line, and to Python the lines are a string.
    through_sh = f"#!/bin/sh\n'''exec' \"{VENV_PYTHON}\" \"$0\" \"$@\"\n' '''\n".encode()
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if os.path.islink(path) or not os.path.isfile(path):
            continue
        with open(path, "rb") as file:
            text = file.read()
        if text.startswith(b"#!/bin/sh\n'''exec'"):
            named, rest = text.split(b"\n", 3)[1], text.split(b"\n", 3)[3]
            starts = VENV_PYTHON.encode() in named
        elif text.startswith(b"#!") and b"python" in text.split(b"\n", 1)[0]:
            named, rest = text.split(b"\n", 1)
            starts = os.access(named[2:].split()[0].decode(errors="surrogateescape"), os.X_OK)
        else:
            continue
        if not starts:
            with open(path, "wb") as file:
                file.write(through_sh + rest)


def verify(nvidia):
    """Imports the built extensions. If torch cannot use this host's NVIDIA device, the message gives the reason."""
    program = (
        "import torch, llm.data._shards, llm.data._encoder, llm.inference._decoder, kernels._cpu\n"
        "if not torch.cuda.is_available():\n"
        "    try: torch.cuda.init()\n"
        "    except Exception as error: print(str(error).splitlines()[0])\n"
    )
    result = subprocess.run([VENV_PYTHON, "-c", program], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"setup: what was installed does not import:\n{result.stderr}")
    version, cuda = installed_torch()
    if nvidia and result.stdout and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        if not cuda:
            reason = f"torch {version} is a CPU build"
            remedy = "make setup TORCH_INDEX=https://download.pytorch.org/whl/cu130 brings a CUDA build"
        else:
            reason = f"torch {version} is built for CUDA {cuda}: {result.stdout.strip()}"
            remedy = "update the driver, or take a build for its CUDA version with make setup TORCH_INDEX=URL"
        say(f"ERROR: this host has an NVIDIA device that torch cannot use ({reason}): {remedy}")
        say("until then, training needs train.device=cpu")
    else:
        say(f"ready: torch {version}, {'CUDA ' + cuda if cuda and nvidia else 'CPU'}, in .venv")


def install_package(nvidia, torch_index):
    """Installs the package with the dependencies that every user needs; returns whether it succeeded."""
    say("1 of 3, the environment in .venv and the tools that build packages")
    make_venv()
    # The build tools come first, so that pip builds source packages with the pinned tools and does not download
    # each package's build requirements again.
    if not pip_install("setuptools", "wheel", "pybind11", "ninja"):
        return False
    if not install_torch(torch_index, nvidia):
        return False
    say("3 of 3, the other packages, and this one with its C++ extension (a minute or two without a line)")
    if not pip_install("--no-build-isolation", "-e", "."):
        return False
    mend_scripts()
    return True


def install_developer_tools():
    """Installs only the packages of the extra `dev`: `-e .[dev]` would compile the C++ extensions again."""
    import tomllib  # not at the top, because Python 3.10 does not have it, but must reach problems()

    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    requirements = [requirement for name in ("eval", "gguf", "cloud", "dev") for requirement in extras[name]]
    say("the packages that tests and lint need")
    return pip_install(*(each for each in requirements if not each.startswith("llm-from-scratch")))


def fetch_wheels(folder, python_version, only):
    """Downloads wheels for Linux on this machine's processor into a folder, for a host that reaches no package index.

    only: names of packages, which come without their needs; ["missing"]: MISSING; []: the project's dependencies with
    all that they need, torch's CUDA build with its libraries among it (about 3 GB).
    Returns whether it succeeded.
    """
    import tomllib

    os.makedirs(folder, exist_ok=True)
    machine = platform.machine()
    target = ["--python-version", python_version, "--implementation", "cp", "--only-binary=:all:"]
    target += [part for tag in PLATFORMS for part in ("--platform", f"{tag}_{machine}")]
    target += [
        part for tag in ("39", "35", "34", "31", "24") for part in ("--platform", f"manylinux_2_{tag}_{machine}")
    ]
    pip = [sys.executable, "-m", "pip"]
    # deepspeed is published as source only, and the one wheel that it gives suits every Python.
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if only == ["missing"]:
        only = MISSING
    if not only or "deepspeed" in only:
        command = [*pip, "wheel", "-q", "--no-deps", "-w", folder, f"deepspeed=={pin('deepspeed')}"]
        if subprocess.run(command, env=environment).returncode:
            return False
    if only:
        wanted = [pinned(package) for package in only if package != "deepspeed"]
        command = [*pip, "download", "-q", "--no-deps", "-d", folder, *target, *wanted]
    else:
        with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
            project = tomllib.load(file)
        wanted = project["project"]["dependencies"] + project["build-system"]["requires"]
        command = [*pip, "download", "-q", "--find-links", folder, "-c", CONSTRAINTS, "-d", folder, *target, *wanted]
    if subprocess.run(command, env=environment).returncode:
        return False
    wheels = glob.glob(os.path.join(folder, "*.whl"))
    size = sum(map(os.path.getsize, wheels))
    say(f"{len(wheels)} wheels for Python {python_version}, {size / 1e6:,.1f} MB, in {folder}; on the other host:")
    say(f"pip install --no-index --no-deps {folder}/*.whl, then python setup.py build_ext --inplace")
    return True


def pinned(package):
    """The requirement with the pinned version; without one where constraints.txt has none."""
    try:
        return f"{package}=={pin(package)}"
    except StopIteration:
        return package


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch_index", default=None, help="package index to take torch from")
    parser.add_argument("--check", action="store_true", help="only check that the host has what is needed")
    parser.add_argument("--dev", action="store_true", help="add to an installed .venv what tests and lint need")
    parser.add_argument("--wheels", metavar="DIR", help="only download wheels, for a host without a package index")
    parser.add_argument("--python_version", default="3.12", help="of that host (default %(default)s)")
    parser.add_argument("--only", nargs="*", default=[], help="packages, or missing: what images with PyTorch lack")
    arguments = parser.parse_args()
    if arguments.wheels:
        return not fetch_wheels(arguments.wheels, arguments.python_version, arguments.only)
    missing = list(problems())
    for problem in missing:
        say(problem)
    if missing or arguments.check:
        return bool(missing)
    if arguments.dev:
        return not install_developer_tools()
    nvidia = has_nvidia_device()
    if not install_package(nvidia, arguments.torch_index or None):
        return 1
    verify(nvidia)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("interrupted; make setup goes on where it stopped")
        sys.exit(130)
