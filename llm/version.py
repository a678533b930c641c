"""The version of the program, which pyproject.toml reads here, and the commit of its source."""

import os
import subprocess
from pathlib import Path

__version__ = "0.1.0"

ROOT = Path(__file__).resolve().parent.parent


def source_commit() -> str | None:
    """Returns the git commit of the source, with `-dirty` if files differ from it; None outside a git checkout.

    LLM_COMMIT states it for a copy of the source whose .git is missing or of another commit.
    """
    if stated := os.environ.get("LLM_COMMIT"):
        return stated
    if not (ROOT / ".git").exists():  # perhaps installed inside another repository
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except FileNotFoundError:
        return None
