"""From a model of others to one trained on: import, prepare, train, evaluate, generate, export, for each tokenizer."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from foreign_tokenizers import STYLES, TEXT, make, make_ranks
from running import small_config

from llm.config_file import load_config
from llm.data.manifest import read_manifest
from llm.data.prepare import prepare_data
from llm.data.tokenizer import load_tokenizer
from llm.inference.evaluate import evaluate
from llm.inference.generate import generate
from llm.model.checkpoint import load_model, read_state
from llm.tools.export import export
from llm.tools.import_model import import_hf
from llm.training.train import train

PROMPT = "The quick brown fox, <|endoftext|> it's 12345"


def model_folder(folder: Path, rows: int) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
    config = transformers.LlamaConfig(vocab_size=rows, num_attention_heads=2, num_key_value_heads=1, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "generation_config.json").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("style", [*STYLES, "tiktoken"])
def test_a_model_of_others_is_trained_on_with_its_own_tokenizer(style: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    tok = f"{make_ranks(tmp_path / 'ranks')}:llama3" if style == "tiktoken" else make(style, source)
    model_folder(source, load_tokenizer(tok).vocab_size)
    if style != "tiktoken":
        make(style, source)  # again, because the model's generation_config.json replaced the tokenizer's
    theirs = load_tokenizer(tok)
    import_hf(source, tmp_path / "imported", tok=tok if style == "tiktoken" else None)
    texts = [f"{text} {i}" for i, text in enumerate(TEXT * 8)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    shards = tmp_path / "shards"
    prepare_data(
        [tmp_path / "a.jsonl"], tmp_path / "imported", shards, seq_len=64, shard_tokens=5_000, val_fraction=0.1
    )
    assert read_manifest(shards).tokenizer_sha256 == theirs.sha256
    model = read_state(tmp_path / "imported")[1].model.model_dump()
    changes = {
        "train__init_from": str(tmp_path / "imported"),
        "train__total_tokens": 50 * 512,
        "train__eval_tokens": None,
    }
    config = small_config(shards, tmp_path / "run", **changes) | {"model": model}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = train(load_config(tmp_path / "config.json", []))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    ckpt = Path(result["checkpoint"])
    # Nearly, because the sequences of validation begin inside documents.
    of_shards = evaluate(ckpt, [shards], device="cpu")
    assert of_shards["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=0.05)
    of_text = evaluate(ckpt, [tmp_path / "a.jsonl"], device="cpu")
    assert of_text["bytes"] == pytest.approx(sum(len(text.encode()) for text in texts), rel=0.3)
    generate(str(ckpt), prompt="The quick", max_new_tokens=5, device="cpu")

    export(ckpt, tmp_path / "out")
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in theirs.files.items())
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = [theirs.bos_id, *again(PROMPT, add_special_tokens=False).input_ids]
    assert ids[1:] == theirs.encode(PROMPT)
    with torch.no_grad():
        expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.tensor([ids])).logits
        ours, tokenizer = load_model(ckpt, torch.device("cpu"))
        found = ours(torch.tensor([ids]))[..., : expected.shape[-1]]
    assert tokenizer.sha256 == theirs.sha256
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(expected.abs().max()))
