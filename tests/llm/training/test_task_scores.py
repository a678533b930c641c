"""train.eval_tasks: a run's model is scored as `llm eval --tasks` scores its checkpoints, and trains as without."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from running import numbers_of, read_losses, small_config, torchrun

import llm
from llm.metrics import parse_line
from llm.model import checkpoint_path
from llm.training import run_log

os.environ.setdefault("HF_HUB_OFFLINE", "1")
for package in ("lm_eval", "transformers", "accelerate"):
    pytest.importorskip(package, reason="needs the extra `eval`")

from llm.inference import eval_tasks  # noqa: E402

KEYS = {"own_choice/acc", "own_choice/acc_norm", "own_bits/bits_per_byte"}
STEPS = [3, 6, 8]


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tasks on a local file, and one that cannot be loaded."""
    folder = tmp_path_factory.mktemp("tasks")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    texts = ["def f(x):\n", "import os\n", "for name in names:", "x", "return self"]
    lines = [{"text": text, "answer": number % 2} for number, text in enumerate(texts)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/data.jsonl\ntest_split: test\n"
    kinds = {
        "own_choice": 'output_type: multiple_choice\ndoc_to_text: "{{text}}"\ndoc_to_choice: ["good", "bad"]\n'
        'doc_to_target: "{{answer}}"\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n',
        "own_bits": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: bits_per_byte\n",
        "own_broken": "output_type: nonsense\n",
    }
    for name, rest in kinds.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}{rest}")
    return folder


@pytest.fixture
def tree(small_shards: Path, own_tasks: Path, tmp_path: Path) -> dict[str, Any]:
    """A config with tasks after steps 3, 6 and 8, and checkpoints after the same steps."""
    return small_config(
        small_shards,
        tmp_path / "run",
        train__eval_tasks=["own_choice", "own_bits"],
        train__eval_tasks_path=str(own_tasks),
        train__eval_tasks_every_steps=3,
        train__eval_every_steps=4,
        checkpoint__every_steps=3,
        checkpoint__keep_last=9,
    )


def train(tree: dict[str, Any], *overrides: str, **options: Any) -> Path:
    config = llm.load_config(tree, overrides)
    llm.train(config, **{"quiet": True, **options})
    return Path(config.checkpoint.dir)


def scores_in(run: Path) -> dict[int, dict[str, float]]:
    return {line["step"]: line["tasks"] for line in llm.read_metrics(run) if "tasks" in line}


def test_the_scores_are_those_of_llm_eval_and_the_training_is_the_same(
    tree: dict[str, Any], own_tasks: Path, tmp_path: Path
) -> None:
    run = train(tree)
    without = train(tree, "train.eval_tasks=[]", f"checkpoint.dir={tmp_path / 'without'}")
    found = scores_in(run)
    assert list(found) == STEPS
    for step in STEPS:
        told = eval_tasks.evaluate_tasks(
            run / f"step-{step:08d}", ["own_choice", "own_bits"], include_path=own_tasks, device="cpu"
        )["results"]
        assert set(found[step]) == KEYS
        for key, value in found[step].items():
            task, metric = key.split("/")
            assert value == pytest.approx(told[task][f"{metric},none"], rel=1e-6), key
    assert len({score["own_bits/bits_per_byte"] for score in found.values()}) == 3, "of three models"

    assert [line for line in numbers_of(run) if "tasks" not in line] == numbers_of(without)
    for step in STEPS:
        for file in sorted((run / f"step-{step:08d}").glob("*.safetensors")):
            assert file.read_bytes() == (without / f"step-{step:08d}" / file.name).read_bytes(), file

    costs = [line for line in llm.read_metrics(run) if "tasks" in line]
    assert all(line["tasks_seconds"] > 0 and 0 < line["tasks_share"] < 1 for line in costs)
    shown = [line for line in (run / "log.txt").read_text().splitlines() if "  tasks: " in line]
    assert len(shown) == 3
    assert all("own_choice/acc " in line and line.endswith("% of the run's time)") for line in shown)


def test_a_run_that_was_stopped_before_its_tasks_begins_with_them(tree: dict[str, Any], tmp_path: Path) -> None:
    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 6:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tree, on_log=stop)
    run = tmp_path / "run"
    assert list(scores_in(run)) == [3]
    train(tree)
    assert numbers_of(run) == numbers_of(train(tree, f"checkpoint.dir={tmp_path / 'whole'}"))
    assert list(scores_in(run)) == STEPS
    # Where they are done, they are not done again.
    train(tree, "train.total_tokens=5120", "train.eval_tasks_every_steps=8")
    assert list(scores_in(run)) == [*STEPS, 10]


def test_a_signal_cuts_the_tasks_short_and_the_run_goes_on_with_them(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_harness = eval_tasks.simple_evaluate

    def signalled(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return run_harness(*arguments, **options)

    monkeypatch.setattr(eval_tasks, "simple_evaluate", signalled)
    run = train(tree, "checkpoint.every_steps=100")
    assert json.loads((run / "status.json").read_text())["message"] == "SIGTERM"
    assert [checkpoint_path.step_of(path) for path in checkpoint_path.saved(run)] == [3]
    assert scores_in(run) == {}
    monkeypatch.undo()
    train(tree)
    assert list(scores_in(run)) == STEPS
    assert len(read_losses(run)) == 8


def test_a_task_that_fails_is_told_and_the_run_goes_on(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise ValueError("something in a task")

    monkeypatch.setattr(eval_tasks, "simple_evaluate", broken)
    run = train(tree)
    told = "failed after step 3: train.eval_tasks own_choice: ValueError: something in a task; the run goes on"
    assert told in (run / "log.txt").read_text()
    assert len(read_losses(run)) == 8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.eval_tasks=own_choise", "train.eval_tasks own_choise: no such task; the nearest is own_choice"),
        ("train.eval_tasks=own_broken", "train.eval_tasks own_broken: ValueError: Got invalid output_type"),
        ("train.eval_tasks_path=nowhere", "train.eval_tasks_path nowhere: no such folder"),
    ],
)
def test_what_cannot_run_is_an_error_before_the_first_step(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    manager = eval_tasks.TaskManager
    # The harness takes many seconds to index the tasks that come with it.
    monkeypatch.setattr(
        eval_tasks, "TaskManager", lambda include_path, **_: manager(include_path=include_path, include_defaults=False)
    )
    with pytest.raises(llm.UserError, match=message):
        train(tree, override)
    assert not (tmp_path / "run").exists()


def test_without_the_harness_an_error_before_the_first_step_says_how_to_get_it(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "llm.inference.eval_tasks")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(llm.UserError, match=r"tasks need lm-evaluation-harness .* pip install 'lm-eval"):
        train(tree)
    assert not (tmp_path / "run").exists()


def test_the_line_of_the_tasks_is_read_and_a_damaged_one_is_not(tree: dict[str, Any]) -> None:
    line = {"step": 1, "tokens": 2, "tasks": {"a/acc": 0.5, "b/acc": None}, "tasks_seconds": 1.0, "tasks_share": 0.1}
    assert parse_line(json.dumps(line).encode()) == line
    assert parse_line(json.dumps(line | {"tasks": {"a/acc": "x"}}).encode()) is None
    assert parse_line(json.dumps(line | {"tasks": 1}).encode()) is None


def test_the_keys_of_the_line_are_explained() -> None:
    page = (Path(run_log.__file__).parents[2] / "docs/training.md").read_text()
    assert all(f"`{key}`" in page for key in ("tasks", "tasks_seconds", "tasks_share"))


@pytest.mark.slow  # two processes
@pytest.mark.parametrize("stage", [1, 3])
def test_two_processes_share_the_questions_at_every_stage(tree: dict[str, Any], tmp_path: Path, stage: int) -> None:
    alone = train(tree)
    tree["checkpoint"]["dir"], tree["deepspeed"] = str(tmp_path / "two"), {"zero_stage": stage}
    (tmp_path / "two.json").write_text(json.dumps(tree))
    torchrun(2, "llm", "train", "--config", tmp_path / "two.json")
    expected, found = scores_in(alone), scores_in(tmp_path / "two")
    assert list(found) == STEPS
    for step in STEPS:
        assert found[step] == pytest.approx(expected[step], rel=1e-4)
    assert read_losses(tmp_path / "two") == pytest.approx(read_losses(alone), rel=1e-5)
