"""The command line: `llm VERB`, the same as `python -m llm VERB`.

Each flag is declared once, here, and passed to the verb's function as a keyword argument. A flag that is not given is
left out where the function has a default for it. Functions are named by strings and imported when a verb runs, because
importing torch takes seconds that `--help` and the tokenizer need not wait for.
"""

import argparse
import ast
import contextlib
import difflib
import importlib
import importlib.util
import os
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

from llm import launchers
from llm.errors import STOPPED, ReportedByRank0, UserError, exit_code, visible
from llm.interrupts import INTERRUPTED, deferred, ended_by_ctrl_c
from llm.version import __version__

DOCUMENTS_HELP = (
    "what one document is in text: line, paragraph (the lines between empty lines), file (of a folder all text, also "
    ".md or .py), or auto (file if the first MiB holds an empty line, else line); of JSON and tables always a record"
)
LAUNCHER_SECONDS = 2
"""How long a process that fails waits for the one that prints why: a launcher ends all as soon as one has failed."""
TEXT_KEY_HELP = "key of the text in JSON (a.b: key b of the object a), column in a table (default %(default)s)"


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
    # Also without a value that an older run's result lacks.
    wrote, following = (text.format_map(defaultdict(str, quoted)) for text in ending)
    took = f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} minutes"
    return f"done in {took}: {wrote}" + (f"; next: {following}" if following else "")


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


class _PrintCompletion(argparse.Action):
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
        raise UserError(f"{name(option)} goes with {name(owner)}; add {name(owner)}, or leave {name(option)} out")
    _expand_paths(verb, options)
    # An option such as --kernels only selects the function.
    if selecting not in parameters:
        options.pop(selecting, None)
    # A function with a parameter `overrides` loads the config itself.
    if "overrides" in options.keys() - parameters.keys():
        from llm.config import load_config

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


def make_parser() -> MainParser:
    """Makes the parser of the command line, with one parser per verb."""
    parser = MainParser(
        prog="llm",
        description="From raw text to a trained, evaluated, exportable language model.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=f"llm-from-scratch {__version__}")
    completion = parser.add_argument("--print-completion", choices=["bash", "zsh"], action=_PrintCompletion)
    completion.help = "print a shell's completion script"
    # The deepspeed launcher passes it. The environment has the same number.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=VerbParser)
    parser.verbs = verbs.choices
    add_verb = partial(_add_verb, verbs)

    verb = add_verb(
        "corpus",
        {"source": "llm.data.corpus:write_stdlib_corpus"},
        "write text that this machine already has, as jsonl",
        "llm corpus --source stdlib --output data/raw/corpus.jsonl",
        "output, documents, bytes, dropped",
    )
    verb.ending = ("{output}", "llm train_tokenizer --input {output} --model_prefix artifacts/tokenizer/llm_spm")
    verb.flag("--source", choices=["stdlib"], required=True, help="stdlib: this Python's standard library")
    verb.flag("--output", required=True, help="the .jsonl file to write")

    verb = add_verb(
        "download",
        {"": "llm.data.download:download"},
        "fetch the text of a data set from the Hugging Face Hub",
        "llm download fineweb-edu --tokens 3e9 --out_dir data/raw",
        "out_dir, files, bytes, tokens, repository, commit",
    )
    verb.when_interrupted = "it ends; the same command goes on where it stopped"
    verb.ending = ("{out_dir}", "llm prepare_data --input {out_dir} --vocab_size 32000 --out_dir data/shards")
    verb.flag(
        "name", metavar="NAME", help="fineweb-edu, climbmix, tinystories, wikitext, or hf:OWNER/NAME with --files"
    )
    verb.flag("--out_dir", required=True, help="the files go to OUT_DIR/NAME")
    verb.flag("--tokens", type=_positive, help="take only as many files as have about so many tokens (default: all)")
    verb.flag(
        "--files",
        nargs="+",
        metavar="PATTERN",
        help="files of the repository, such as 'data/train-*.parquet'; * stands for any characters, also slashes",
    )

    verb = add_verb(
        "train_tokenizer",
        {"": "llm.data.tokenizer:train_tokenizer"},
        "train a tokenizer that keeps every text: SentencePiece BPE with byte fallback, or byte-level BPE",
        "llm train_tokenizer --input data/raw/corpus.txt --model_prefix artifacts/tokenizer/llm_spm --vocab_size 32000",
        "vocab_size",
    )
    verb.ending = ("{model}", "llm prepare_data --input {inputs} --tok {model} --out_dir data/shards")
    _add_input(verb)
    verb.flag(
        "--model_prefix", required=True, help="the files to write are PREFIX.model (bytelevel: .json) and PREFIX.vocab"
    )
    verb.flag(
        "--kind",
        choices=["sentencepiece", "bytelevel"],
        help="bytelevel: over bytes, in text split with GPT-4's pattern (default %(default)s)",
    )
    verb.flag("--digits", type=_whole, choices=[1, 2, 3], help="most digits of a token (default: any; bytelevel: 3)")
    verb.flag(
        "--vocab_size", type=_whole, default=32_000, help="number of tokens in the vocabulary (default %(default)s)"
    )
    verb.flag("--strict_vocab_size", action="store_true", help="fail if the corpus is too small for --vocab_size")

    verb = add_verb(
        "prepare_data",
        {"": "llm.data.prepare:prepare_data"},
        "turn text into shards of tokens",
        "llm prepare_data --input data/raw/corpus.txt --tok artifacts/tokenizer/llm_spm.model --seq_len 2048 "
        "--shard_tokens 200_000_000 --out_dir data/shards",
        "train_tokens, val_tokens, documents, dropped, bytes_per_token, dataset_hash",
    )
    verb.when_interrupted = "it ends; the same command goes on from the last whole shard"
    verb.ending = ("{out_dir}", "llm train --config configs/125m.json data.path={out_dir}")
    _add_input(verb)
    # A default of its own, because --vocab_size may take its place.
    verb.flag("--tok", default=None, help="a .model or .json file, tiktoken ranks as FILE:SPLIT, or a folder")
    verb.flag(
        "--vocab_size", type=_positive, help="in place of --tok: train a tokenizer of so many tokens on the input first"
    )
    verb.flag(
        "--tokens",
        choices=["auto", "uint16", "uint32"],
        help="the input is token ids of --tok, of this type (nanoGPT: uint16; auto: llm.c and Megatron-LM tell it)",
    )
    verb.flag("--out_dir", required=True, help="the directory of shards to make")
    verb.flag("--seq_len", type=_whole, default=2048, help="default sequence length in training (default %(default)s)")
    verb.flag("--shard_tokens", type=_whole, default=200_000_000, help="tokens per shard (default %(default)s)")
    verb.flag("--val_fraction", type=float, help="fraction held out for validation (default %(default)s)")
    verb.flag(
        "--dedup",
        choices=["off", "exact"],
        help="exact: keep only the first of equal documents; needs 110 bytes of memory per document "
        "(default %(default)s)",
    )
    verb.flag(
        "--exclude",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="evaluation texts, or task:NAME of lm-evaluation-harness: leave out documents that share a run of words",
    )
    verb.flag("--ngram", type=_positive, help="with --exclude: words of such a run (default %(default)s)")
    verb.flag("--workers", type=_whole, help="number of processes (default: one per core)")
    verb.flag(
        "--ray",
        metavar="auto|HOST:PORT",
        help="encode on all CPUs of this Ray cluster instead; its nodes need the file of --tok (pip install ray)",
    )

    verb = add_verb(
        "train",
        {"": "llm.training.train:train"},
        "train a model, in one process or in many under deepspeed, torchrun or srun",
        "llm train --config configs/125m.json optimizer.lr=3e-4 train.total_tokens=200_000_000",
        "step, tokens, train_loss, val_loss, bits_per_byte, tokens_per_second, mfu, checkpoint, best; "
        "of a run that ended early, with exit code 75, also stopped",
    )
    verb.ending = ("{checkpoint}", "llm generate --ckpt {checkpoint} --prompt TEXT, llm report {run}")
    verb.on_every_rank = True
    verb.check = "llm.training.resolve:check_data"
    verb.when_interrupted = "it ends before the first step; the same command begins again"
    _add_config(verb, "a JSON file such as configs/125m.json", "replaces a key of the config")
    verb.flag("--resume", metavar="auto|never|PATH", help="auto: continue from the newest checkpoint, if there is one")

    verb = add_verb(
        "config",
        {"": "llm.tools.config_keys:describe_config"},
        "describe the keys of a config: type, allowed values, default and meaning",
        "llm config optimizer",
        "keys; with --format schema: schema",
    )
    verb.flag(
        "name", nargs="?", help="a section such as optimizer, or a key such as model.n_layers (default: all keys)"
    )
    verb.flag(
        "--format",
        choices=["text", "markdown", "schema"],
        help="text; markdown: docs/config.md; schema: a JSON schema for editors (default %(default)s)",
    )

    verb = add_verb(
        "plan",
        {"": "llm.tools.plan:forecast"},
        "estimate what a run needs before it starts: memory by part, micro-batch, speed, hours",
        "llm plan --config configs/1.3b.json --gpus 8 --memory_gb 80 --device H100",
        "parameters, memory_bytes, micro_batch, tokens_per_second, hours, device_hours, cost, expected_loss, "
        "expected_loss_band, expected_bits_per_byte, state_bytes, activation_bytes, traffic_bytes, checkpoint_bytes, "
        "save_minutes, flops_per_token, choices, recommended, scaling, assumed",
    )
    verb.check = "llm.tools.first_checks:check_config"
    _add_config(verb, "a JSON file such as configs/125m.json", "replaces a key of the config", dest="path")
    verb.flag(
        "--gpus",
        type=_numbers,
        metavar="N",
        help="number of devices, one process each (default 1); 1..64: a table of the powers of two",
    )
    verb.flag(
        "--memory_gb",
        type=_above_zero,
        help="memory of one device (default: the datasheet's): the micro-batch is lowered until it fits",
    )
    verb.flag(
        "--device",
        dest="device_name",
        metavar="NAME",
        help="a GPU such as H100, with its datasheet values (default: this machine, measured)",
    )
    verb.flag(
        "--mfu",
        type=_above_zero,
        help="fraction of the device's matmul rate in training (default: as measured, else 0.4)",
    )
    verb.flag("--node_gpus", type=_positive, help="devices of one machine (default %(default)s)")
    verb.flag(
        "--network_gbs",
        type=_above_zero,
        help="GB/s of each device between machines, one direction (default %(default)s: 400 Gbit/s InfiniBand)",
    )
    verb.flag(
        "--hours",
        type=_above_zero,
        help="choose the shape of the model and train.total_tokens for the least loss in this time",
    )
    verb.flag("--write", metavar="FILE", help="write the config that --hours has chosen")
    verb.flag("--price", type=_above_zero, help="of one device for an hour, for the cost of the run")
    verb.flag(
        "--mtbf_hours",
        type=_above_zero,
        help="mean time between failures of one device: how often to save",
    )
    verb.flag("--picture", metavar="FILE", help="a PNG of the speed over the numbers of --gpus")

    verb = add_verb(
        "launch",
        {"": "llm.tools.launch:write_launch"},
        "write the files that start a training on a cluster, and say how to start them",
        "llm launch slurm --config configs/1.3b.json --nodes 2 --out_dir launch",
        "files, start, hours",
    )
    verb.check = "llm.tools.first_checks:check_config"
    verb.flag("kind", choices=["slurm", "hosts", "k8s", "skypilot"], help="how the cluster starts programs")
    _add_config(verb, "a JSON file such as configs/125m.json", "replaces a key of the config")
    verb.flag("--out_dir", required=True, help="the folder to write into, which all machines see")
    verb.flag("--nodes", type=_positive, help="number of machines (default %(default)s)")
    verb.flag("--gpus", type=_positive, help="GPUs in each machine (default %(default)s)")
    verb.flag("--device", dest="device_name", metavar="NAME", help="a GPU such as H100 (default %(default)s)")
    verb.flag("--max_hours", type=_above_zero, help="of one job; the run goes on in the next (default %(default)s)")
    verb.flag("--hosts", nargs="+", metavar="HOST", help="names of the machines, for hosts")
    verb.flag("--image", help="the container, for k8s (default %(default)s)")

    verb = add_verb(
        "eval",
        {"inputs": "llm.inference.evaluate:evaluate", "tasks": "llm.inference.eval_tasks:evaluate_tasks"},
        "score text or run lm-evaluation-harness tasks, in one process or in many under deepspeed, torchrun or srun",
        "llm eval --ckpt artifacts/checkpoints/latest --input data/raw/val.txt",
        "nll_per_token, perplexity, bits_per_byte, tokens, bytes, documents, bits_per_character, characters, "
        "nll_per_token_stderr, bits_per_byte_stderr, inputs; with --tasks: results, versions, "
        "n-shot, n-samples",
    )
    verb.check = "llm.tools.first_checks:check_eval"
    verb.on_every_rank = True
    what = verb.add_mutually_exclusive_group(required=True)
    _add_input(
        verb,
        what,
        "files or folders of text as for prepare_data, or directories of shards (their validation split)",
    )
    what.add_argument(
        "--tasks",
        nargs="+",
        action="extend",
        metavar="TASK",
        help="tasks of lm-evaluation-harness, separated by blanks or commas (pip install 'llm-from-scratch[eval]')",
    )
    verb.flag("--include_path", metavar="DIR", help="with --tasks: a folder with the .yaml files of your own tasks")
    verb.flag("--num_fewshot", type=_whole, metavar="N", help="with --tasks: examples before each question")
    verb.flag("--limit", type=_whole, metavar="N", help="with --tasks: only the first N documents of each task")
    _add_checkpoint(verb)
    verb.flag("--batch_size", type=_whole, help="sequences at a time (default %(default)s)")
    verb.flag(
        "--stride",
        type=_whole,
        metavar="N",
        help="for a document longer than the model's sequences: predict N tokens per window; a smaller N gives each "
        "token more context and takes longer (default: the sequence length)",
    )
    verb.flag("--compress", action="store_true", help="also compress the same bytes with xz -9 and zstd -19")

    verb = add_verb(
        "profile",
        {"": "llm.tools.profile_step:profile"},
        "run some training steps and show how long each part takes",
        "llm profile --config configs/125m.json train.micro_batch=8 --steps 30",
        "step_ms, tokens_per_second, mfu, mfu_causal, matmul_fraction, data_wait_ms, forward_ms, backward_ms, "
        "optimizer_ms, communication_ms, profiled_step_ms, work, operators, gaps, idle_ms, gpu_busy, our_kernels, "
        "trace, memory_png, data",
    )
    verb.on_every_rank = True
    verb.ending = ("{out_dir}", "")
    _add_config(verb, "as for train; random tokens replace data that does not exist", "replaces a key of the config")
    verb.flag("--steps", type=_whole, default=20, help="steps to time without the profiler (default %(default)s)")
    verb.flag(
        "--out_dir", default="artifacts/profile", help="folder for the trace and the pictures (default %(default)s)"
    )

    verb = add_verb(
        "report",
        {"": "llm.tools.report:report"},
        "draw the metrics of one or several runs: a page for a browser, and pictures",
        "llm report artifacts/checkpoints",
        "report, pictures, runs",
    )
    verb.ending = ("{report}", "")
    verb.flag("run_dirs", nargs="+", metavar="RUN_DIR", help="a run's folder, the checkpoint.dir of its config")
    verb.flag("--out_dir", metavar="DIR", help="folder to write to (default: report in the first RUN_DIR)")

    verb = add_verb(
        "generate",
        {"": "llm.inference.generate:generate"},
        "continue a prompt",
        'llm generate --ckpt artifacts/checkpoints/latest --prompt "Once upon a time" --max_new_tokens 100',
        "text, tokens, tokens_per_second, prefill_seconds, decode_seconds, completions",
    )
    verb.check = "llm.tools.first_checks:check_generate"
    _add_checkpoint(verb)
    prompts = verb.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="the text to continue; - reads it from stdin")
    prompts.add_argument(
        "--prompts",
        metavar="FILE",
        help='a file with one prompt per line, in a .jsonl as {"prompt": ...}; - reads stdin',
    )
    verb.flag("--num_samples", type=_whole, help="continuations per prompt (default %(default)s)")
    verb.flag("--batch_size", type=_whole, help="continuations to generate at once (default %(default)s)")
    verb.flag("--max_new_tokens", type=_whole, help="tokens to generate at most (default %(default)s)")
    verb.flag("--temperature", type=float, help="0: always take the most likely token (default %(default)s)")
    verb.flag("--top_k", type=_whole, help="sample among the K most likely tokens")
    verb.flag("--top_p", type=float, help="sample among the most likely tokens that together have this probability")
    verb.flag("--min_p", type=float, help="sample among tokens with at least this fraction of the highest probability")
    verb.flag(
        "--repetition_penalty",
        type=float,
        help="above 1: makes tokens that already occurred less likely (default %(default)s)",
    )
    verb.flag("--stop", action="append", metavar="TEXT", help="end before this text; may be given several times")
    verb.flag("--seed", type=_whole, help="seed of the sampling (default %(default)s)")

    verb = add_verb(
        "export",
        {"": "llm.tools.export:export"},
        "write a checkpoint's model for other programs",
        "llm export --ckpt artifacts/checkpoints/latest --out_dir artifacts/export --precision bf16",
        "out_dir, format, precision, parameters, files, bytes",
    )
    verb.check = "llm.tools.first_checks:check_export"
    verb.ending = ("{out_dir}", "")
    verb.flag("--ckpt", required=True, help="a checkpoint, or a run's folder (its latest)")
    verb.flag("--out_dir", required=True, help="the folder to make")
    verb.flag(
        "--format",
        choices=["hf", "gguf"],
        help="hf: a Hugging Face model folder; gguf: one file for llama.cpp (default %(default)s)",
    )
    verb.flag("--precision", choices=["fp32", "bf16"], help="dtype of the weights (default %(default)s)")
    verb.flag("--max_file_bytes", type=_whole, help="bytes of weights per file (default %(default)s)")

    verb = add_verb(
        "import",
        {"": "llm.tools.import_model:import_hf"},
        "make a checkpoint from a Hugging Face folder with a model of the Llama family",
        "llm import --from downloads/model --out_dir artifacts/imported",
        "out_dir, parameters, model, command",
    )
    verb.check = "llm.tools.first_checks:check_import"
    verb.ending = ("{out_dir}", "llm generate --ckpt {out_dir} --prompt TEXT")
    verb.flag("--from", dest="source", required=True, metavar="DIR", help="the Hugging Face folder")
    verb.flag("--out_dir", required=True, help="the checkpoint to make; train.init_from takes it")
    verb.flag("--tok", help="the model's tokenizer (default: the one in DIR)")
    verb.flag("--max_seq_len", type=_positive, help="longest sequence of the new model (default: that of the source)")
    verb.flag(
        "--rope_scaling",
        choices=["linear", "llama3", "yarn"],
        help="scale RoPE for the longer sequences (default: as in the source)",
    )

    verb = add_verb(
        "average",
        {"": "llm.tools.average:average"},
        "write the mean of a run's last checkpoints as a model folder",
        "llm average artifacts/checkpoints --last 3 --out_dir artifacts/average",
        "out_dir, parameters, checkpoints",
    )
    verb.check = "llm.tools.first_checks:check_average"
    verb.ending = ("{out_dir}", "llm eval --ckpt {out_dir} --input FILE")
    verb.flag("run_dir", metavar="RUN", help="a run's folder, the checkpoint.dir of its config")
    verb.flag("--last", type=_positive, metavar="N", help="checkpoints to average (default: all, but at most 5)")
    verb.flag("--out_dir", required=True, help="the folder to make; train.init_from takes it, too")

    verb = add_verb(
        "compare",
        {"": "llm.tools.compare:compare"},
        "say from which step on two runs differ, in which number and which tensor first; fails if they do",
        "llm compare artifacts/checkpoints artifacts/again",
        "same, step, metric, tensor, steps, checkpoints, failed",
    )
    verb.check = "llm.tools.first_checks:check_compare"
    verb.flag("run_a", metavar="RUN_A", help="a run's folder, the checkpoint.dir of its config")
    verb.flag("run_b", metavar="RUN_B", help="the other run's")

    verb = add_verb(
        "doctor",
        {"kernels": "llm.tools.doctor:check_kernels", "": "llm.tools.doctor:describe_machine"},
        "check this machine, or all machines of a launcher; with --kernels, compare every kernel with plain torch at "
        "the sizes of a config",
        "llm doctor --config configs/125m.json",
        "versions, devices, cpu, crc32c, kernels, measured, findings, warnings, failed, under a launcher ranks and "
        "network; with --kernels: device, checks, failed, under a launcher ranks",
    )
    verb.on_every_rank = True
    verb.flag(
        "--kernels",
        action="store_true",
        help="check the kernels; takes a minute or two; under a launcher also whether all ranks compute the same bits",
    )
    verb.check = "llm.tools.first_checks:check_config"
    verb.flag(
        "--config",
        dest="config_path",
        metavar="CONFIG",
        help="the config whose folders are checked; with --kernels: whose sizes are, such as configs/125m.json",
    )
    verb.flag(
        "--seconds",
        type=_above_zero,
        help="how long the device computes while its rates are measured (default %(default)s)",
    )
    verb.flag(
        "--backend",
        choices=["auto", "triton", "cpp", "torch"],
        help="with --kernels: the backend to check (default: the value of LLM_KERNELS)",
    )

    verb = add_verb(
        "inspect",
        {"path": "llm.tools.inspect_files:inspect", "text": "llm.tools.inspect_files:inspect_text"},
        "show the contents of a directory of shards or a checkpoint, or the tokens of a text",
        "llm inspect data/shards --verify",
        "path, dataset_hash, tokenizer_sha256, vocab_size, seq_len, train, val, packing, counters, lengths, samples; "
        "with --verify also failed; of a checkpoint: path, step, tokens, parameters, data, model, files, with --verify "
        "path, checkpoints, failed; with --text: tokens, bytes, bytes_per_token, pieces",
    )
    verb.check = "llm.tools.first_checks:check_inspect"
    verb.flag("path", nargs="?", help="a directory of shards, a checkpoint, or a run's folder")
    verb.flag(
        "--verify",
        action="store_true",
        help="read all of every shard, or of a checkpoint or a run's checkpoints; name what is damaged, and fail",
    )
    verb.flag("--samples", type=_whole, help="number of samples to decode (default %(default)s)")
    verb.flag("--png", metavar="FILE", help="write a histogram of document lengths to this file")
    verb.flag("--tok", metavar="FILE", help="with --text: the tokenizer")
    verb.flag("--text", help="show the tokens that --tok makes of this text")
    return parser


def _add_verb(
    verbs: Any, name: str, functions: dict[str, str], summary: str, example: str, json_keys: str
) -> VerbParser:
    parser: VerbParser = verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        # Other formatters would join the lines of the example.
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # `parse_known_args` above compares whole names, and an abbreviation may become ambiguous with a new flag.
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # a flag that is not given leaves the function its own default
    )
    parser.functions = functions
    parser.add_argument(
        "--json",
        action="store_true",
        # Unlike the other flags it is always in the namespace: `main` takes it out there.
        default=False,
        help=f"print the result as one JSON object, the last line of stdout, with the keys {json_keys}",
    )
    return parser


def _whole(text: str) -> int:
    """An integer as in an override: also 200_000_000, 200M or 1e6."""
    from llm.config_text import read_value

    value = read_value(text, int)
    if not isinstance(value, int) or isinstance(value, bool):
        raise argparse.ArgumentTypeError(f"{text} is no whole number")
    return value


def _positive(text: str) -> int:
    if (value := _whole(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _numbers(text: str) -> list[int]:
    """One number; or for A..B the powers of two times A up to B."""
    first, _, last = text.partition("..")
    numbers = [_positive(first)]
    while numbers[-1] < (_positive(last) if last else 1):
        numbers.append(min(2 * numbers[-1], _positive(last)))
    return numbers


def _above_zero(text: str) -> float:
    # Negated as a whole, so that NaN is refused too.
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _add_input(
    parser: argparse.ArgumentParser,
    where: Any = None,
    what: str = "files, folders, quoted patterns: text, JSON, CSV, .parquet, .arrow, .tar, .gz ... (docs/data.md)",
) -> None:
    """where: a group of exclusive flags that --input is one of; None: --input is required."""
    # extend: a second --input adds to the first; otherwise it would replace it.
    (where or parser).add_argument(
        "--input", dest="inputs", required=where is None, nargs="+", action="extend", metavar="FILE", help=what
    )
    parser.add_argument("--documents", choices=["auto", "line", "file", "paragraph"], help=DOCUMENTS_HELP)
    parser.add_argument("--text_key", help=TEXT_KEY_HELP)
    parser.add_argument(
        "--strict",
        action="store_true",
        help="fail at the first document that cannot be used; otherwise it is left out and counted",
    )


def _add_config(parser: argparse.ArgumentParser, what: str, changes: str, dest: str = "config") -> None:
    parser.add_argument("--config", dest=dest, required=True, metavar="CONFIG", help=what)
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help=changes)


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", required=True, help="a checkpoint, or a run's folder (its latest)")
    parser.add_argument("--tok", help="the tokenizer (default: the one in the checkpoint)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", choices=["fp32", "bf16"])
