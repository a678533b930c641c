"""The entry point of the command `llm`, and the check that the packages `llm` and `kernels` are this project's.

Other projects have packages of these names too: Simon Willison's command-line tool `llm`, and Hugging Face's `kernels`.
If one of them is installed, Python may import it instead of ours. This module has a unique name, so the command can
check the names before it imports these packages.
"""

import signal
import sys
from importlib.util import find_spec
from pathlib import Path

DISTRIBUTION = "llm-from-scratch"
PACKAGES = ("llm", "kernels")


def name_conflict() -> str | None:
    """Returns an error message if Python would import another project's package instead of ours; imports none of them.

    The docstring of each of our packages names the distribution. Comparing paths is not enough, because pip writes the
    files of two distributions into one folder if both have a package with that name.
    """
    for name in PACKAGES:
        # For a top-level name find_spec imports nothing.
        spec = find_spec(name)
        if spec is None:
            continue  # Python's own error message is better
        # A folder without __init__.py is a namespace package, which has no origin.
        if spec.origin is not None and DISTRIBUTION.encode() in Path(spec.origin).read_bytes():
            continue
        from importlib.metadata import packages_distributions  # takes 20 ms, which only the error message needs

        folder = [*(spec.submodule_search_locations or []), spec.origin][0]
        others = [other for other in packages_distributions().get(name, []) if other != DISTRIBUTION]
        way_out = f"pip uninstall {others[0]}" if others else "rename that folder"
        return (
            f"{folder} is another project's package {name}, found in the place of {DISTRIBUTION}'s: {way_out}, or give "
            f"{DISTRIBUTION} a virtual environment of its own (make setup)"
        )
    return None


def main() -> int:
    conflict = name_conflict()
    if conflict is not None:
        print(f"error: {conflict}", file=sys.stderr)
        return 1
    try:
        # After the check, because an import at the top could run another project's package.
        from llm import cli

        return cli.main()
    except KeyboardInterrupt:  # before cli.main answers it, or after
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        # Python's own end, which may take a second after torch, would else answer Ctrl-C with a traceback.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
