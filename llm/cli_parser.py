"""The parsers of the command line: one-line errors, defaults from the sources of functions, numbers as people write."""

import argparse
import ast
import contextlib
import difflib
import importlib.util
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from llm import launchers
from llm.errors import UserError, visible

LAUNCHER_SECONDS = 2
"""How long a process that fails waits for the one that prints why: a launcher ends all as soon as one has failed."""


class Parser(argparse.ArgumentParser):
    """Shows control characters of arguments, such as names of files, as escapes."""

    def error(self, message: str) -> NoReturn:
        with contextlib.suppress(UserError):
            launchers.fill_environment()
            if not launchers.speaks():
                time.sleep(LAUNCHER_SECONDS)
                self.exit(2)
        super().error(message)

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(visible(message), file)


class VerbParser(Parser):
    """The parser of one verb."""

    functions: dict[str, str]
    """{option: "module:function"}: the functions of the verb, each with the option that selects it ("": no option)."""
    check = ""
    """The function, as in `functions`, that checks some options in a moment, without torch; empty: none."""
    when_interrupted = "it ends without a result; the same command begins again"
    """What Ctrl-C does."""
    ending: tuple[str, str] | None = None
    """What the verb wrote and the next command, for `_describe_ending`; None: it writes nothing."""
    on_every_rank = False
    """Whether the processes of a launcher share the work. Otherwise rank 0 does it and the others wait."""

    flag = argparse.ArgumentParser.add_argument

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # Before argparse, which would report a required flag as missing if its name is misspelt.
        for word in args or ():
            flag = word.partition("=")[0]
            # argparse treats a word with a blank as a value (a prompt, for example), even if it begins with dashes.
            if flag.startswith("--") and " " not in flag and flag != "--" and flag not in self._option_string_actions:
                self.error(f"unknown flag {flag}{_nearest(flag, self._option_string_actions)}")
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        # Only for help: while parsing, a default would look like an option that was given.
        self.show_defaults()
        return super().format_help()

    def show_defaults(self) -> None:
        """Puts the functions' defaults where the flags' help texts look for them."""
        for action in self._actions:
            for function in self.functions.values():
                default = function_parameters(function).get(action.dest)
                if default is not None:
                    with contextlib.suppress(ValueError):  # a constant of another module
                        action.default = ast.literal_eval(default)

    def options(self) -> list[str]:
        """The names under which a verb's function gets what was given."""
        return [action.dest for action in self._actions if action.dest not in ("help", "json")]

    def display_name(self, option: str) -> str:
        """The option as a user writes it: its flag, or the name of a positional argument in capitals."""
        return next(
            (a.option_strings[0] for a in self._actions if a.dest == option and a.option_strings), option.upper()
        )


class MainParser(Parser):
    """The parser of the whole command line."""

    verbs: dict[str, VerbParser]

    # argparse's own message lists all verbs and suggests none.
    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.dest == "verb" and value not in (action.choices or ()):
            raise argparse.ArgumentError(None, f"unknown verb {value}{_nearest(value, action.choices or ())}")
        super()._check_value(action, value)


class PrintCompletion(argparse.Action):
    """Prints a shell's completion script and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        import shtab

        assert isinstance(parser, MainParser)
        # shtab writes the flags' help texts into the script, with their defaults.
        for verb in parser.verbs.values():
            verb.show_defaults()
        print(shtab.complete(parser, values))
        parser.exit()


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


@cache
def function_parameters(function: str) -> dict[str, ast.expr | None]:
    """The parameters of "module:function" and their defaults (None: no default), read from the source.

    inspect.signature would have to import the module, and torch with it.
    """
    module, name = function.split(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    body = ast.parse(Path(spec.origin).read_text("utf-8")).body
    constants = {ast.unparse(node.targets[0]): node.value for node in body if isinstance(node, ast.Assign)}
    arguments = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == name).args
    # `defaults` belong to the last of the positional parameters; `kw_defaults` has a None where there is no default.
    required = len(arguments.args) - len(arguments.defaults)
    names = [argument.arg for argument in (*arguments.args, *arguments.kwonlyargs)]
    defaults = [*[None] * required, *arguments.defaults, *arguments.kw_defaults]
    return {
        # A default may be a constant of the module.
        name: constants.get(default.id, default) if isinstance(default, ast.Name) else default
        for name, default in zip(names, defaults, strict=True)
    }


def whole(text: str) -> int:
    """An integer as in an override: also 200_000_000, 200M or 1e6."""
    from llm.config_text import read_value

    value = read_value(text, int)
    if not isinstance(value, int) or isinstance(value, bool):
        raise argparse.ArgumentTypeError(f"{text} is no whole number")
    return value


def positive(text: str) -> int:
    if (value := whole(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def numbers(text: str) -> list[int]:
    """One number; or for A..B the powers of two times A up to B."""
    first, _, last = text.partition("..")
    numbers = [positive(first)]
    while numbers[-1] < (positive(last) if last else 1):
        numbers.append(min(2 * numbers[-1], positive(last)))
    return numbers


def above_zero(text: str) -> float:
    # Negated as a whole, so that NaN is refused too.
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value
