"""The command line: `llm VERB`, the same as `python -m llm VERB`.

cli_verbs.py has every verb, its flags and the function that it calls; cli_parser.py how they are parsed. Here a verb is
prepared and run: on one process or on every rank, with one-line errors, exit codes, and one JSON object on stdout.
"""

import contextlib
import importlib
import os
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llm import launchers
from llm.cli_parser import LAUNCHER_SECONDS, VerbParser, function_parameters
from llm.cli_verbs import make_parser
from llm.errors import STOPPED, ReportedByRank0, UserError, exit_code
from llm.interrupts import INTERRUPTED, deferred, ended_by_ctrl_c


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code.

    0 on success, 1 after a one-line error, 75 if `train` was stopped and can go on, 130 after Ctrl-C.
    """
    # DeepSpeed compiles C++ at run time with the ninja in this Python's environment, which need not be on PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    # Threads that spin while they wait make a step on busy cores several times slower; idle cores lose nothing.
    # It is set before torch is imported, because OpenMP reads it when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        # A terminal need not be UTF-8, and a name need not be valid text: both are shown with escapes.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    parser = make_parser()
    namespace, rest = parser.parse_known_args(arguments)
    options = vars(namespace)
    if rest and ("overrides" not in options or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse fills a positional argument only once, so overrides after the flags are left over
        options["overrides"] = options["overrides"] + rest
    verb, as_json = parser.verbs[options.pop("verb")], options.pop("json")
    options.pop("local_rank", None)

    def run() -> int:
        begin = time.perf_counter()
        with _told_by_one_process():
            function = _prepare(verb, options, as_json)
        result = _call(function, options)
        # Under torchrun or deepspeed every rank comes here, but stdout should have one object.
        if as_json and launchers.rank() == 0:
            from llm.metrics import to_json

            print(to_json(result), flush=True)
        # A stopped run has said that it can go on.
        if verb.ending and launchers.rank() == 0 and result and not result.get("stopped"):
            from llm.display import tell

            tell(_describe_ending(verb.ending, options | result, time.perf_counter() - begin), sys.stderr)
        # After the output, so that a program still gets the whole result.
        if failed := result.get("failed"):
            raise UserError(f"failed: {', '.join(failed)}; see above")
        if not result.get("stopped"):  # of a run that was stopped, only rank 0 has a result
            return 0
        from llm.training.failure_detector import wait_for_other_processes

        # A launcher ends the others when it sees an exit code that is not 0.
        wait_for_other_processes(60)
        return STOPPED

    def run_here() -> int:
        # First, because an error's line names the rank.
        launchers.fill_environment()
        if verb.on_every_rank or launchers.world_size() == 1:
            return run()
        # Otherwise all ranks would write the same files.
        from llm.rendezvous import run_on_rank_0

        run_on_rank_0(run)
        return 0

    with ended_by_ctrl_c(verb.when_interrupted) as interrupted:
        try:
            code = exit_code(run_here)
        except BaseException:
            # Libraries turn a KeyboardInterrupt into errors of their own, such as a failed import.
            if not interrupted.is_set():
                raise
            code = INTERRUPTED
    return INTERRUPTED if code and interrupted.is_set() else code


def _describe_ending(ending: tuple[str, str], values: dict[str, Any], seconds: float) -> str:
    """The last line of a verb that writes something: how long it took, what it wrote, and the next command.

    ending: what was written and the next command, with the names of options and results in braces.
    """
    from llm.config import Config

    quoted = {
        name: " ".join(map(shlex.quote, map(str, value))) if isinstance(value, list) else shlex.quote(str(value))
        for name, value in values.items()
    }
    if isinstance(config := values.get("config"), Config):
        quoted["run"] = shlex.quote(config.checkpoint.dir)
        # A run without validation has no best checkpoint; of others, the last may be a worse model.
        quoted["best"] = shlex.quote(str(values.get("best") or values.get("checkpoint")))
    # Also without a value that an older run's result lacks.
    wrote, following = (text.format_map(defaultdict(str, quoted)) for text in ending)
    took = f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} minutes"
    return f"done in {took}: {wrote}" + (f"; next: {following}" if following else "")


_PATHS = (
    *(
        "inputs",
        "model_prefix",
        "tok",
        "out_dir",
        "output",
        "config",
        "config_path",
        "path",
        "ckpt",
        "resume",
        "prompts",
    ),
    *("exclude", "include_path", "run_dir", "run_dirs", "run_a", "run_b", "source", "png", "write", "picture"),
)
"""Parameters that are paths, or lists of them."""


def _expand_paths(verb: VerbParser, options: dict[str, Any]) -> None:
    """Replaces `~`, which a shell leaves as it is behind a `=` and in quotes.

    Raises UserError for an empty path, and for a URL.
    """
    from llm.config_text import is_url

    for option in options.keys() & set(_PATHS):
        value = options[option]
        for path in value if isinstance(value, list) else [value]:
            # Path("") would be the current folder.
            if path == "":
                raise UserError(f"{verb.display_name(option)} '': is empty; name a file or a folder")
            if is_url(str(path)):
                raise UserError(
                    f"{path}: commands read and write files of this machine, and only data.path of a config may be in "
                    "an object store; copy it with the store's own program, such as aws s3 sync"
                )
        expanded = os.path.expanduser
        options[option] = list(map(expanded, value)) if isinstance(value, list) else value and expanded(value)


@contextlib.contextmanager
def _told_by_one_process() -> Iterator[None]:
    """Lets one process of each machine print an error that all of them meet before they know each other."""
    try:
        yield
    except (UserError, OSError):
        if launchers.speaks():
            raise
        time.sleep(LAUNCHER_SECONDS)
        raise ReportedByRank0("another process prints why") from None


def _prepare(verb: VerbParser, options: dict[str, Any], as_json: bool) -> str:
    """Returns the function that the options select, and leaves its arguments in `options`.

    Raises UserError for options that do not go together, and for what can be found before torch is imported.
    """
    name = verb.display_name
    # "" needs no option, so it comes last in `functions`.
    selecting = next((option for option in verb.functions if option in options or not option), None)
    if selecting is None:
        raise UserError(f"{verb.prog} needs {' or '.join(map(name, verb.functions))}")
    parameters = function_parameters(verb.functions[selecting])
    for option in sorted(options.keys() - parameters.keys() - {selecting, "overrides"}):
        if option in verb.functions:
            raise UserError(f"{verb.prog} takes {name(selecting)} or {name(option)}, not both")
        owner = next(other for other, function in verb.functions.items() if option in function_parameters(function))
        if not owner:  # the function that no option selects
            raise UserError(f"{name(option)} does not go with {name(selecting)}; leave one of them out")
        raise UserError(f"{name(option)} goes with {name(owner)}; add {name(owner)}, or leave {name(option)} out")
    _expand_paths(verb, options)
    # An option such as --kernels only selects the function.
    if selecting not in parameters:
        options.pop(selecting, None)
    # A function with a parameter `overrides` loads the config itself.
    if "overrides" in options.keys() - parameters.keys():
        from llm.config_file import load_config

        options["config"] = load_config(options["config"], options.pop("overrides"))
    if "say" in parameters:  # prints a line for people; with --json, stdout is for the JSON object only
        from llm.display import tell

        options["say"] = partial(tell, file=sys.stderr if as_json else sys.stdout)
    if "show" in parameters:  # whether to show the result to people
        options["show"] = not as_json
    # Checked here, because Python's TypeError would not name the flag.
    for option, default in parameters.items():
        if default is None and option not in options:
            raise UserError(f"{name(selecting)} needs {name(option)}")
    # Before the import of torch, which takes seconds. Of several processes only rank 0 checks, when all have come.
    if verb.check and launchers.world_size() == 1:
        checked = {name: options[name] for name in function_parameters(verb.check) if name in options}
        check_module, check = verb.check.split(":")
        getattr(importlib.import_module(check_module), check)(**checked)
    return verb.functions[selecting]


def _call(function: str, options: dict[str, Any]) -> dict[str, Any]:
    """Calls "module:function"."""
    module, name = function.split(":")
    with deferred():
        imported = importlib.import_module(module)
    result: dict[str, Any] = getattr(imported, name)(**options)
    return result
