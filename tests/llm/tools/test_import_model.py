"""Models of others come in: each family, with a config in its published style, computes what transformers does."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.model.checkpoint import load_model, read_state
from llm.tools.export import export
from llm.tools.import_model import import_hf

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 500,
}
LLAMA3 = {
    **LLAMA,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "num_key_value_heads": 2,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
LLAMA31_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 16,
    "rope_type": "llama3",
}
MISTRAL = {key: value for key, value in LLAMA.items() if key not in ("pretraining_tp", "rope_scaling")} | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
    "sliding_window": 12,
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 500,
}
QWEN3 = {key: value for key, value in QWEN2.items() if key != "use_mrope"} | {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 32,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "rope_scaling": None,
    "sliding_window": None,
}
PHI3 = {key: value for key, value in LLAMA.items() if key not in ("pretraining_tp",)} | {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "embd_pdrop": 0.0,
    "model_type": "phi3",
    "num_key_value_heads": 2,
    "original_max_position_embeddings": 64,
    "pad_token_id": 2,
    "resid_pdrop": 0.0,
    "rope_theta": 10000.0,
    "sliding_window": 20,
}
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "Llama 2": (LLAMA, "Llama"),
    "Llama 3": (LLAMA3, "Llama"),
    "Llama 3.1": ({**LLAMA3, "rope_scaling": LLAMA31_ROPE}, "Llama"),
    "Llama 3.2": ({**LLAMA3, "head_dim": 16, "rope_scaling": LLAMA31_ROPE, "tie_word_embeddings": True}, "Llama"),
    "TinyLlama": ({**LLAMA, "num_key_value_heads": 1, "torch_dtype": "bfloat16"}, "Llama"),
    "SmolLM2": (
        {
            **LLAMA3,
            "is_llama_config": True,
            "rope_interleaved": False,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
        },
        "Llama",
    ),
    "Yi": ({**LLAMA, "num_key_value_heads": 1, "rope_theta": 5000000.0, "pad_token_id": 0}, "Llama"),
    "Falcon3": ({**LLAMA3, "head_dim": 32, "rms_norm_eps": 1e-6, "rope_theta": 1000042}, "Llama"),
    "InternLM style": ({**LLAMA3, "attention_bias": True}, "Llama"),
    "linear scaling": ({**LLAMA, "rope_scaling": {"factor": 4.0, "type": "linear"}}, "Llama"),
    "Mistral 0.1": (MISTRAL, "Mistral"),
    "Mistral 0.3": ({**MISTRAL, "sliding_window": None, "rope_theta": 1000000.0}, "Llama"),
    "Mistral Nemo": ({**MISTRAL, "sliding_window": None, "head_dim": 32}, "Llama"),
    "Qwen2": (QWEN2, "Qwen2"),
    "Qwen2.5, untied": ({**QWEN2, "tie_word_embeddings": False}, "Qwen2"),
    "Qwen2.5, YaRN": (
        {
            **QWEN2,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 16, "type": "yarn"},
            "rope_theta": 1000.0,
        },
        "Qwen2",
    ),
    "Qwen2, window": ({**QWEN2, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}, "Qwen2"),
    "Qwen3": (QWEN3, "Qwen3"),
    "Qwen3, biases, window": (
        {**QWEN3, "attention_bias": True, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
        "Qwen3",
    ),
    "YaRN, all keys": (
        {
            **LLAMA3,
            "rope_theta": 1000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "attention_factor": 0.8,
                "beta_fast": 20.0,
                "beta_slow": 2.0,
                "truncate": False,
            },
        },
        "Llama",
    ),
    "YaRN, mscale": (
        {
            **LLAMA3,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.2}
            | {"original_max_position_embeddings": 16},
        },
        "Llama",
    ),
    "Phi-3": (PHI3, "Mistral"),
}


def write_folder(folder: Path, config: dict[str, Any], tokenizer: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A folder as published, with random weights: large biases and norms, so that none of them can be lost."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for name, value in model.named_parameters():
            scale = 0.3 if value.dim() == 1 else 0.15
            value.copy_((value if "norm" in name else 0.0) + scale * torch.randn(value.shape))
    model.to(dtype).save_pretrained(folder / "made")
    for path in (folder / "made").glob("*safetensors*"):
        path.rename(folder / path.name)
    shutil.rmtree(folder / "made")
    return folder


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Of transformers, in fp32."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model(ids).logits


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((expected - found).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_what_transformers_does_and_leaves_again(
    family: str, small_tokenizer: Path, tmp_path: Path
) -> None:
    config, exported = FAMILIES[family]
    source = write_folder(tmp_path / "source", config, small_tokenizer)
    import_hf(source, tmp_path / "ours")
    ids = torch.randint(500, (2, 64), generator=torch.Generator().manual_seed(0))
    expected = logits(source, ids)
    model, _ = load_model(tmp_path / "ours", CPU)
    with torch.no_grad():
        assert close(model(ids), expected)
    export(tmp_path / "ours", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == [f"{exported}ForCausalLM"]
    assert f"| {exported}: 2 layers" in (tmp_path / "out/README.md").read_text()
    assert close(logits(tmp_path / "out", ids), expected)
    # What left comes back as the same model.
    import_hf(tmp_path / "out", tmp_path / "back")
    assert read_state(tmp_path / "back")[1].model == read_state(tmp_path / "ours")[1].model
