"""What rehearsals of `make gpu-check` share: tiny configs, the call as a process, and the exceptions in its output."""

import json
import re
import subprocess
import sys
from pathlib import Path

from running import REPOSITORY, environment


def tiny_configs(folder: Path) -> Path:
    """Makes a folder of configs in which both sizes are the tiny one's, because a processor takes long to fill large
    ones. Returns the path of 125m's.
    """
    tree = json.loads((REPOSITORY / "configs" / "tiny.json").read_text())
    (folder / "configs").mkdir()
    for name in ("125m", "1.3b"):
        (folder / "configs" / f"{name}.json").write_text(json.dumps({**tree, "$schema": ""}))
    return folder / "configs" / "125m.json"


def run(program: str, output: Path, python: Path = Path(sys.executable), **variables: str) -> str:
    """Returns stdout and stderr."""
    variables = environment() | variables | {"OUT": str(output)}
    to_one = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run([python, "-c", program], env=variables, cwd=REPOSITORY, **to_one).stdout


def exceptions(text: str) -> set[str]:
    """The last line of each traceback, without those of steps that were ended at their limit."""
    text = re.sub(r"^\[rank\d\]: ", "", text, flags=re.MULTILINE)
    raised = re.findall(r"^Traceback .*\n(?: .*\n)+(\w.*)", text, re.MULTILINE)
    return {line for line in raised if not line.startswith("KeyboardInterrupt")}
