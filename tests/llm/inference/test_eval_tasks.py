"""`llm eval --tasks`: lm-evaluation-harness scores a checkpoint as our own model does, offline."""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_tokenizers import TEXT as FOREIGN
from foreign_tokenizers import make
from random_models import SHAPE, write_checkpoint
from running import deepspeed_module, result_of, torchrun

from llm.config import ModelConfig
from llm.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from llm.inference.decode import generate
from llm.inference.evaluate import evaluate
from llm.model.checkpoint import load_model
from llm.model.checkpoint_path import locate
from llm.model.transformer import Transformer
from llm.world import World

os.environ.setdefault("HF_HUB_OFFLINE", "1")
for package in ("lm_eval", "transformers", "accelerate"):
    pytest.importorskip(package, reason="needs the extra `eval`")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: E402

from llm.inference.eval_tasks import CheckpointLM, CutShort, _print_table  # noqa: E402

LEVEL = logging.getLogger("lm_eval.models.huggingface").level
Llm = Callable[..., tuple[int, str, str]]

CPU = torch.device("cpu")
CONTEXT = 64

# Longer than the context of 64 tokens, short, with characters that are several tokens, and with blanks at the end.
TEXTS = ["def f(x):\n    return x\n", "naïve ▁ 🙂 ", "import os\n" * 60, "x", "for  name in  names:  "]
SHORT = [text for text in TEXTS if len(text) < 64]


@pytest.fixture(scope="module")
def ours(random_checkpoint: Path) -> tuple[Transformer, Tokenizer]:
    return load_model(random_checkpoint, CPU)


@pytest.fixture(scope="module")
def harness(random_checkpoint: Path) -> CheckpointLM:
    return CheckpointLM(locate(random_checkpoint), World(0, 0, 1, CPU, torch.float32), batch_size=3)


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    return [Instance(kind, {}, argument, i) for i, argument in enumerate(arguments)]


def log_probability(model: Transformer, ids: list[int], targets: int) -> tuple[float, bool]:
    """Of the last `targets` ids after those before them, as many as fit, and whether each is the likeliest."""
    ids = ids[-model.config.max_seq_len - 1 :]
    with torch.no_grad():
        log_p = model(torch.tensor([ids[:-1]]))[0, -targets:].double().log_softmax(-1)
    last = torch.tensor(ids[-targets:])
    return float(log_p.gather(1, last[:, None]).sum()), bool((log_p.argmax(-1) == last).all())


def test_loglikelihood_is_that_of_our_own_model(harness: CheckpointLM, ours: tuple[Transformer, Tokenizer]) -> None:
    model, tokenizer = ours
    pairs = [(context, continuation) for context in ["", *TEXTS] for continuation in (" x", "\n    return y", "é")]
    expected = []
    for context, continuation in pairs:
        before = context.rstrip()  # the harness counts blanks at the end to the continuation
        ids = tokenizer.encode(context + continuation)
        expected.append(log_probability(model, [tokenizer.bos_id, *ids], len(ids) - len(tokenizer.encode(before))))
    found = harness.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_what_greedy_decoding_gives_is_known_as_greedy(harness: CheckpointLM) -> None:
    (text,) = harness.generate_until(requests("generate_until", [("x =", {"max_gen_toks": 4})]))
    ((_, greedy),) = harness.loglikelihood(requests("loglikelihood", [("x =", text)]))
    assert greedy


def test_rolling_loglikelihood_is_that_of_our_own_model(
    harness: CheckpointLM, ours: tuple[Transformer, Tokenizer]
) -> None:
    """One BOS is given and no part of the text. The harness sums in fp32, which shows in long texts."""
    model, tokenizer = ours
    expected = []
    for text in TEXTS:
        windows = get_rolling_token_windows(tokenizer.encode(text), tokenizer.bos_id, CONTEXT, context_len=1)
        disjoint = [make_disjoint_window(window) for window in windows]
        expected.append(sum(log_probability(model, before + after, len(after))[0] for before, after in disjoint))
    found = harness.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in TEXTS]))
    assert found == pytest.approx(expected, abs=1e-4, rel=1e-6)


def test_generation_is_that_of_our_own_model(harness: CheckpointLM, ours: tuple[Transformer, Tokenizer]) -> None:
    model, tokenizer = ours
    kinds = [{"max_gen_toks": 20}, {"max_gen_toks": 20, "until": ["e", "\n"]}]
    asked = [(text, kind) for text in TEXTS for kind in kinds]
    expected = []
    for text, kind in asked:
        prompt = [tokenizer.bos_id, *tokenizer.encode(text)][-CONTEXT + 20 :]
        ids = list(generate(model, prompt, max_new_tokens=20, temperature=0, eos_ids=tokenizer.eos_ids))
        expected.append(re.split("|".join(kind.get("until", ["$^"])), tokenizer.decode(ids))[0])
    found = harness.generate_until(requests("generate_until", [(text, dict(kind)) for text, kind in asked]))
    assert found == expected
    assert all("e" not in text and "\n" not in text for text in found[1::2])


@pytest.mark.parametrize("special", [None, True, False])
def test_every_text_begins_with_one_bos(
    harness: CheckpointLM, ours: tuple[Transformer, Tokenizer], special: bool | None
) -> None:
    tokenizer = ours[1]
    for text in ("x", "<s>x", ""):
        bos = [] if special is False else [tokenizer.bos_id]
        assert harness.tok_encode(text, special) == bos + tokenizer.encode(text)
    batch, _ = harness.tok_batch_encode(["<s>x", "<s>y"])
    assert batch[:, 0].tolist() == [tokenizer.bos_id] * 2


# A form of the model, and a tokenizer for which AutoTokenizer would then take another class than the folder names.
READ_OTHERWISE = {
    "Qwen2, sentencepiece": {"attention_bias": "qkv"},
    "Qwen2, bytelevel": {"attention_bias": "qkv"},
    "Qwen2, gpt2": {"attention_bias": "qkv"},
    "Qwen2, qwen2": {"attention_bias": "qkv"},
    "Mistral, llama2": {"sliding_window": 12},
}


@pytest.mark.parametrize("form", READ_OTHERWISE)
def test_texts_are_read_as_we_read_them_whatever_the_model(small_tokenizer: Path, tmp_path: Path, form: str) -> None:
    """transformers 5 takes the class of a tokenizer from the model's type too."""
    kind = form.partition(", ")[2]
    if kind == "bytelevel":
        (tmp_path / "a.txt").write_text("\n".join(FOREIGN))
        path = train_tokenizer([tmp_path / "a.txt"], tmp_path / "tok", 400, kind="bytelevel")["model"]
    else:
        path = small_tokenizer if kind == "sentencepiece" else make(kind, tmp_path / "tok")
    tokenizer = load_tokenizer(path)
    options = {"qk_norm": False, "vocab_size": tokenizer.vocab_size}
    weights = Transformer(ModelConfig.model_validate(SHAPE | options | READ_OTHERWISE[form]))
    weights.init_weights(1)
    torch.manual_seed(1)
    with torch.no_grad():
        for value in weights.parameters():
            value += 0.3 * torch.randn(value.shape) if value.dim() == 1 else 0
    ckpt = write_checkpoint(tmp_path / "run", weights, tokenizer)
    harness = CheckpointLM(ckpt, World(0, 0, 1, CPU, torch.float32), batch_size=3)
    texts = [*TEXTS, "  12345 e\u0301 don't</s><|endoftext|>x", "  naïve cafe\u0301  ", *FOREIGN[:2]]
    for text in texts:
        assert harness.tok_encode(text) == [tokenizer.bos_id, *tokenizer.encode(text)]
        assert harness.tok_encode(text, False) == tokenizer.encode(text)
    found = harness.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in texts]))
    for text, score in zip(texts, found, strict=True):
        windows = get_rolling_token_windows(tokenizer.encode(text), tokenizer.bos_id, CONTEXT, context_len=1)
        disjoint = [make_disjoint_window(window) for window in windows]
        expected = sum(log_probability(weights, before + after, len(after))[0] for before, after in disjoint)
        assert score == pytest.approx(expected, abs=1e-4, rel=1e-5)


def test_the_batches_ask_whether_to_end_and_the_harness_warns_again(harness: CheckpointLM) -> None:
    """As long as no backend is made, the logger of the harness has its own level."""
    assert logging.getLogger("lm_eval.models.huggingface").level == LEVEL
    asked = requests("loglikelihood", [("x", " y"), ("x", " z")])

    def end() -> None:
        raise CutShort

    harness.check = end
    with pytest.raises(CutShort):
        harness.loglikelihood(asked, disable_tqdm=True)
    del harness.check
    assert len(harness.loglikelihood(asked, disable_tqdm=True)) == 2


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
        "own_misspelt": f"{generation}  max_gen_toks: 8\n  temprature: 0\n",
    }
    for name, rest in kinds.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}{rest}")
    return folder


@pytest.mark.parametrize("names", [["own_choice", "own_perplexity"], ["own_choice,own_perplexity"]])
def test_tasks_run_from_the_command_line(
    llm_here: Llm,
    random_checkpoint: Path,
    own_tasks: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    names: list[str],
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = ["--tasks", *names, "--include_path", own_tasks]
    code, out, err = llm_here("eval", "--ckpt", random_checkpoint, *tasks, "--device", "cpu", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["n-samples"]["own_choice"]["effective"] == len(SHORT)
    assert found["results"]["own_choice"]["acc,none"] in {0.0, 0.25, 0.5, 0.75, 1.0}
    scored = evaluate(random_checkpoint, [own_tasks / "data.jsonl"], device="cpu")
    assert found["results"]["own_perplexity"]["bits_per_byte,none"] == pytest.approx(scored["bits_per_byte"], rel=1e-5)


def test_the_table_of_tasks_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    tasks = ["a_task_with_a_name_of_more_than_forty_characters", "[bold]short\x1b"]
    scores = {"alias": "x", "sample_len": 4, "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": "N/A"}
    _print_table(
        {
            "results": {
                task: scores | {"word_perplexity,none": 12_345_678.9, "acc_stderr,none": 0.1} for task in tasks
            },
            "n-shot": dict.fromkeys(tasks, 5),
            "higher_is_better": {tasks[0]: {"exact_match": True, "word_perplexity": False}},
        }
    )
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    words = [line.split() for line in lines]
    assert words[1][1:] == ["5", "↑", "exact_match", "0.2500"]
    assert words[1][0] + words[2][0] == tasks[0]
    assert words[-1] == ["[bold]short\\x1b", "5", "word_perplexity", "12345678.9000"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--tasks", "own_choise"], "--tasks own_choise: no such task; the nearest is own_choice"),
        (["--tasks", "own_choice", "--batch_size", 0], "--batch_size 0"),
        (["--tasks", "own_choice", "--limit", 0], "--limit 0"),
        (["--tasks", "own_choice", "--num_fewshot", -1], "--num_fewshot -1"),
        (["--tasks", "own_choice", "--stride", 8], "--stride goes with --input"),
        (["--tasks", "own_broken"], "ValueError: Got invalid output_type 'nonsense'"),
        (
            ["--tasks", "own_long"],
            "requested max tokens to generate (64) must be less than model's maximum sequence length (64)",
        ),
        (["--tasks", "own_misspelt"], "temprature"),
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
        "llm.inference.eval_tasks.TaskManager",
        lambda include_path, **_: TaskManager(include_path=include_path, include_defaults=False),
    )
    code, out, err = llm_here("eval", "--ckpt", random_checkpoint, "--include_path", own_tasks, *options)
    assert (code, out) == (1, "")
    assert expected in err.splitlines()[-1]


def test_a_full_memory_is_one_line_with_the_way_out(
    llm_here: Llm, random_checkpoint: Path, own_tasks: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore.")

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("llm.inference.eval_tasks.simple_evaluate", full)
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


@pytest.mark.slow
@pytest.mark.parametrize("launch", [torchrun, deepspeed_module])
def test_two_processes_score_as_one(
    llm_here: Llm,
    random_checkpoint: Path,
    own_tasks: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    launch: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = ["--tasks", "own_choice,own_perplexity", "--include_path", own_tasks]
    arguments = ["eval", "--ckpt", random_checkpoint, *tasks, "--device", "cpu", "--json"]
    code, out, err = llm_here(*arguments)
    assert code == 0, err
    expected, found = json.loads(out), result_of(launch(2, "llm", *arguments))
    for name in ("own_choice", "own_perplexity"):
        one, other = (
            {key: value for key, value in run["results"][name].items() if isinstance(value, float)}
            for run in (found, expected)
        )
        assert one == pytest.approx(other, rel=1e-5)
    assert found["n-samples"] == expected["n-samples"]
