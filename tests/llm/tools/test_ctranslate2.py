"""ctranslate2 converts an exported folder and continues a text as we do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import SHAPE, write_checkpoint

from llm.config import ModelConfig
from llm.data.tokenizer import load_tokenizer
from llm.inference.decode import generate
from llm.model.checkpoint import load_model
from llm.model.transformer import Transformer
from llm.tools.export import export

ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed: pip install ctranslate2")
transformers = pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": False},
        {},
        {"qk_norm": False, "sliding_window": 12},
        {"qk_norm": False, "attention_bias": "qkv"},
        {"qk_norm": False, "attention_bias": "qkvo"},
    ],
)
def test_the_greedy_continuation_is_ours(small_tokenizer: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    ours = load_tokenizer(small_tokenizer)
    weights = Transformer(ModelConfig(**SHAPE | changes, vocab_size=ours.vocab_size))
    weights.init_weights(1)
    drawn = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in weights.named_parameters():
            value *= 4 if "embed" in name or "lm_head" in name else 1
            if name.endswith("bias"):
                value.normal_(generator=drawn)  # they begin as zeros
    ckpt = write_checkpoint(tmp_path / "run", weights, ours)
    export(ckpt, tmp_path / "out")
    ctranslate2.converters.TransformersConverter(str(tmp_path / "out")).convert(str(tmp_path / "made"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = theirs.convert_ids_to_tokens(theirs("def read(self):").input_ids)
    (answer,) = ctranslate2.Generator(str(tmp_path / "made")).generate_batch(
        [prompt], max_length=20, sampling_topk=1, include_prompt_in_result=False, end_token=[]
    )
    ids = [ours.bos_id, *ours.encode("def read(self):")]
    model, _ = load_model(ckpt, torch.device("cpu"))
    assert answer.sequences_ids[0] == list(generate(model, ids, max_new_tokens=20, temperature=0, eos_ids=[]))
