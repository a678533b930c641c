"""The commands of README.md, taken from README.md and run: the steps from text to generation, at a smaller size."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

SMALLER = [
    *("model.n_layers=1", "model.d_model=32", "model.n_heads=2", "model.n_kv_heads=1", "model.d_ff=64"),
    *("train.total_tokens=8192", "train.global_batch_tokens=4096", "train.eval_tokens=4096", "train.device=cpu"),
]


def commands() -> list[str]:
    """Every line of the blocks marked sh."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


COMMANDS = commands()
PROCESSES = {"--num_gpus", "--nproc_per_node"}


def smaller(command: str) -> list[str]:
    """The command as it stands, for a small model on two processes."""
    words = shlex.split(command)
    if words[0] != "llm":  # the launchers' own port may be taken
        words[1:1] = ["--master_port", str(20_000 + os.getpid() % 10_000)]
    for i, word in enumerate(words):
        if word in PROCESSES:
            words[i + 1] = "2"
    if "train" in words:
        words += SMALLER
        if words[0] != "llm":  # else it would find the run of `llm train` complete
            words.append(f"checkpoint.dir=artifacts/{words[0]}")
    program = {"llm": [sys.executable, "-m", "llm"]}.get(words[0], [str(BIN / words[0])])
    return [*program, *words[1:]]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, small_corpus):
    """A folder such as the README supposes: configs/ and a text under data/raw/."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "data" / "raw").mkdir(parents=True)
    texts = [json.loads(line)["text"] for line in small_corpus.read_text().splitlines()]
    (folder / "data" / "raw" / "corpus.txt").write_text("\n\n".join(texts))
    (folder / "data" / "raw" / "val.txt").write_text(texts[0])
    return folder


def test_the_readme_holds_the_steps_in_their_order():
    verbs = [command.split()[1] for command in COMMANDS if command.startswith("llm ")]
    assert verbs == ["train_tokenizer", "prepare_data", "train", "eval", "generate"]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make ")])
def test_its_make_targets_exist(command):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    dry_run = ["make", "-n", "-o", ".venv/.installed", *command.split()[1:]]
    assert subprocess.run(dry_run, cwd=ROOT, env=environment, capture_output=True).returncode == 0


def test_it_counts_the_lines_as_they_are():
    def lines(*patterns):
        return sum(path.read_bytes().count(b"\n") for pattern in patterns for path in ROOT.glob(pattern))

    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"about ([\d,]+) lines of Python and ([\d,]+) of C\+\+", readme).groups()
    (tested,) = re.search(r"\| lines of Python, tests included \| ([\d,]+) \|", readme).groups()
    source = ("llm/**/*.py", "kernels/**/*.py")
    counted = (lines(*source), lines("csrc/**/*.[ch]pp"), lines(*source, "tests/**/*.py", "benchmarks/**/*.py", "*.py"))
    for number, exact in zip((*shown, tested), counted, strict=True):
        assert int(number.replace(",", "")) == pytest.approx(exact, rel=0.05)


def test_its_other_commands_run_one_after_another(workplace):
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = "/usr/bin:/bin"  # no ninja, no .venv
    ran = []
    for command in COMMANDS:
        if command.startswith("make ") or command == "source .venv/bin/activate":
            continue
        done = subprocess.run(smaller(command), cwd=workplace, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        ran.append(command.split()[0])
    assert ran == ["llm"] * 5 + ["deepspeed", "torchrun"]
    assert (workplace / "artifacts/checkpoints/latest/model.safetensors").is_file()
    assert (workplace / "artifacts/deepspeed/latest/model.safetensors").is_file()
    assert (workplace / "artifacts/torchrun/latest/model.safetensors").is_file()
