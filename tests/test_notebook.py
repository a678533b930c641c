"""notebooks/first_model.ipynb, run from the clone to the text that its model writes."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent


def environment_without_the_project(folder: Path) -> Path:
    """An environment in which pip finds the packages of the one that runs the tests, as on a host that has PyTorch.

    What pip installs there comes first, so that the program that runs is the clone's. Returns its python.
    """
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", query], check=True, capture_output=True, text=True).stdout.strip())
    # The .pth files are read in the order of their names: after the one of an editable installation.
    (site / "zz_host.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return python


@pytest.mark.slow  # it compiles the C++ extensions and trains 500,000 tokens
@pytest.mark.timeout(3_600)
def test_the_notebook_runs_from_clone_to_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    python = environment_without_the_project(tmp_path / "venv")
    kernel = tmp_path / "share" / "kernels" / "host"
    kernel.mkdir(parents=True)
    start = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": start, "display_name": "host", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # tests/conftest.py has set it for small tensors
    work = tmp_path / "work"
    work.mkdir()

    notebook = nbformat.read(ROOT / "notebooks/first_model.ipynb", as_version=4)
    cells = {cell.id: cell for cell in notebook.cells}
    cells["repository"].source = f"REPOSITORY = {str(ROOT)!r}"
    NotebookClient(notebook, timeout=3_000, kernel_name="host", resources={"metadata": {"path": str(work)}}).execute()

    def printed(name: str) -> str:
        return "".join(output.get("text", "") for output in cells[name].outputs)

    assert any("image/png" in output.get("data", {}) for output in cells["loss"].outputs)
    first, last = (float(number) for number in re.findall(r"(\d+\.\d+) after", printed("bits")))
    assert last < first - 1  # the first is of the untrained model, 3.5
    assert "def read(self, path):" in printed("sample")
    made = Path(os.path.realpath(work / "first_model" / "artifacts" / "checkpoints" / "latest"))
    assert (made / "model.safetensors").is_file()
