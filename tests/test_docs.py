"""The commands of docs/*.md, taken from there and run one after another on a small model."""

import ast
import glob
import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

PAGES = ["first_model.md", "recipe.md", "using.md", "training.md", "scaling.md"]
"""In this order: the recipe makes the shards and the run that the later pages suppose."""
LEFT_OUT = {
    "pip": "changes the environment",
    "deepspeed": "tests/test_readme.py runs the launchers",
    "transformers": "a server: tests/llm/tools/test_export.py runs it",
    "vllm": "needs a GPU",
    "llama-server": "not a Python package",
    "python": "a benchmark: tests/benchmarks runs them",
}
NEEDS_A_NETWORK = ("hellaswag", "llm download")
SMALLER = [
    *("model.n_layers=1", "model.d_model=32", "model.n_heads=2", "model.n_kv_heads=1", "model.d_ff=64"),
    *("train.total_tokens=8192", "train.global_batch_tokens=4096", "train.eval_tokens=4096"),
    *("train.device=cpu", "train.micro_batch=1"),
]


def commands(page: str) -> list[str]:
    """The command lines of its code blocks, without comments."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.M | re.S)
    shell = [block for language, block in blocks if language in ("", "sh")]
    lines = [re.sub(r"\s+#.*", "", line) for block in shell for line in block.splitlines()]
    programs = ("llm", "cat", *LEFT_OUT)
    # Flags of `llm` itself, such as --version, are for tests/test_cli.py.
    return [line for line in lines if line.split(" ")[0] in programs and not line.startswith("llm --")]


def runnable(command: str) -> bool:
    return command.split(" ")[0] not in LEFT_OUT and not any(word in command for word in NEEDS_A_NETWORK)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, small_corpus: Path) -> Path:
    """The files of a user that the pages name."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "configs").symlink_to(ROOT / "configs")
    for made in ("data/raw/fineweb-edu", "more", "my_tasks", "downloads", "runs"):
        (folder / made).mkdir(parents=True)
    shutil.copy(small_corpus, folder / "data/raw/fineweb-edu/text.jsonl")
    lines = small_corpus.read_text().splitlines()
    (folder / "more/a.jsonl").write_text("\n".join(lines[:2]) + "\n")
    text = json.loads(lines[0])["text"]
    for name in ("data/raw/val.txt", "a_text_of_yours.txt"):
        (folder / name).write_text(text)
    texts = [json.loads(line)["text"] for line in lines]
    (folder / "my.txt").write_text("\n\n".join(texts))
    for name in ("story.txt", "prompts.txt"):
        (folder / name).write_text("x = 1\n")
    (folder / "my_tasks/my_task.yaml").write_text(
        "task: my_task\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: more/a.jsonl\ntest_split: test\n"
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: bits_per_byte\n"
    )
    (folder / "downloads/model").symlink_to("../artifacts/export")
    return folder


def smaller(command: str) -> list[str]:
    """The command as it stands, with what it leaves to the reader filled in, for a small model on a CPU."""
    words = shlex.split(command)[1:]
    words = [re.sub(r"step-\d+", "step-00000002", word) for word in words]
    words = [re.sub(r"average-\d+", "average-1", word) for word in words]  # see --last below
    words = [path for word in words for path in (sorted(glob.glob(word)) if "*" in word else [word])]
    if words[0] in ("train", "plan", "profile"):
        # An imported model has its own shape.
        words += [word for word in SMALLER if "train.json" not in command or not word.startswith("model.")]
    if "--resume" in words:  # from a checkpoint that is the run's last, as the run is so short
        words.append("train.total_tokens=16384")
    if "--last" in words:  # the run has one checkpoint
        words[words.index("--last") + 1] = "1"
    return words + (["--steps", "2"] if words[0] == "profile" else [])


def test_the_python_of_the_api_page_runs(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/shards").symlink_to(small_shards)
    monkeypatch.chdir(tmp_path)
    overrides = '"train.total_tokens=500_000"'
    code = "".join(re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/api.md").read_text(), re.M | re.S))
    assert overrides in code
    names: dict[str, Any] = {}
    exec(compile(code.replace(overrides, str(SMALLER)[1:-1]), "docs/api.md", "exec"), names)
    assert names["data"].position == 32, "the page says 24, before the batch of the DataLoader"
    assert capsys.readouterr().out.count("torch.Size([8, 64])") == 9


def messages_of_the_sources() -> str:
    """The strings of the Python sources, with `...` for what is filled in; the text of the C++ and the Makefile."""
    sources = [
        *ROOT.glob("llm/**/*.py"),
        *ROOT.glob("kernels/*.py"),
        ROOT / "bootstrap.py",
        ROOT / "llm_from_scratch.py",
    ]
    found = []
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    others = [(ROOT / "Makefile").read_text(), *(file.read_text() for file in ROOT.glob("csrc/**/*.[ch]pp"))]
    return "\n".join([*found, *others])


def test_the_messages_of_the_page_of_troubles_are_those_of_the_sources() -> None:
    page = (ROOT / "docs/troubles.md").read_text()
    cells = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    quoted = [message.strip() for cell in cells for _, message in re.findall(r"(`+)(.+?)\1(?!`)", cell)]
    known = messages_of_the_sources()
    parts = [part.strip() for message in quoted for part in message.split("...")]
    assert len(quoted) > 80
    assert [part for part in parts if part not in known] == []


def test_each_page_has_commands_and_what_is_left_out_is_there() -> None:
    found = [command for page in PAGES for command in commands(page)]
    assert all(any(map(runnable, commands(page))) for page in PAGES)
    assert {command.split(" ")[0] for command in found} == {"llm", "cat", *LEFT_OUT}
    assert all(any(word in command for command in found) for word in NEEDS_A_NETWORK)


def test_the_commands_run_one_after_another(
    llm_here: Callable[..., tuple[int, str, str]], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(workplace / "cache"))
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    for page in PAGES:
        for command in filter(runnable, commands(page)):
            typed = command
            for run in re.findall(r"runs/\S+", command):
                shutil.copytree("artifacts/checkpoints", run)
            if piped := re.fullmatch(r"cat (\S+) \| (.*)", command):
                monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(Path(piped[1]).read_bytes())))
                typed = piped[2]
            code, _, err = llm_here(*smaller(typed))
            assert code == 0, f"{page}: {command}\n{err}"
    for made in (
        "artifacts/my/run/report/report.html",
        "artifacts/checkpoints/latest/model.safetensors",
        "artifacts/checkpoints/report/report.html",
        "artifacts/gguf/model.gguf",
        "artifacts/tuned/latest/model.safetensors",
        "lr/report.html",
    ):
        assert Path(made).is_file()
