"""The command line itself: flags are those of the verbs' functions, and a misspelt name is answered with a hint."""

import ast
import importlib
import inspect
import io
import json
import re
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import environment, small_config

from llm import __version__, cli
from llm.cli import function_parameters, main, make_parser

Llm = Callable[..., tuple[int, str, str]]
VERBS = make_parser().verbs
FUNCTIONS = [function for verb in VERBS.values() for function in verb.functions.values()]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example_and_defaults(verb: str) -> None:
    text = VERBS[verb].format_help()
    assert f"example:\n  llm {verb} " in text
    assert "--json" in text
    assert "(default None)" not in text
    assert "==SUPPRESS==" not in text


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys; from llm.cli import make_parser\n"
        "for verb in make_parser().verbs.values(): verb.format_help()\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], env=environment()).returncode == 0


def test_a_tokenizer_is_trained_without_torch(small_corpus: Path, tmp_path: Path) -> None:
    program = "import sys; from llm.cli import main\nsys.exit(main(sys.argv[1:]) or 'torch' in sys.modules)"
    arguments = ["--input", small_corpus, "--model_prefix", tmp_path / "spm", "--vocab_size", "400"]
    command = [sys.executable, "-c", program, "train_tokenizer", *map(str, arguments)]
    assert subprocess.run(command, env=environment(), capture_output=True).returncode == 0


@pytest.mark.parametrize("function", FUNCTIONS)
def test_parameters_read_from_the_source_are_those_of_the_signature(function: str) -> None:
    module, name = function.split(":")
    if module == "llm.inference.eval_tasks":
        pytest.importorskip("lm_eval")
    signature = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    found = function_parameters(function)
    assert list(found) == list(signature)
    for parameter, default in found.items():
        if default is None or isinstance(default, ast.Name):  # the latter: a constant of another module
            assert (default is None) == (signature[parameter].default is inspect.Parameter.empty)
        else:
            assert ast.literal_eval(default) == signature[parameter].default


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_is_a_parameter_of_the_verbs_functions(verb: str) -> None:
    accepted = {name for function in VERBS[verb].functions.values() for name in function_parameters(function)}
    accepted |= {"config", "overrides"} if verb in ("train", "profile") else set()
    own = {option for option in VERBS[verb].functions if option}  # selects the function
    assert set(VERBS[verb].options()) <= accepted | own


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian", "--config", "x"], "unknown verb trian; did you mean train?"),
        (["train", "--confg", "x"], "unknown flag --confg; did you mean --config?"),
        (["eval", "--ckpt", "x", "--task=hellaswag"], "unknown flag --task; did you mean --tasks?"),
        (["train", "--config", "x", "--zzzzzz"], "unknown flag --zzzzzz\n"),
        (["report", "x", "-q"], "unrecognized arguments: -q"),
        (["corpus", "--source", "stdlib", "--output", "x", "y"], "unrecognized arguments: y"),
    ],
)
def test_what_is_unknown_is_answered_with_the_nearest(
    arguments: list[str], expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert expected in capfd.readouterr().err


def test_overrides_stand_before_and_after_flags(llm_here: Llm, write_config: Any, monkeypatch: Any) -> None:
    seen: dict[str, Any] = {}

    def train(**options: Any) -> dict[str, Any]:
        seen.update(options)
        return {}

    monkeypatch.setattr("llm.training.train.train", train)
    before, after = "train.seed=5", "train.total_tokens=1024"
    code, _, err = llm_here("train", before, "--config", write_config(), after, "--resume", "never", "train.seed=6")
    assert code == 0, err
    assert seen.keys() == {"config", "resume"}
    assert (seen["config"].train.seed, seen["config"].train.total_tokens, seen["resume"]) == (6, 1024, "never")
    code, _, err = llm_here("train", before, "--config", write_config())
    assert (code, seen["config"].train.seed) == (0, 5), err


@pytest.mark.parametrize("verb", VERBS)
def test_the_keys_of_json_are_a_plain_list(verb: str) -> None:
    (text,) = [action.help for action in VERBS[verb]._actions if action.dest == "json"]
    assert text.startswith("print the result as one JSON object, the last line of stdout, with the keys ")
    assert not re.search(r"[()]|,\s*,|,\s*;|,$", text)


def test_a_verb_ends_with_what_it_wrote_and_the_next_command(tmp_path: Path, llm_here: Llm) -> None:
    text = tmp_path / "a b.txt"
    text.write_text("one two three\n" * 50)
    prefix = tmp_path / "t"
    code, _, err = llm_here("train_tokenizer", "--input", text, "--model_prefix", prefix, "--vocab_size", 300)
    assert code == 0
    last = err.splitlines()[-1]
    assert re.fullmatch(r"done in \d+\.\d s: \S+/t\.model; next: .*", last)
    assert last.endswith(f"; next: llm prepare_data --input '{text}' --tok {prefix}.model --out_dir data/shards")


def test_what_a_verb_ends_with_are_names_of_its_options_and_results() -> None:
    results = {"train": {"run", "checkpoint", "best"}, "train_tokenizer": {"model"}, "report": {"report"}}
    for name, verb in VERBS.items():
        used = {field for text in verb.ending or () for _, field, _, _ in string.Formatter().parse(text) if field}
        assert used <= {*verb.options(), *results.get(name, ())}, name


def test_a_stdout_that_is_not_utf8_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr("llm.tools.inspect_files.inspect", lambda path, **_: print(path) or {"failed": [path]})
    assert main(["inspect", "naïve"]) == 1
    for stream in streams.values():
        stream.flush()
        assert b"na\\xefve" in stream.buffer.getvalue()


def test_the_command_line_in_an_error_is_visible(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--config", "x", "--\x1b]0;x\x07"])
    assert "unknown flag --\\x1b]0;x\\x07\n" in capfd.readouterr().err


def test_a_tilde_in_a_path_is_the_home_folder_and_no_path_is_empty(
    llm_here: Llm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 20)
    tokenizer = ["train_tokenizer", "--input=~/a.txt", "--vocab_size", 270]
    for prefix, made in {"~/t/": "t/tokenizer", "~/x.model": "x", "y": "y"}.items():
        assert llm_here(*tokenizer, f"--model_prefix={prefix}")[0] == 0
        assert (tmp_path / f"{made}.model").exists()
        assert (tmp_path / f"{made}.vocab").exists()
    # A folder of a tokenizer stands for it.
    assert llm_here("inspect", "--tok=~/t", "--text", "the")[0] == 0
    assert not (tmp_path / "~").exists()
    for flags in (["--input", "", "--model_prefix", "x"], ["--input", "a.txt", "--model_prefix", ""]):
        code, _, err = llm_here("train_tokenizer", *flags)
        assert code == 1
        assert "'': is empty" in err


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capfd.readouterr().out == f"llm-from-scratch {__version__}\n"


def completions(words: list[str], script: Path) -> list[str]:
    """What bash offers for the last word."""
    program = (
        f"source {script}; COMP_WORDS=({' '.join(map(repr, words))}); COMP_CWORD={len(words) - 1}; "
        f"_shtab_llm llm {words[-1]!r} {words[-2]!r}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    return done.stdout.split()


def test_bash_completes_verbs_flags_and_choices(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "bash"])
    assert ended.value.code == 0
    script = tmp_path / "completion"
    script.write_text(capfd.readouterr().out)
    assert completions(["llm", "train"], script) == ["train_tokenizer", "train"]
    assert completions(["llm", "eval", "--stri"], script) == ["--strict", "--stride"]
    assert completions(["llm", "export", "--format", "g"], script) == ["gguf"]


def test_zsh_gets_the_help_of_the_flags(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--print-completion", "zsh"])
    assert "sequences at a time (default 8)" in capfd.readouterr().out


def test_errors_in_config_data_and_paths_do_not_wait_for_torch(
    small_shards: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(small_config(small_shards, tmp_path / "run")))
    train = ["train", "--config", str(config)]
    missing = str(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    empty, ckpt = str(tmp_path / "empty"), str(random_checkpoint)
    calls = {
        "no such directory": [*train, f"data.path={missing}"],
        "unknown key": [*train, "train.steps=1"],
        "is above model.max_seq_len": [*train, "data.seq_len=512"],
        "is not a multiple of the sequence length 64": [*train, "train.global_batch_tokens=65"],
        "--resume": [*train, "--resume", missing],
        "train.init_from": [*train, f"train.init_from={missing}"],
        "no such checkpoint": ["eval", "--ckpt", missing, "--input", str(config)],
        "no such file": ["eval", "--ckpt", ckpt, "--input", missing],
        "not a checkpoint (no": ["generate", "--ckpt", empty, "--prompt", "x"],
        "no such tokenizer": ["generate", "--ckpt", ckpt, "--tok", missing, "--prompt", "x"],
        "--prompts names a text file": ["generate", "--ckpt", ckpt, "--prompts", missing],
        "not a checkpoint": ["export", "--ckpt", empty, "--out_dir", missing],
        "exists already": ["export", "--ckpt", ckpt, "--out_dir", str(small_shards)],
        "holds 0 checkpoints": ["average", empty, "--out_dir", missing],
        "no such folder": ["import", "--from", missing, "--out_dir", missing],
        "name a step-NNNNNNNN folder": ["inspect", empty],
        "no such folder; name a run's": ["report", missing],
        f"{missing}: no such config": ["launch", "slurm", "--config", missing, "--out_dir", missing],
        "holds no run": ["compare", missing, missing],
        "no such config": ["plan", "--config", missing],
        "no such config file": ["doctor", "--kernels", "--config", missing],
    }
    program = (
        "import json, sys\nfrom llm import cli\n"
        "for call in json.loads(sys.argv[1]):\n"
        "    assert cli.main(call) == 1, call\n"
        "    assert 'torch' not in sys.modules, call\n"
    )
    command = [sys.executable, "-c", program, json.dumps(list(calls.values()))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for expected, line in zip(calls, done.stderr.splitlines(), strict=True):
        assert line.startswith("error: ")
        assert expected in line or f"{missing}: no such checkpoint" in line


@pytest.mark.parametrize("arguments", [["--config", "missing.json"], ["--config", "x.json", "--steps", "1"]])
def test_an_error_that_all_ranks_of_a_host_meet_is_printed_by_one(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "LAUNCHER_SECONDS", 0)
    printed, codes = [], []
    for rank, local_rank in enumerate("0101"):
        for name, value in {"RANK": str(rank), "LOCAL_RANK": local_rank, "WORLD_SIZE": "4", "MASTER_PORT": "1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        try:
            codes.append(main(["train", *arguments]))
        except SystemExit as left:
            codes.append(left.code)
        printed.append("error" in capfd.readouterr().err)
    assert printed == [True, False, True, False]
    assert codes in ([1] * 4, [2] * 4)


@pytest.mark.parametrize(
    ("text", "value"), [("200_000_000", 200_000_000), ("200M", 200_000_000), ("1e6", 1_000_000), ("4Ki", 4096)]
)
def test_numbers_of_flags_are_taken_as_people_write_them(text: str, value: int) -> None:
    given = ["prepare_data", "--input", "a", "--tok", "b", "--out_dir", "c", "--shard_tokens", text]
    assert make_parser().parse_args(given).shard_tokens == value
    assert make_parser().parse_args(["plan", "--config", "a", "--gpus", f"1..{text}"]).gpus[-1] == value


@pytest.mark.parametrize("text", ["many", "1.5", "", "True"])
def test_what_is_no_whole_number_is_said(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args(["generate", "--ckpt", "a", "--prompt", "b", "--top_k", text])
    assert f"argument --top_k: {text} is no whole number" in capsys.readouterr().err
