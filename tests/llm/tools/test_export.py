"""A model leaves and comes back: other programs compute the same from it, and a round trip changes no bit."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import SHAPE, write_checkpoint
from safetensors.torch import load_file, save_file

from llm.config import ModelConfig
from llm.data.tokenizer import load_tokenizer
from llm.errors import UserError
from llm.inference.decode import generate
from llm.model.checkpoint import load_model, read_state, write_state
from llm.model.checkpoint_path import locate
from llm.model.hf import gguf_names, to_hf
from llm.model.hf_config import config_from_hf, hf_config
from llm.model.transformer import Transformer
from llm.tools.export import export
from llm.tools.import_model import import_hf

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
VARIANTS = {
    "llama": {"qk_norm": False},
    "tied": {"tie_embeddings": True, "norm_eps": 1e-5, "qk_norm": False},
    "qwen3": {"qk_norm": True, "n_kv_heads": 1, "rope_theta": 500_000.0},
}
YARN = {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 16}
TEXT = "def read(self):\n    return '<s>' + self.x  # é\n"


@pytest.fixture(scope="module", params=VARIANTS)
def ckpt(request: pytest.FixtureRequest, small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model with random weights, in a run's folder with its metrics."""
    tokenizer = load_tokenizer(small_tokenizer)
    weights = Transformer(ModelConfig(**SHAPE | VARIANTS[request.param] | {"vocab_size": tokenizer.vocab_size}))
    weights.init_weights(1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in weights.named_parameters():
            value *= 4 if name == "lm_head.weight" else 1
            value += 0.3 * torch.randn(value.shape, generator=generator) if value.dim() == 1 else 0
    run_dir = tmp_path_factory.mktemp("export")
    lines = [{"step": s, "tokens": 512 * s, "loss": 6.0 - s / 4} for s in range(1, 10)]
    lines.append({"step": 8, "tokens": 4096, "val_loss": 4.25, "perplexity": 70.1, "bits_per_byte": 2.5})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return write_checkpoint(run_dir, weights, tokenizer)


def agree(folder: Path, ckpt: Path, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """transformers loads the folder as it is, and its logits are ours at every position up to max_seq_len."""
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, **options
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, tokenizer = load_model(ckpt, CPU, dtype)
    ids = torch.randint(tokenizer.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = theirs(ids).logits, ours.float()(ids)
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()


class TestExport:
    @pytest.mark.parametrize("max_file_bytes", [5_000_000_000, 50_000])
    def test_transformers_loads_it_as_it_is(self, ckpt: Path, tmp_path: Path, max_file_bytes: int) -> None:
        made = export(ckpt, tmp_path / "out", max_file_bytes=max_file_bytes)
        agree(tmp_path / "out", ckpt)
        files = sorted((tmp_path / "out").glob("*.safetensors"))
        assert made["files"] == sorted(path.name for path in (tmp_path / "out").iterdir())
        if max_file_bytes < 100_000:
            assert len(files) > 2
            assert all(len(load_file(path)) == 1 or path.stat().st_size < 60_000 for path in files)
        else:
            assert [path.name for path in files] == ["model.safetensors"]
        assert oct(files[0].stat().st_mode) == oct((tmp_path / "out/config.json").stat().st_mode)

    def test_its_tokens_and_what_it_says_are_ours(self, ckpt: Path, tmp_path: Path) -> None:
        export(ckpt, tmp_path / "out")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        ours, tokenizer = load_model(ckpt, CPU)
        prompt = their_tokenizer(TEXT, return_tensors="pt", split_special_tokens=True)
        assert prompt.input_ids[0].tolist() == [tokenizer.bos_id, *tokenizer.encode(TEXT)]
        length = prompt.input_ids.shape[1]
        continued = theirs.generate(**prompt, do_sample=False, max_new_tokens=64 - length)[0, length:]
        ids = list(generate(ours, prompt.input_ids[0].tolist(), max_new_tokens=64, temperature=0, eos_ids=[2]))
        assert continued[: len(ids)].tolist() == ids

    def test_the_cards_snippet_runs_as_it_stands(
        self, ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        export(ckpt, tmp_path / "out")
        monkeypatch.chdir(tmp_path / "out")
        (snippet,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
        exec(snippet.replace("max_new_tokens=100", "max_new_tokens=3"), {})
        assert capsys.readouterr().out.startswith("Once upon a time")

    def test_a_batch_in_a_pipeline_is_continued_as_each_text_alone(self, ckpt: Path, tmp_path: Path) -> None:
        export(ckpt, tmp_path / "out")
        pipeline = transformers.pipeline("text-generation", str(tmp_path / "out"))
        texts = ["def read(self):", "x"]
        options = {"max_new_tokens": 8, "do_sample": False}
        batch = [answer[0]["generated_text"] for answer in pipeline(texts, batch_size=2, **options)]
        assert batch == [pipeline(text, **options)[0]["generated_text"] for text in texts]

    def test_bf16_weights_are_ours_rounded_once(self, ckpt: Path, tmp_path: Path) -> None:
        export(ckpt, tmp_path / "out", precision="bf16")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        assert loaded.dtype == torch.bfloat16
        agree(tmp_path / "out", ckpt, torch.bfloat16)

    def test_the_card_says_what_was_measured(self, ckpt: Path, tmp_path: Path) -> None:
        export(ckpt, tmp_path / "out")
        card = (tmp_path / "out/README.md").read_text()
        for expected in (
            "training loss (nats per token) | 4.0000",  # of the checkpoint's step, not of the run's last
            "validation perplexity | 70.1000",
            "4,096 tokens, in 8 steps of 512",
            "`feed`",
            '"n_layers": 2',
            "](loss_curve.png)",
        ):
            assert expected in card
        is_qwen = "| Qwen3: 2 layers" in card
        assert is_qwen == ("llama.cpp's own converter writes for Qwen3 that a blank" in card)
        assert (tmp_path / "out/loss_curve.png").read_bytes()[:4] == b"\x89PNG"
        alone = shutil.copytree(ckpt, tmp_path / "alone/ckpt")
        export(alone, tmp_path / "bare")
        assert "metrics were not next to the checkpoint" in (tmp_path / "bare/README.md").read_text()
        assert not (tmp_path / "bare/loss_curve.png").exists()

    @pytest.mark.parametrize(
        ("optimizer", "expected"),
        [
            ({"lr": 0.005}, "| learning rate | 0.005 at its peak, AdamW |"),
            (
                {"kind": "muon", "lr": 0.005, "muon_lr": 0.02},
                "| 0.02 at its peak for the matrices inside the blocks, Muon; 0.005 for the rest, AdamW |",
            ),
            (
                {"lr": 0.005, "embed_lr": 0.03, "norm_lr": 0.03, "head_lr": 0.01},
                "| 0.005 at its peak for the matrices inside the blocks, AdamW; 0.03 for the embedding, "
                "0.03 for the norms, 0.01 for the LM head, AdamW |",
            ),
        ],
    )
    def test_the_card_names_the_optimizer_that_was_used(
        self, small_tokenizer: Path, tmp_path: Path, optimizer: dict[str, Any], expected: str
    ) -> None:
        tokenizer = load_tokenizer(small_tokenizer)
        weights = Transformer(ModelConfig(**SHAPE, vocab_size=tokenizer.vocab_size))
        weights.init_weights(0)
        export(write_checkpoint(tmp_path / "run", weights, tokenizer, **optimizer), tmp_path / "out")
        assert expected in (tmp_path / "out/README.md").read_text()

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_gguf(self, ckpt: Path, tmp_path: Path, precision: str) -> None:
        """Its own reader accepts the file, and what transformers reads from it computes what we do."""
        gguf = pytest.importorskip("gguf")
        export(ckpt, tmp_path / "out", format="gguf", precision=precision)
        reader = gguf.GGUFReader(tmp_path / "out/model.gguf")
        tokenizer = load_tokenizer(ckpt / "tokenizer.model")
        assert len(reader.fields["tokenizer.ggml.tokens"].data) == tokenizer.vocab_size
        assert reader.fields["tokenizer.ggml.bos_token_id"].contents() == tokenizer.bos_id
        kinds = {tensor.tensor_type.name for tensor in reader.tensors if "norm" not in tensor.name}
        assert kinds == {"F32" if precision == "fp32" else "BF16"}
        if precision == "fp32":
            config = transformers.AutoConfig.from_pretrained(ckpt)  # it reads no head_dim of a Qwen3 from GGUF
            agree(tmp_path / "out", ckpt, gguf_file="model.gguf", config=config)

    @pytest.mark.parametrize(
        ("changes", "architecture"),
        [
            ({"qk_norm": False, "attention_bias": "qkv", "embedding_rows": 510}, "qwen2"),
            ({"qk_norm": False, "attention_bias": "qkvo", "head_dim": 32}, "llama"),
            ({"qk_norm": False, "sliding_window": 20}, "llama"),
            ({"rope_scaling": YARN}, "qwen3"),
        ],
    )
    def test_gguf_of_llamas_relatives(
        self, small_tokenizer: Path, tmp_path: Path, changes: dict[str, Any], architecture: str
    ) -> None:
        """Every tensor arrives under llama.cpp's names, with the rows of a Llama's queries and keys in its order."""
        gguf = pytest.importorskip("gguf")
        tokenizer = load_tokenizer(small_tokenizer)
        weights = Transformer(ModelConfig.model_validate(SHAPE | {"vocab_size": 500} | changes))
        weights.init_weights(0)
        with torch.no_grad():
            for name, value in weights.named_parameters():
                value += torch.randn(value.shape) if name.endswith(".bias") else 0
        ckpt = write_checkpoint(tmp_path / "run", weights, tokenizer)
        export(ckpt, tmp_path / "out", format="gguf")
        reader = gguf.GGUFReader(tmp_path / "out/model.gguf")
        fields = {key: field.contents() for key, field in reader.fields.items()}
        model = weights.config
        assert fields["general.architecture"] == architecture
        assert len(fields["tokenizer.ggml.tokens"]) == fields[f"{architecture}.vocab_size"] == model.rows
        assert fields[f"{architecture}.context_length"] == (model.sliding_window or model.max_seq_len)
        assert fields[f"{architecture}.attention.key_length"] == model.head_size
        if model.rope_scaling is not None:
            assert fields[f"{architecture}.rope.scaling.type"] == "yarn"
            assert fields[f"{architecture}.rope.scaling.factor"] == 4.0
            assert fields[f"{architecture}.rope.scaling.original_context_length"] == 16
            assert fields[f"{architecture}.rope.scaling.attn_factor"] == 1.0
        found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
        expected: dict[str, torch.Tensor] = {}
        for name, value in weights.named_parameters():
            parts = to_hf(model, name, value.detach()).values()
            for hf_name, part in zip(gguf_names(name), parts, strict=True):
                if architecture == "llama" and (".attn_q." in hf_name or ".attn_k." in hf_name):
                    # Row 2 i + h of a head is row i of its half h.
                    half = model.head_size // 2
                    order = [h * half + i for i in range(half) for h in range(2)]
                    heads = part.shape[0] // model.head_size
                    part = torch.cat([part[n * model.head_size :][: model.head_size][order] for n in range(heads)])
                expected[hf_name] = part
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"attention_bias": "qkvo"}, "llama.cpp's qwen3 has no biases"),
            ({"qk_norm": False, "attention_bias": "qkv", "head_dim": 32}, "qwen2 has heads of d_model / n_heads"),
            ({"rope_scaling": {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 16}}, "no factors of the freq"),
            ({"rope_scaling": YARN | {"beta_fast": 20.0}}, "YaRN with the usual limits"),
        ],
    )
    def test_gguf_refuses_what_llama_cpp_would_not_compute(
        self, small_tokenizer: Path, tmp_path: Path, changes: dict[str, Any], expected: str
    ) -> None:
        pytest.importorskip("gguf")
        weights = Transformer(ModelConfig.model_validate(SHAPE | {"vocab_size": 500} | changes))
        weights.init_weights(0)
        ckpt = write_checkpoint(tmp_path / "run", weights, load_tokenizer(small_tokenizer))
        with pytest.raises(UserError, match=re.escape(expected)):
            export(ckpt, tmp_path / "out", format="gguf")

    def test_a_folder_in_use_is_left_alone(self, ckpt: Path, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("mine")
        for call in (lambda: export(ckpt, tmp_path), lambda: import_hf(ckpt, tmp_path)):
            with pytest.raises(UserError, match="exists already"):
                call()
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


class TestImport:
    def test_gguf_refuses_an_activation_that_llama_cpp_would_not_compute(
        self, ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("gguf")
        monkeypatch.setattr("llm.tools.gguf.HIDDEN_ACT", "gelu")
        with pytest.raises(UserError, match=r"computes SwiGLU, this model gelu"):
            export(ckpt, tmp_path / "out", format="gguf")
        assert not (tmp_path / "out").exists()

    def test_weights_of_another_shape_than_the_config_are_refused(self, ckpt: Path, tmp_path: Path) -> None:
        damaged = shutil.copytree(locate(ckpt), tmp_path / "damaged")
        described = json.loads((damaged / "state.json").read_text())["config"]
        described["model"]["d_ff"] += 16
        write_state(damaged, {"config": described})
        with pytest.raises(UserError, match="is of another shape"):
            export(damaged, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("max_file_bytes", [5_000_000_000, 50_000])
    def test_a_round_trip_changes_no_bit(self, ckpt: Path, tmp_path: Path, max_file_bytes: int) -> None:
        export(ckpt, tmp_path / "out", max_file_bytes=max_file_bytes)
        import_hf(tmp_path / "out", tmp_path / "back")
        for name in ("config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / "back" / name).read_bytes() == (ckpt / name).read_bytes()
        before, after = (load_file(folder / "model.safetensors") for folder in (ckpt, tmp_path / "back"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert read_state(tmp_path / "back")[1].model == read_state(ckpt)[1].model

    def test_bf16_comes_back_as_it_was_exported(self, ckpt: Path, tmp_path: Path) -> None:
        export(ckpt, tmp_path / "out", precision="bf16")
        import_hf(tmp_path / "out", tmp_path / "back")
        export(tmp_path / "back", tmp_path / "again", precision="bf16")
        first, second = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
        assert first.read_bytes() == second.read_bytes()

    def test_a_model_that_transformers_saved_computes_the_same(self, ckpt: Path, tmp_path: Path) -> None:
        """With the names, the config keys and the defaults that it writes itself."""
        theirs = transformers.AutoModelForCausalLM.from_pretrained(ckpt)
        theirs.save_pretrained(tmp_path / "theirs")
        import_hf(tmp_path / "theirs", tmp_path / "ours", tok=ckpt / "tokenizer.model")
        agree(tmp_path / "theirs", tmp_path / "ours")

    def test_it_is_a_checkpoint_to_evaluate_and_to_start_from(
        self,
        llm_here: Callable[..., tuple[int, str, str]],
        small_shards: Path,
        write_config,
        ckpt: Path,
        tmp_path: Path,
    ) -> None:
        if read_state(ckpt)[1].model.tie_embeddings or read_state(ckpt)[1].model.qk_norm:
            pytest.skip("one shape is enough")
        code, out, err = llm_here("import", "--from", ckpt, "--out_dir", tmp_path / "ours", "--json")
        assert code == 0, err
        code, out, err = llm_here(
            "eval", "--ckpt", tmp_path / "ours", "--input", small_shards, "--device", "cpu", "--json"
        )
        assert code == 0, err
        scored = json.loads(out.splitlines()[-1])
        model = json.loads((tmp_path / "ours/state.json").read_text())["config"]["model"]
        changes = {f"model__{key}": value for key, value in model.items()}
        changes |= {"train__init_from": str(tmp_path / "ours"), "train__total_tokens": 512, "train__eval_tokens": None}
        path = write_config(**changes)
        code, _, err = llm_here("train", "--config", path)
        assert code == 0, err
        first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
        assert first["step"] == 0
        assert first["val_loss"] == pytest.approx(scored["nll_per_token"], abs=0.2)  # sequences cut otherwise

    @pytest.mark.parametrize(
        ("damage", "expected"),
        [
            (lambda path: (path / "config.json").unlink(), "is no Hugging Face model folder"),
            (lambda path: (path / "config.json").write_text("{"), "config.json: not JSON"),
            (lambda path: change(path, model_type="gpt2"), "model_type 'gpt2'"),
            (lambda path: change(path, head_dim=24), "model.head_dim 24: the head dimension must be a multiple of 16"),
            (lambda path: change(path, attention_bias=True), "no tensor model.layers.0.self_attn.q_proj.bias"),
            (lambda path: change(path, rope_parameters={"rope_type": "dynamic", "factor": 4}), "rope_type 'dynamic'"),
            (lambda path: change(path, hidden_size=None), "hidden_size is missing"),
            (lambda path: change(path, vocab_size=499), "has 500 pieces and the model a vocabulary of 499"),
            (lambda path: change(path, intermediate_size=97), "mlp.gate_proj.weight has shape [96, 64]"),
            (lambda path: change(path, num_hidden_layers=3), "no tensor model.layers.2."),
            (lambda path: change(path, num_hidden_layers=1), "11 tensors have no place in this model, such as model"),
            (lambda path: (path / "model.safetensors").unlink(), "has no model.safetensors"),
            (lambda path: (path / "model.safetensors").write_bytes(b"\x80\x04" * 9), "model.safetensors: damaged"),
            (lambda path: (path / "tokenizer.model").unlink(), "has no tokenizer.json or tokenizer.model"),
            (lambda path: integers(path / "model.safetensors"), "only fp32, bf16 and fp16 weights are read"),
            (lambda path: change(path, rope_parameters="x"), "config.json: rope_parameters is 'x', not an object"),
            (lambda path: change(path, rope_scaling=["x"]), "config.json: rope_scaling is ['x'], not an object"),
            # transformers reads rope_scaling where both are present.
            (lambda path: change(path, rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_type 'dynamic'"),
            (lambda path: change(path, rope_theta=10**400, rope_parameters=None), "config.json: rope_theta = 1000"),
            (lambda path: change(path, rope_parameters={"rope_theta": {"a": 1}}), "not an object of numbers"),
            (lambda path: change(path, hidden_size="64"), "hidden_size is '64', not a number above 0"),
            (lambda path: change(path, num_attention_heads=0), "num_attention_heads is 0, not a number above 0"),
            (lambda path: change(path, intermediate_size=2**62), "d_ff = 4611686018427387904: input should be less"),
            (lambda path: change(path, num_key_value_heads=3), "is not a multiple of model.n_kv_heads 3"),
            (lambda path: (path / "config.json").write_text("[" * 100_000), "config.json: not JSON"),
            (lambda path: (path / "config.json").write_bytes(b"\xff\xfe"), "config.json: not JSON"),
            (lambda path: (path / "config.json").write_text("9" * 5_000), "config.json: not JSON"),
            (lambda path: (path / "config.json").write_text("[]"), "config.json: not a JSON object"),
            (lambda path: pipe(path / "config.json"), "is no Hugging Face model folder"),
            (lambda path: index(path, []), "model.safetensors.index.json: damaged"),
            (lambda path: index(path, "s"), "model.safetensors.index.json: damaged"),
            (lambda path: index(path, {"x": 5}), "model.safetensors.index.json: damaged"),
            (lambda path: index(path, {"x": "../folder/model.safetensors"}), "a file outside its folder"),
            (lambda path: index(path, {"x": str(path / "model.safetensors")}), "a file outside its folder"),
            (lambda path: index(path, {NORM: "none.safetensors"}), "none.safetensors: missing; the folder is"),
            (lambda path: index(path, {"x": "model.safetensors"}), "no tensor x, which model.safetensors.index.json"),
            (lambda path: pipe(path / "model.safetensors"), "has no model.safetensors"),
            (lambda path: not_finite(path / "model.safetensors"), "model.norm.weight holds a number that is"),
        ],
    )
    def test_what_cannot_be_imported_is_named(
        self, small_tokenizer: Path, tmp_path: Path, damage: Callable[[Path], object], expected: str
    ) -> None:
        model = ModelConfig(**SHAPE, vocab_size=500)
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(hf_config(model, 1, 2)))
        shutil.copyfile(small_tokenizer, folder / "tokenizer.model")
        weights = Transformer(model)
        weights.init_weights(0)
        tensors: dict[str, torch.Tensor] = {}
        for name, value in weights.named_parameters():
            tensors |= {key: part.detach().clone() for key, part in to_hf(model, name, value).items()}
        save_file(tensors, folder / "model.safetensors")
        damage(folder)
        with pytest.raises(UserError) as caught:
            import_hf(folder, tmp_path / "out")
        assert expected in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]


NORM = "model.norm.weight"


def index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def not_finite(path: Path) -> None:
    tensors = load_file(path)
    tensors[NORM][0] = float("inf")
    save_file(tensors, path)


def change(folder: Path, **keys: Any) -> None:
    tree = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps(tree))


def integers(path: Path) -> None:
    save_file({name: value.to(torch.int8) for name, value in load_file(path).items()}, path)


def test_config_there_and_back() -> None:
    for changes in VARIANTS.values():
        model = ModelConfig(**SHAPE | changes | {"vocab_size": 500})
        assert config_from_hf(hf_config(model, 1, 2)) == model


@pytest.mark.slow
def test_served_by_transformers_and_asked_by_openais_client_it_says_what_we_do(
    llm_here: Callable[..., tuple[int, str, str]], small_tokenizer: Path, tmp_path: Path
) -> None:
    """Streaming, greedy; the model has learnt one text by heart. Needs fastapi, uvicorn and openai."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package)
    openai = pytest.importorskip("openai")
    text = "def greet(name):\n    return 'Grüße 🙂, <s>' + name\n"
    tokenizer = load_tokenizer(small_tokenizer)
    model = Transformer(ModelConfig(**SHAPE, vocab_size=tokenizer.vocab_size))
    model.init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]])
    assert ids.shape[1] <= 64
    for _ in range(200):
        optimizer.zero_grad()
        model(ids[:, :-1], labels=ids[:, 1:], reduction="mean").backward()
        optimizer.step()
    ckpt = write_checkpoint(tmp_path, model, tokenizer)
    code, out, err = llm_here("generate", "--ckpt", ckpt, "--prompt", "def greet", "--temperature", 0, "--json")
    assert code == 0, err
    ours = json.loads(out.splitlines()[-1])["text"]
    assert "def greet" + ours == text

    export(ckpt, tmp_path / "out")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", tmp_path / "out", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=60)
            pieces = [
                chunk.choices[0].text
                for chunk in client.completions.create(
                    model=str(tmp_path / "out"), prompt="def greet", temperature=0, max_tokens=60, stream=True
                )
            ]
        finally:
            server.terminate()
    assert "".join(pieces) == ours
    assert len([piece for piece in pieces if piece]) > 3
