"""A model with model.attention_bias=qkv leaves as a Qwen2, or as a Llama where a Qwen2 would get another tokenizer.

transformers 5 reads text for every Qwen2 with Qwen2Tokenizer, whatever tokenizer the folder has and names.
"""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_tokenizers import TEXT, make
from random_models import SHAPE, write_checkpoint
from safetensors.torch import load_file, save_file

from llm.config import ModelConfig
from llm.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from llm.model.checkpoint import load_model, read_state
from llm.model.transformer import Transformer
from llm.tools.export import export
from llm.tools.import_model import import_hf

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
OLD = int(transformers.__version__.split(".")[0]) < 5
WORDS = [
    *" \n\t\r.,;'_(",
    "  ",
    "\n\n",
    "\r\n",
    "the",
    " fox",
    "123",
    " 2024",
    "'s",
    "DON'T",
    "é",
    "e\u0301",
    "字",
    "🎉",
]
WORDS += ["def f(x):", "naïve café", "\x00", "\u2581", "ﬁ", "<s>", "</s>", "<|endoftext|>", "<|eot_id|>"]


def texts() -> list[str]:
    chance = random.Random(0)
    return [*TEXT[:2], *("".join(chance.choices(WORDS, k=chance.randrange(1, 25))) for _ in range(300))]


def make_tokenizer(form: str, small_tokenizer: Path, folder: Path) -> Tokenizer:
    if form == "sentencepiece":
        return load_tokenizer(small_tokenizer)
    if form == "bytelevel":
        (folder / "a.txt").write_text("\n".join(TEXT))
        return load_tokenizer(train_tokenizer([folder / "a.txt"], folder / "tok", 400, kind="bytelevel")["model"])
    return load_tokenizer(make(form, folder / "tok"))


def make_checkpoint(folder: Path, tokenizer: Tokenizer, **changes: Any) -> Path:
    """A checkpoint with large random biases."""
    options = {"qk_norm": False, "attention_bias": "qkv", "vocab_size": tokenizer.vocab_size}
    weights = Transformer(ModelConfig.model_validate(SHAPE | options | changes))
    weights.init_weights(1)
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in weights.parameters():
            value += 0.3 * torch.randn(value.shape, generator=drawn) if value.dim() == 1 else 0
    return write_checkpoint(folder / "run", weights, tokenizer)


def same_logits(folder: Path, ckpt: Path) -> None:
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, tokenizer = load_model(ckpt, CPU)
    ids = torch.randint(tokenizer.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = theirs(ids).logits, ours(ids)
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()


def same_ids(theirs: Any, ours: Tokenizer) -> None:
    options = {"add_special_tokens": False, "split_special_tokens": not ours.special_in_text}
    for text in texts():
        assert theirs(text, **options).input_ids == ours.encode(text), repr(text)


@pytest.mark.parametrize(
    ("form", "family"),
    [
        *((form, "Llama") for form in ("sentencepiece", "bytelevel", "gpt2", "llama3", "unigram", "tinyllama-spm")),
        ("qwen2", "Qwen2"),
    ],
)
def test_transformers_computes_ours_and_reads_text_as_we_do(
    small_tokenizer: Path, tmp_path: Path, form: str, family: str
) -> None:
    if OLD and form == "qwen2":
        pytest.skip("the list of its extra special tokens is transformers 5's form")
    ours = make_tokenizer(form, small_tokenizer, tmp_path)
    ckpt = make_checkpoint(tmp_path, ours)
    export(ckpt, tmp_path / "out", max_file_bytes=50_000)
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [f"{family}ForCausalLM"]
    card = (tmp_path / "out/README.md").read_text()
    assert f"| {family}: 2 layers" in card
    assert ("the output projections are zeros" in card) == (family == "Llama")
    same_logits(tmp_path / "out", ckpt)
    same_ids(transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), ours)


def test_its_form_costs_no_bit_on_the_way_back(small_tokenizer: Path, tmp_path: Path) -> None:
    ckpt = make_checkpoint(tmp_path, load_tokenizer(small_tokenizer), head_dim=32)
    export(ckpt, tmp_path / "out")
    import_hf(tmp_path / "out", tmp_path / "back")
    before, after = (load_file(folder / "model.safetensors") for folder in (ckpt, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_state(tmp_path / "back")[1].model == read_state(ckpt)[1].model


def test_also_after_transformers_saved_it_again(small_tokenizer: Path, tmp_path: Path) -> None:
    ckpt = make_checkpoint(tmp_path, load_tokenizer(small_tokenizer))
    export(ckpt, tmp_path / "out")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "theirs")
    import_hf(tmp_path / "theirs", tmp_path / "back", tok=small_tokenizer)
    assert read_state(tmp_path / "back")[1].model == read_state(ckpt)[1].model


def test_biases_that_another_program_trained_are_kept(small_tokenizer: Path, tmp_path: Path) -> None:
    export(make_checkpoint(tmp_path, load_tokenizer(small_tokenizer)), tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    name = "model.layers.1.self_attn.o_proj.bias"
    assert not tensors[name].any()
    tensors[name][5] = 0.25
    save_file(tensors, tmp_path / "out/model.safetensors", {"format": "pt"})
    import_hf(tmp_path / "out", tmp_path / "back")
    assert read_state(tmp_path / "back")[1].model.attention_bias == "qkvo"
    assert torch.equal(load_file(tmp_path / "back/model.safetensors")[name], tensors[name])
    same_logits(tmp_path / "out", tmp_path / "back")


def test_a_model_with_all_biases_stays_one_while_they_are_zero(small_tokenizer: Path, tmp_path: Path) -> None:
    """Those of its output projections may still be trained."""
    tokenizer = load_tokenizer(small_tokenizer)
    weights = Transformer(ModelConfig(**SHAPE, qk_norm=False, attention_bias="qkvo", vocab_size=tokenizer.vocab_size))
    weights.init_weights(1)
    export(write_checkpoint(tmp_path / "run", weights, tokenizer), tmp_path / "out")
    assert not load_file(tmp_path / "out/model.safetensors")["model.layers.0.self_attn.o_proj.bias"].any()
    import_hf(tmp_path / "out", tmp_path / "back")
    assert read_state(tmp_path / "back")[1].model.attention_bias == "qkvo"


@pytest.mark.parametrize(
    ("form", "biases"), [("sentencepiece", "qkv"), ("bytelevel", "qkv"), ("gpt2", "qkv"), ("llama2", "none")]
)
def test_with_a_window_it_stays_a_qwen2_or_mistral_and_says_how_to_read_text(
    small_tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    form: str,
    biases: str,
) -> None:
    """No other class of transformers has both. For a Mistral, transformers 5 takes no LlamaTokenizer."""
    if OLD and form == "llama2":
        pytest.skip("transformers 4 reads these files otherwise, whatever the model")
    ours = make_tokenizer(form, small_tokenizer, tmp_path)
    ckpt = make_checkpoint(tmp_path, ours, sliding_window=12, attention_bias=biases)
    export(ckpt, tmp_path / "out")
    assert "AutoTokenizer gives other ids" in capsys.readouterr().err
    same_logits(tmp_path / "out", ckpt)
    monkeypatch.chdir(tmp_path / "out")
    (snippet,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet.replace("max_new_tokens=100", "max_new_tokens=3"), names)
    same_ids(names["tokenizer"], ours)
