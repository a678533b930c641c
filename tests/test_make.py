"""`make setup` checks the host before it changes anything, names the apt packages that are missing, and installs what a
user needs. `make test` and `make lint` add what a developer needs.
"""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def check(tmp_path: Path, *, sitecustomize: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the checks alone. `sitecustomize` is code that the interpreter runs first, to fake a poorer host."""
    (tmp_path / "sitecustomize.py").write_text(sitecustomize)
    return subprocess.run(
        [sys.executable, "bootstrap.py", "--check"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path), **environment},
        capture_output=True,
        text=True,
    )


def test_a_host_that_has_everything_passes(tmp_path):
    result = check(tmp_path)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("sitecustomize", "named"),
    [
        ("import sys; sys.platform = 'darwin'", "Linux"),
        ("import sys; sys.version_info = (3, 9, 2)", "Python 3.11 or newer"),
        ("import sys; sys.modules['ensurepip'] = None", "apt install python3[0-9.]*-venv"),
        ("import sysconfig; sysconfig.get_path = lambda name: '/nonexistent'", "apt install python3[0-9.]*-dev"),
    ],
)
def test_what_python_lacks_is_named_in_one_line(tmp_path, sitecustomize, named):
    result = check(tmp_path, sitecustomize=sitecustomize)
    assert result.returncode == 1
    assert re.search(named, result.stderr)
    assert result.stderr.count("\n") == 1


def test_a_host_without_a_compiler_is_told_to_install_gpp(tmp_path):
    result = check(tmp_path, PATH=str(tmp_path))
    assert result.returncode == 1
    assert "apt install g++" in result.stderr


def test_a_compiler_older_than_cpp17_is_told_apart(tmp_path):
    old = tmp_path / "g++"
    old.write_text("#!/bin/sh\necho \"unrecognized command line option '-std=c++17'\" >&2; exit 1\n")
    old.chmod(0o755)
    result = check(tmp_path, CXX=str(old))
    assert result.returncode == 1
    assert "cannot compile C++17" in result.stderr


def test_all_problems_are_listed_at_once(tmp_path):
    result = check(tmp_path, sitecustomize="import sys; sys.modules['ensurepip'] = None", PATH=str(tmp_path))
    assert "-venv" in result.stderr
    assert "apt install g++" in result.stderr


def clone(tmp_path: Path) -> Path:
    """A folder with the files that `make setup` reads, without an environment."""
    tree = tmp_path / "clone"
    tree.mkdir()
    for name in ("Makefile", "bootstrap.py", "pyproject.toml", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tree)
    return tree


def make(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=tree, env=environment, capture_output=True, text=True)


def test_setup_names_the_packages_where_there_is_no_python(tmp_path):
    tree = clone(tmp_path)
    result = make(tree, "setup", "PYTHON=no-such-python")
    assert result.returncode != 0
    assert "no-such-python is not on PATH: sudo apt install python3" in result.stderr
    assert not (tree / ".venv").exists()


def test_setup_stops_at_a_failed_check_and_leaves_nothing(tmp_path):
    tree = clone(tmp_path)
    result = make(tree, "setup", f"PYTHON={sys.executable}", "CXX=no-such-compiler")
    assert result.returncode != 0
    assert "apt install g++" in result.stderr
    assert not (tree / ".venv").exists()


@pytest.mark.parametrize("target", ["setup", "quickstart"])
def test_a_user_gets_no_developer_tools(tmp_path, target):
    commands = make(clone(tmp_path), "-n", target).stdout
    assert commands.count("bootstrap.py") == 1
    assert "--dev" not in commands


BOOTSTRAP = (r"bootstrap\.py", r"bootstrap\.py --dev")


@pytest.mark.parametrize("target", ["setup-dev", "test", "test-all", "bench", "sanitize", "stub-gpu", "lint", "format"])
def test_what_a_developer_runs_in_a_fresh_clone_installs_everything_first(tmp_path, target):
    commands = make(clone(tmp_path), "-n", target).stdout
    setup, setup_dev = (re.search(rf"{command} *$", commands, re.M).start() for command in BOOTSTRAP)
    assert setup < setup_dev
    assert all(found.start() > setup_dev for found in re.finditer(r"pytest|sanitize\.py|stub_gpu|ruff", commands))


def test_the_developer_tools_are_those_of_the_extra_dev_and_compile_nothing(tmp_path):
    tree = clone(tmp_path)
    python = tree / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > asked\n')
    python.chmod(0o755)
    subprocess.run([sys.executable, "bootstrap.py", "--dev"], cwd=tree, check=True, capture_output=True)
    asked = (tree / "asked").read_text().splitlines()
    assert {"pytest>=8", "mypy", "gguf>=0.17", "lm-eval>=0.4.13"} <= set(asked)
    assert not any(argument == "-e" or argument.startswith("llm-from-scratch") for argument in asked)


def test_the_base_installation_has_every_package_that_is_imported_unconditionally():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {re.match(r"[\w-]+", name)[0].replace("-", "_") for name in project["dependencies"]}
    imported = set()
    for file in [path for folder in ("llm", "kernels") for path in (ROOT / folder).rglob("*.py")]:
        for statement in ast.parse(file.read_text()).body:
            if isinstance(statement, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in statement.names}
            elif isinstance(statement, ast.ImportFrom):
                imported.add(statement.module.split(".")[0])
    ours, pydantics = {"llm", "kernels", "llm_from_scratch"}, {"pydantic_core"}
    assert imported - ours - pydantics - set(sys.stdlib_module_names) <= base


def test_bare_make_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.+)$", makefile, re.M)
    listed = make(ROOT).stdout
    for target in phony[1].split():
        assert f"make {target} " in listed


def test_the_pins_hold_everywhere():
    """Exact versions of torch, triton and deepspeed; no build tag (+cpu), no path."""
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", pin) for pin in pins)
    assert {"torch", "triton", "deepspeed", "setuptools", "pybind11"} <= {pin.split("==")[0] for pin in pins}


def test_an_environment_that_was_moved_is_mended(tmp_path):
    old = clone(tmp_path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", old / ".venv"], check=True)
    interpreter = old / ".venv" / "bin" / "python"
    scripts = {
        "direct": f"#!{interpreter}\n",
        "through_sh": f"#!/bin/sh\n'''exec' \"{interpreter}\" \"$0\" \"$@\"\n' '''\n",
        "other": f"#!{sys.executable}\n",
        "shell": "#!/bin/sh\necho other\n",
    }
    for name, first in scripts.items():
        script = old / ".venv" / "bin" / name
        script.write_text(first + ("import sys\nprint(sys.prefix, *sys.argv[1:])\n" if name != "shell" else ""))
        script.chmod(0o755)
    (old / ".venv" / ".installed").touch()
    assert "bootstrap.py" not in make(old, "-n", "setup").stdout

    new = tmp_path / "a folder with blanks"
    old.rename(new)
    assert "bootstrap.py" in make(new, "-n", "setup").stdout
    # Without pip, which make_venv asks for, it would be made from nothing.
    program = "import bootstrap, sys\nassert bootstrap.is_moved()\nbootstrap.mend_scripts()\n"
    subprocess.run([sys.executable, "-c", program], cwd=new, check=True)
    for name in scripts:
        run = subprocess.run([new / ".venv" / "bin" / name, "a b"], check=True, capture_output=True, text=True)
        prefix = sys.prefix if name == "other" else new / ".venv"
        assert run.stdout == ("other\n" if name == "shell" else f"{prefix} a b\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", new / ".venv"], check=True)
    assert "bootstrap.py" not in make(new, "-n", "setup").stdout


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """bootstrap.fetch_wheels with pip replaced; returns (the function, the commands that pip got)."""
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "bootstrap.py")
    assert spec is not None
    bootstrap = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(bootstrap)
    commands: list[list[str]] = []

    def run(command, **_):
        commands.append(command[3:])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(bootstrap.subprocess, "run", run)
    return bootstrap.fetch_wheels, commands


def test_wheels_of_what_images_with_pytorch_lack_have_the_pinned_versions(tmp_path, pip):
    fetch, commands = pip
    assert fetch(str(tmp_path), "3.12", ["missing"])
    built, downloaded = commands
    assert built[:2] == ["wheel", "-q"]  # deepspeed is published as source
    assert built[-1].startswith("deepspeed==")
    assert downloaded[downloaded.index("--python-version") + 1] == "3.12"
    assert {"--no-deps", "--only-binary=:all:"} <= set(downloaded)
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split("\n") if "==" in line)
    assert f"pydantic=={pins['pydantic']}" in downloaded
    assert "liger-kernel" in downloaded  # a rival in the benchmarks, which constraints.txt does not have
    assert not any(each.startswith("deepspeed") for each in downloaded)


def test_all_wheels_come_with_what_they_need_under_the_pins(tmp_path, pip):
    fetch, commands = pip
    assert fetch(str(tmp_path), "3.13", [])
    assert "--no-deps" not in commands[1]
    assert {"-c", "torch>=2.11", "setuptools>=77"} <= set(commands[1])  # also what builds the extension there


def test_single_packages_can_be_fetched(tmp_path, pip):
    fetch, commands = pip
    assert fetch(str(tmp_path), "3.12", ["hjson"])
    assert [command[0] for command in commands] == ["download"]
