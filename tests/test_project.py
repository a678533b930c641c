"""What surrounds the code: the package's metadata, its version, the workflows, the notebook's form."""

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm import __version__

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = ["3.11", "3.12", "3.13"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel's Python part. Without setup.py in the tree, nothing is compiled."""
    tree, wheels = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheels")
    for name in ("pyproject.toml", "README.md", "LICENSE", "llm", "kernels", "llm_from_scratch.py"):
        (tree / name).symlink_to(ROOT / name)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(wheels)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=tree, check=True, capture_output=True)
    (path,) = wheels.iterdir()
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return Parser().parsestr(wheel.read(f"llm_from_scratch-{__version__}.dist-info/METADATA").decode())


def workflow(name: str) -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows" / name).read_text())
    return parsed


def test_the_version_is_written_in_one_place(metadata: Message) -> None:
    """llm/version.py has it. pyproject.toml reads it there, and CITATION.cff, which cannot, is equal."""
    assert "version" not in PYPROJECT["project"]
    assert metadata["Version"] == __version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


def test_the_wheel_has_every_file_of_the_packages(wheel: zipfile.ZipFile) -> None:
    """The types (py.typed and the stubs of the extensions), the tiles, the report's style, and each module."""
    packaged = set(wheel.namelist())
    assert {"llm/py.typed", "kernels/py.typed"} <= packaged
    for package in ("llm", "kernels"):
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so":
                assert str(path.relative_to(ROOT)) in packaged


def test_the_metadata_names_authors_and_licence_and_no_url(metadata: Message) -> None:
    assert metadata["Author"] == "The LLM from scratch authors"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Project-URL"] is None
    assert metadata["Home-page"] is None
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert [author["name"] for author in citation["authors"]] == [metadata["Author"]]


def test_ci_runs_the_script_that_developers_run_on_each_python() -> None:
    job = workflow("ci.yml")["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    assert (ROOT / ".ci/run").is_file()
    assert job["strategy"]["matrix"]["python"] == PYTHONS


def test_wheels_are_built_for_the_pythons_that_the_metadata_names(metadata: Message) -> None:
    wheels = PYPROJECT["tool"]["cibuildwheel"]["build"]
    assert [re.match(r"cp3(\d+)-", name)[1] for name in wheels] == [python.split(".")[1] for python in PYTHONS]
    named = [each.rpartition(" ")[2] for each in metadata.get_all("Classifier", []) if "Python :: 3." in each]
    assert named == PYTHONS


def test_the_release_builds_wheels_for_both_architectures() -> None:
    job = workflow("release.yml")["jobs"]["wheels"]
    assert job["strategy"]["matrix"]["host"] == ["ubuntu-latest", "ubuntu-24.04-arm"]
    assert any(step.get("run", "").startswith("cibuildwheel") for step in job["steps"])


def test_the_tests_of_a_wheel_are_there_and_need_nothing_of_the_source_tree() -> None:
    command = " ".join(PYPROJECT["tool"]["cibuildwheel"]["test-command"])
    files = re.findall(r"tests/\S+", command)
    assert files
    for file in files:
        text = (ROOT / file).read_text()
        assert not re.search(r"\bROOT\b|\bREPOSITORY\b|\bbenchmarks\b", text), file


@pytest.mark.parametrize("name", ["ci.yml", "release.yml"])
def test_an_action_of_others_is_pinned_to_a_commit(name: str) -> None:
    """A tag can be moved to other code."""
    for job in workflow(name)["jobs"].values():
        for step in job["steps"]:
            assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step.get("uses", f"actions/none@{'0' * 40}"))


def test_pre_commit_runs_only_tools_of_the_environment() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    for hook in repository["hooks"]:
        tool = re.match(r"\.venv/bin/([a-z-]+)", hook["entry"])[1]
        assert tool in PYPROJECT["project"]["optional-dependencies"]["dev"]


def test_the_changelog_has_a_place_for_the_next_change() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", heading) for heading in headings[1:])


def test_the_notebook_has_no_outputs_and_one_line_to_change() -> None:
    cells = json.loads((ROOT / "notebooks/first_model.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert sum("".join(cell["source"]).startswith("REPOSITORY = ") for cell in code) == 1
