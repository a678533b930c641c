"""`llm eval --tasks`: our adapter gives what lm-evaluation-harness's own Hugging Face backend gives, offline."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.model.checkpoint import load_model, locate

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("lm_eval", reason="needs the extra `eval`: pip install lm-eval")

from llm.inference.eval_tasks import Adapter, _TaskManager
from llm.inference.evaluate import evaluate

Llm = Callable[..., tuple[int, str, str]]

# Longer than the context of 64 tokens, short, with characters that are several tokens, and with blanks at the end.
TEXTS = ["def f(x):\n    return x\n", "naïve ▁ 🙂 ", "import os\n" * 60, "x", "for  name in  names:  "]
SHORT = [text for text in TEXTS if len(text) < 64]


@pytest.fixture(scope="module")
def adapter(random_checkpoint: Path) -> Adapter:
    return Adapter(*load_model(random_checkpoint, torch.device("cpu")), batch_size=3)


@pytest.fixture(scope="module")
def hugging_face(random_checkpoint: Path) -> Callable[[bool], Any]:
    """The harness's own backend on the same checkpoint folder, with BOS before every text or with none."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = locate(random_checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)

    def backend(add_bos_token: bool) -> Any:
        return HFLM(pretrained=model, tokenizer=tokenizer, add_bos_token=add_bos_token, device="cpu", batch_size=1)

    return backend


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, argument, i) for i, argument in enumerate(arguments)]


def test_loglikelihood_equals_the_hugging_face_backend(adapter: Adapter, hugging_face: Callable[[bool], Any]) -> None:
    pairs = [(context, continuation) for context in ["", *TEXTS] for continuation in (" x", "\n    return y", "é")]
    asked = requests("loglikelihood", pairs)
    found, expected = adapter.loglikelihood(asked), hugging_face(True).loglikelihood(asked, disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_what_greedy_decoding_gives_is_known_as_greedy(adapter: Adapter) -> None:
    (text,) = adapter.generate_until(requests("generate_until", [("x =", {"max_gen_toks": 4})]))
    ((_, greedy),) = adapter.loglikelihood(requests("loglikelihood", [("x =", text)]))
    assert greedy


def test_rolling_loglikelihood_equals_the_hugging_face_backend(
    adapter: Adapter, hugging_face: Callable[[bool], Any]
) -> None:
    """That backend would take a BOS of the tokenizer's for a part of the text; it adds its own in any case. It sums in
    fp32, which shows in long texts.
    """
    asked = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    found, expected = adapter.loglikelihood_rolling(asked), hugging_face(False).loglikelihood_rolling(asked)
    assert found == pytest.approx(expected, abs=1e-4, rel=1e-6)


def test_generation_equals_the_hugging_face_backend(adapter: Adapter, hugging_face: Callable[[bool], Any]) -> None:
    kinds = [{"max_gen_toks": 20}, {"max_gen_toks": 20, "until": ["e", "\n"]}]
    asked = requests("generate_until", [(text, dict(kind)) for text in TEXTS for kind in kinds])
    found, expected = adapter.generate_until(asked), hugging_face(True).generate_until(asked, disable_tqdm=True)
    assert found == expected
    assert all("e" not in text and "\n" not in text for text in found[1::2])


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tasks on a local file, some that cannot run."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [{"text": text, "question": f"{text} is", "answer": i % 2} for i, text in enumerate(SHORT)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/data.jsonl\ntest_split: test\n"
    generation = 'output_type: generate_until\ndoc_to_text: "{{text}}"\ndoc_to_target: x\ngeneration_kwargs:\n'
    kinds = {
        "own_choice": 'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: ["good", "bad"]\n'
        'doc_to_target: "{{answer}}"\nmetric_list:\n  - metric: acc\n',
        "own_perplexity": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: bits_per_byte\n  - metric: byte_perplexity\n",
        "own_broken": "output_type: nonsense\n",
        "own_long": f"{generation}  max_gen_toks: 64\n",
        "own_beams": f"{generation}  max_gen_toks: 8\n  num_beams: 2\n",
    }
    for name, rest in kinds.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}{rest}")
    return folder


def test_tasks_run_from_the_command_line(
    llm_here: Llm, random_checkpoint: Path, own_tasks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = ["--tasks", "own_choice", "own_perplexity", "--include_path", own_tasks]
    code, out, err = llm_here("eval", "--ckpt", random_checkpoint, *tasks, "--device", "cpu", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["n-samples"]["own_choice"]["effective"] == len(SHORT)
    assert found["results"]["own_choice"]["acc,none"] in {0.0, 0.25, 0.5, 0.75, 1.0}
    scored = evaluate(random_checkpoint, [own_tasks / "data.jsonl"], device="cpu")
    assert found["results"]["own_perplexity"]["bits_per_byte,none"] == pytest.approx(scored["bits_per_byte"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--tasks", "own_choise"], "--tasks own_choise: no such task; the nearest is own_choice"),
        (["--tasks", "own_choice", "--batch_size", 0], "--batch_size 0"),
        (["--tasks", "own_choice", "--limit", 0], "--limit 0"),
        (["--tasks", "own_choice", "--num_fewshot", -1], "--num_fewshot -1"),
        (["--tasks", "own_choice", "--stride", 8], "--stride goes with --input"),
        (["--tasks", "own_broken"], "ValueError: Got invalid output_type 'nonsense'"),
        (["--tasks", "own_long"], "the task asks for 64 new tokens and the model holds 64"),
        (["--tasks", "own_beams"], "the task generates with num_beams"),
        (["--tasks", "own_choice", "--include_path", "nowhere"], "--include_path nowhere: no such folder"),
    ],
)
def test_what_cannot_run_is_one_line(
    llm_here: Llm,
    random_checkpoint: Path,
    own_tasks: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[object],
    expected: str,
) -> None:
    # The harness takes many seconds to index the tasks that come with it.
    monkeypatch.setattr(
        "llm.inference.eval_tasks._TaskManager", lambda include_path, **_: _TaskManager(None, include_path, False)
    )
    code, out, err = llm_here("eval", "--ckpt", random_checkpoint, "--include_path", own_tasks, *options)
    assert (code, out) == (1, "")
    assert expected in err.splitlines()[-1]


def test_a_full_memory_is_one_line_with_the_way_out(
    llm_here: Llm, random_checkpoint: Path, own_tasks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore.")

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("llm.inference.eval_tasks.stack", full)
    options = ["--tasks", "own_choice", "--include_path", own_tasks, "--device", "cpu"]
    code, out, err = llm_here("eval", "--ckpt", random_checkpoint, *options)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: the GPU's memory is full; lower --batch_size (CUDA out of memory.")


def test_without_the_harness_one_line_says_how_to_get_it(
    llm_here: Llm, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "llm.inference.eval_tasks")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = llm_here("eval", "--ckpt", random_checkpoint, "--tasks", "hellaswag")
    assert code == 1
    assert "pip install 'lm-eval" in err.splitlines()[-1]
