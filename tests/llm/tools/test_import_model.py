"""Models of others come in: each family, with a config in its published style, computes what transformers does."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from running import run_llm
from safetensors.torch import load_file, save_file

from llm.errors import UserError
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
    # As a Llama, because the tokenizer here is not Qwen2's.
    "Qwen2": (QWEN2, "Llama"),
    "Qwen2.5, untied": ({**QWEN2, "tie_word_embeddings": False}, "Llama"),
    "Qwen2.5, YaRN": (
        {
            **QWEN2,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 16, "type": "yarn"},
            "rope_theta": 1000.0,
        },
        "Llama",
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_number_arrives_from_any_dtype_and_number_of_files(
    small_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    source = write_folder(tmp_path / "source", QWEN3, small_tokenizer, dtype)
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    files: dict[str, str] = {}
    for number, name in enumerate(weights):
        files[name] = f"model-{number % 3 + 1:05d}-of-00003.safetensors"
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, source / file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    monkeypatch.setattr("llm.tools.import_model.BLOCK_ELEMENTS", 1_000)  # several blocks for each tensor
    import_hf(source, tmp_path / "ours")
    found = load_file(tmp_path / "ours/model.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name].float()) for name in weights)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_without_a_token_come_and_go_unchanged(small_tokenizer: Path, tmp_path: Path, tied: bool) -> None:
    config = {**QWEN2, "vocab_size": 520, "tie_word_embeddings": tied}
    source = write_folder(tmp_path / "source", config, small_tokenizer)
    made = import_hf(source, tmp_path / "ours")
    assert (made["model"]["vocab_size"], made["model"]["embedding_rows"]) == (500, 520)
    ids = torch.randint(500, (2, 64), generator=torch.Generator().manual_seed(0))
    model, _ = load_model(tmp_path / "ours", CPU)
    with torch.no_grad():
        assert close(model(ids), logits(source, ids)[..., :500])
    export(tmp_path / "ours", tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert import_hf(tmp_path / "out", tmp_path / "back")["model"] == made["model"]


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(small_tokenizer: Path, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", {**LLAMA, "vocab_size": 499}, small_tokenizer)
    with pytest.raises(UserError, match="500 pieces and the model a vocabulary of 499"):
        import_hf(source, tmp_path / "ours")


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "Gemma 2": (
        {
            **LLAMA,
            "model_type": "gemma2",
            "hidden_act": "gelu_pytorch_tanh",
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        ["norms that multiply by 1 + weight", "hidden_act 'gelu_pytorch_tanh'", "final_logit_softcapping 30.0"],
    ),
    "OLMo 2": ({**LLAMA, "model_type": "olmo2"}, ["norms after attention and MLP instead of before"]),
    "SmolLM3": (
        {**LLAMA, "model_type": "smollm3", "no_rope_layers": [1, 0]},
        ["layers without RoPE", "no_rope_layers True"],
    ),
    "Mixtral": (
        {**MISTRAL, "model_type": "mixtral", "num_local_experts": 8},
        ["mixture of experts", "num_local_experts 8"],
    ),
    "GPT-2": ({"model_type": "gpt2"}, ["model_type 'gpt2': this model has no learned positions"]),
    "unknown": ({"model_type": "next"}, ["model_type 'next': only llama, mistral, qwen2"]),
    "dynamic RoPE, biases in the MLP": (
        {**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "mlp_bias": True},
        ["rope_type 'dynamic'", "mlp_bias True"],
    ),
    "Phi-3, 128k": (
        {**PHI3, "rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}},
        ["rope_type 'longrope'"],
    ),
    "Phi-4 mini": ({**PHI3, "partial_rotary_factor": 0.75}, ["partial_rotary_factor 0.75"]),
    "window in some layers, small heads": (
        {**QWEN2, "use_sliding_window": True, "max_window_layers": 1, "num_attention_heads": 8},
        ["sliding_window: this model has it in all layers or in none"],
    ),
    "quantised, heads of 8": (
        {**LLAMA, "quantization_config": {"bits": 4}},
        ["quantization_config True"],
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_missing_is_named_before_any_weight_is_read(
    family: str, small_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All reasons at once: of the config, of the weights' files and of the tokenizer."""
    config, expected = REFUSED[family]
    monkeypatch.setattr("llm.tools.import_model._blocks", None)
    (tmp_path / "source").mkdir()
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    (tmp_path / "source/pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError) as caught:
        import_hf(tmp_path / "source", tmp_path / "ours")
    message = str(caught.value)
    assert "\n" not in message
    for part in [*expected, "pytorch_model.bin is a pickle", "save_pretrained", "has no tokenizer.json or"]:
        assert part in message
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_a_longer_context_is_scaled_as_in_transformers(kind: str, small_tokenizer: Path, tmp_path: Path) -> None:
    """Of our own checkpoint, with keys as a user of transformers writes them."""
    import_hf(write_folder(tmp_path / "source", LLAMA3, small_tokenizer), tmp_path / "ours")
    made = import_hf(tmp_path / "ours", tmp_path / "long", max_seq_len=256, rope_scaling=kind)
    assert made["model"]["max_seq_len"] == 256
    tree = json.loads((tmp_path / "source/config.json").read_text()) | {"max_position_embeddings": 256}
    tree["rope_scaling"] = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 64}
    if kind == "llama3":
        tree["rope_scaling"] |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    (tmp_path / "source/config.json").write_text(json.dumps(tree))
    ids = torch.randint(500, (1, 256), generator=torch.Generator().manual_seed(0))
    expected = logits(tmp_path / "source", ids)
    model, _ = load_model(tmp_path / "long", CPU)
    with torch.no_grad():
        assert close(model(ids), expected)
    assert close(logits(tmp_path / "long", ids), expected)
    # Longer still: the factor is of the first length, not of both.
    again = import_hf(tmp_path / "long", tmp_path / "longer", max_seq_len=512, rope_scaling=kind)
    assert again["model"]["rope_scaling"]["factor"] == 8.0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rope_scaling": "yarn"}, "--rope_scaling yarn: needs --max_seq_len"),
        ({"rope_scaling": "yarn", "max_seq_len": 64}, "--max_seq_len 64: not above the model's 64"),
        ({"rope_scaling": "linear", "max_seq_len": 128}, "the model has llama3 already"),
        ({"max_seq_len": 1}, "--max_seq_len: max_seq_len = 1: input should be greater"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(
    options: dict[str, Any], expected: str, small_tokenizer: Path, tmp_path: Path
) -> None:
    config = {**LLAMA3, "rope_scaling": LLAMA31_ROPE} if options.get("rope_scaling") == "linear" else LLAMA3
    source = write_folder(tmp_path / "source", config, small_tokenizer)
    with pytest.raises(UserError) as caught:
        import_hf(source, tmp_path / "ours", **options)
    assert expected in str(caught.value)


@pytest.mark.slow
def test_the_printed_command_trains_on_a_text_of_the_users(
    small_tokenizer: Path, small_corpus: Path, tmp_path: Path
) -> None:
    """Import, prepare, train 50 steps, export: the loss falls, transformers agrees, and rows of no token stay."""
    source = write_folder(tmp_path / "source", {**QWEN2, "vocab_size": 520}, small_tokenizer)
    done = run_llm("import", "--from", source, "--out_dir", "ours", "--json", cwd=tmp_path)
    command = json.loads(done.stdout.splitlines()[-1])["command"]
    assert command in done.stderr
    assert command.startswith("llm prepare_data --input TEXT --tok ours ")
    command = command.replace("TEXT", str(small_corpus)).replace("llm ", f"{sys.executable} -m llm ")
    command += " train.total_tokens=25_600 train.global_batch_tokens=512 train.device=cpu train.precision=fp32"
    command += " optimizer.lr=3e-3 train.force=true"
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, capture_output=True)
    lines = [json.loads(line) for line in (tmp_path / "ours-trained/metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    assert losses[-1] < losses[0] - 0.5
    run_llm("export", "--ckpt", "ours-trained", "--out_dir", "out", cwd=tmp_path)
    ids = torch.randint(500, (2, 64), generator=torch.Generator().manual_seed(0))
    model, _ = load_model(tmp_path / "ours-trained", CPU)
    with torch.no_grad():
        assert close(model(ids), logits(tmp_path / "out", ids)[..., :500])
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    name = "model.embed_tokens.weight"
    assert torch.equal(before[name][500:], after[name][500:])
    assert not torch.equal(before[name][:500], after[name][:500])
    biases = [key for key in before if key.endswith(".bias")]
    assert len(biases) == 6
    assert not any(torch.equal(before[key], after[key]) for key in biases)


@pytest.mark.slow
def test_a_model_needs_no_more_memory_than_its_largest_tensor(small_tokenizer: Path, tmp_path: Path) -> None:
    """Of 150 million parameters, which are 600 MB in fp32; the largest tensor has 8."""
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 9, "num_attention_heads": 16}
    small = write_folder(tmp_path / "small", LLAMA3, small_tokenizer)
    large = write_folder(tmp_path / "large", {**LLAMA3, **shape}, small_tokenizer, torch.bfloat16)
    assert (large / "model.safetensors").stat().st_size > 250e6
    program = (
        "import resource, sys; from llm.tools.import_model import import_hf\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "import_hf(sys.argv[1], sys.argv[1] + '-ours'); before = peak()\n"
        "import_hf(sys.argv[2], sys.argv[2] + '-ours'); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program, small, large], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 120e6
