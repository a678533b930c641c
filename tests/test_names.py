"""Other projects' packages named `llm` or `kernels`: one line names the package in the way, and the way out."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def install(site: Path, name: str, distribution: str | None) -> None:
    """Makes a stand-in for another project's package, as pip leaves it in site-packages."""
    package = site / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def main(): print('the other project')\n")
    (package / "cli.py").write_text("def main(): print('the other project')\n")
    if distribution is not None:
        info = site / f"{distribution}-0.17.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.17.2\n")
        (info / "top_level.txt").write_text(f"{name}\n")


def python(site: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python with `site` before this project on its path, as site-packages is before an editable installation."""
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def command() -> str:
    """The program that pip writes for the command `llm`."""
    module, function = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["llm"].split(":")
    return f"import sys; from {module} import {function}; sys.exit({function}())"


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("arguments", [["-c", command()], ["-m", "llm"]], ids=["llm", "python -m llm"])
def test_the_command_ends_in_one_line_where_kernels_is_another_projects(tmp_path, work, arguments):
    install(tmp_path, "kernels", "kernels")
    done = python(tmp_path, *arguments, "doctor", cwd=work)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert str(tmp_path / "kernels") in done.stderr
    assert "pip uninstall kernels" in done.stderr
    assert "virtual environment" in done.stderr


def test_the_command_ends_in_one_line_where_llm_is_another_projects(tmp_path, work):
    install(tmp_path, "llm", "llm")
    done = python(tmp_path, "-c", command(), "doctor", cwd=work)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert str(tmp_path / "llm") in done.stderr
    assert "pip uninstall llm" in done.stderr


@pytest.mark.parametrize("module", ["llm", "llm.model.transformer", "llm.data.prepare"])
def test_an_import_names_the_package_in_the_way(tmp_path, work, module):
    install(tmp_path, "kernels", "kernels")
    done = python(tmp_path, "-c", f"import {module}", cwd=work)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: {tmp_path / 'kernels'} is another project's package kernels")
    assert "pip uninstall kernels" in last


def test_a_package_that_no_distribution_owns_is_to_be_renamed(tmp_path, work):
    install(tmp_path, "kernels", None)
    done = python(tmp_path, "-c", "import llm", cwd=work)
    assert "rename that folder" in done.stderr.splitlines()[-1]
    assert "pip uninstall" not in done.stderr


def test_folders_of_the_names_in_the_current_directory_change_nothing(tmp_path, work):
    """Builds the editable installation of this project's Python part as pip does, and imports from it."""
    tree, site, wheels = (tmp_path / name for name in ("tree", "site", "wheels"))
    for folder in (tree, site, wheels, work / "llm", work / "kernels"):
        folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "llm", "kernels", "llm_from_scratch.py"):
        (tree / name).symlink_to(ROOT / name)
    build = f"from setuptools.build_meta import build_editable; build_editable({str(wheels)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True)
    (wheel,) = wheels.iterdir()
    zipfile.ZipFile(wheel).extractall(site)
    program = (
        f"import site; site.addsitedir({str(site)!r})\n"
        "import importlib.util, llm; print(llm.__file__, importlib.util.find_spec('kernels').origin)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # -S: the environment that runs the tests has this project installed too, and must not take part.
    command = [sys.executable, "-S", "-c", program]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(tree / name / "__init__.py") for name in ("llm", "kernels")], done.stderr
