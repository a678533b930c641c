"""Checkpoints as files: whole or absent, other programs can read them, and what is damaged is named."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import REPOSITORY, read_losses, result_of, run_llm, small_config, without_checksums
from safetensors.torch import load_file, save_file

from llm.errors import UserError
from llm.model import checkpoint_path
from llm.model.checkpoint import load_model
from llm.model.checkpoint_path import locate
from llm.model.tensor_files import open_tensors, save_tensors

CPU = torch.device("cpu")

Llm = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def run_dir(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of eight steps, checkpoints at 3, 6 and 8, of which two are kept."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tree = small_config(small_shards, folder / "run", checkpoint__every_steps=3, checkpoint__keep_last=2)
    (folder / "config.json").write_text(json.dumps(tree))
    run_llm("train", "--config", folder / "config.json")
    return folder / "run"


@pytest.fixture
def copy(run_dir: Path, tmp_path: Path) -> Path:
    """A copy of the last checkpoint, to damage."""
    return Path(shutil.copytree(run_dir / "latest", tmp_path / "ckpt"))


@pytest.fixture
def old(copy: Path) -> Path:
    """A copy as an earlier release has written it, without checksums: other damage must be found as well."""
    return without_checksums(copy)


def test_the_run_folder_holds_what_it_should(run_dir: Path) -> None:
    assert [path.name for path in checkpoint_path.saved(run_dir)] == ["step-00000006", "step-00000008"]
    assert (run_dir / "latest").is_symlink()
    assert (run_dir / "latest").readlink() == Path("step-00000008")
    assert not [path for path in run_dir.iterdir() if path.name.startswith(".")]
    status = json.loads((run_dir / "status.json").read_text())
    assert status["status"] == "complete"
    assert status["result"]["step"] == 8
    described = json.loads((run_dir / "run.json").read_text())
    assert described["config"]["model"]["vocab_size"] > 0
    assert "torch" in described["versions"]
    state = json.loads((run_dir / "latest/state.json").read_text())
    assert state["data"]["position"] == state["step"] * 8
    assert state["tokens"] == 8 * 512


def test_moments_and_steps_are_kept_under_the_weights_names(run_dir: Path) -> None:
    weights = load_file(run_dir / "latest/model.safetensors")
    for moment in ("exp_avg", "exp_avg_sq"):
        values = load_file(run_dir / f"latest/optimizer-{moment}.safetensors")
        assert {name: value.shape for name, value in values.items()} == {n: w.shape for n, w in weights.items()}
        assert all(value.abs().sum() > 0 for value in values.values())
    steps = load_file(run_dir / "latest/optimizer-step.safetensors")
    assert set(steps) == set(weights)
    assert {float(step) for step in steps.values()} == {8.0}


def test_transformers_loads_it_and_agrees(run_dir: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run_dir / "latest", dtype=torch.float32)
    ours, tokenizer = load_model(run_dir, CPU)
    text = "def read(self):\n    return self.x\n"
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(text)]])
    assert transformers.AutoTokenizer.from_pretrained(run_dir / "latest")(text).input_ids == ids[0].tolist()
    with torch.no_grad():
        expected, found = theirs(ids).logits, ours(ids)
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()


def test_a_finished_run_ends_at_once_with_the_same_result(run_dir: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    again = run_llm("train", "--config", run_dir.parent / "config.json", "--json")
    assert result_of(again) == json.loads((run_dir / "status.json").read_text())["result"]
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_a_run_does_not_go_on_with_another_optimizer(run_dir: Path, llm_here: Llm) -> None:
    muon = ["optimizer.kind=muon", "train.total_tokens=8192"]
    code, _, err = llm_here("train", "--config", run_dir.parent / "config.json", *muon)
    assert (code, "(optimizer.kind: adamw -> muon)" in err) == (1, True), err


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["run.json", "status.json", "metrics.jsonl"], "a run that has no checkpoint yet"),
        (["config.json", "model.safetensors"], "a Hugging Face model folder, not a checkpoint"),
        (["config.json", "model-00001-of-00002.safetensors"], "llm import --from "),
        (["model.gguf"], "an exported GGUF model"),
        (["manifest.json", "train-00000.bin"], "a directory of shards"),
        (["b/run.json", "a/run.json", "c/x"], "the parent folder of 2 runs; name one, such as "),
        (["notes.txt"], "not a checkpoint (no state.json in it)"),
    ],
)
def test_what_is_no_checkpoint_is_said(tmp_path: Path, files: list[str], expected: str) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(UserError) as caught:
        locate(tmp_path)
    assert expected in str(caught.value)
    with pytest.raises(UserError, match="a file; a checkpoint is a folder"):
        locate(next(path for path in tmp_path.rglob("*") if path.is_file()))


def test_locate_takes_a_checkpoint_a_run_or_its_link(run_dir: Path, tmp_path: Path) -> None:
    step = (run_dir / "step-00000008").resolve()
    assert locate(run_dir) == locate(run_dir / "latest") == locate(step) == step
    with pytest.raises(UserError, match="no such checkpoint"):
        locate(tmp_path / "nothing")
    with pytest.raises(UserError, match="not a checkpoint"):
        locate(tmp_path)


def state(path: Path, **changes: Any) -> None:
    tree = json.loads((path / "state.json").read_text())
    for key, value in changes.items():
        tree[key] = tree[key] | value if isinstance(value, dict) else value
    (path / "state.json").write_text(json.dumps(tree))


def model(path: Path, **changes: Any) -> dict[str, Any]:
    return {"model": json.loads((path / "state.json").read_text())["config"]["model"] | changes}


def header(path: Path, size: int) -> None:
    """A header of a size that the file does not have."""
    with open(path / "model.safetensors", "r+b") as file:
        file.write(size.to_bytes(8, "little"))


def huge_tensor(path: Path) -> None:
    """A header that says of a tensor more than there is."""
    size = 2**50
    described = {"model.norm.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    text = json.dumps(described).encode()
    (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\x00" * 64)


def linked(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def index(path: Path, text: str) -> None:
    (path / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: (path / "model.safetensors").unlink(), "model.safetensors: missing"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\x00" * 100), "model.safetensors: damaged"),
        (lambda path: (path / "model.safetensors").open("r+b").truncate(1000), "model.safetensors: damaged"),
        (lambda path: (path / "state.json").write_text("{"), "state.json: damaged"),
        (lambda path: (path / "state.json").write_text('{"format_version": 9}'), "checkpoint format 9"),
        (lambda path: (path / "state.json").write_text('{"format_version": 1}'), "state.json: damaged"),
        (lambda path: (path / "tokenizer.model").unlink(), "tokenizer.model"),
        # Made with intent
        (lambda path: state(path, step="8"), "state.json: damaged (step: Input should be a valid integer"),
        (lambda path: state(path, tokens=-1), "state.json: damaged (tokens: "),
        (lambda path: state(path, data={"position": 10**40}), "state.json: damaged (data."),
        (
            lambda path: state(path, config={"model": {"n_layers": 10**12}}),
            "state.json: model.n_layers = 1000000000000",
        ),
        (lambda path: state(path, config=[]), "state.json"),
        (
            lambda path: state(path, config=model(path) | {"train": {"global_batch_tokens": 512}}),
            "state.json: damaged (ValueError: train.total_tokens is null)",
        ),
        (lambda path: state(path, config=model(path, d_model=2**40)), "state.json: model.d_model = 1099511627776"),
        (lambda path: state(path, config=model(path, d_ff=2**50)), "state.json: model.d_ff = 1125899906842624"),
        (lambda path: state(path, config=model(path, vocab_size=2**20)), "another shape"),
        (lambda path: (path / "state.json").write_text("[" * 10**5), "state.json: damaged (RecursionError"),
        (lambda path: (path / "state.json").write_text(" " * 2**23), "state.json: damaged (ValueError: 8388608 bytes)"),
        (lambda path: (path / "state.json").write_bytes(b"\xff"), "state.json: damaged"),
        (lambda path: header(path, 2**62), "model.safetensors: damaged"),
        (lambda path: header(path, 90_000_000), "model.safetensors: damaged"),
        (lambda path: huge_tensor(path), "model.safetensors: damaged"),
        (lambda path: linked(path / "model.safetensors", "/dev/zero"), "model.safetensors: missing"),
        (lambda path: linked(path / "model.safetensors", "model.safetensors"), "model.safetensors: missing"),
        (lambda path: linked(path / "state.json", "/dev/zero"), "not a checkpoint"),
        (lambda path: linked(path / "state.json", "state.json"), "not a checkpoint"),
        (lambda path: index(path, "[]"), "model.safetensors.index.json: damaged"),
        (lambda path: index(path, '{"weight_map": {"model.norm.weight": 3}}'), "index.json: damaged"),
        (lambda path: index(path, '{"weight_map": {"model.norm.weight": "../x"}}'), "a file outside its folder"),
        (lambda path: index(path, '{"weight_map": {"model.norm.weight": "/etc/passwd"}}'), "a file outside its folder"),
        (lambda path: index(path, '{"weight_map": {}}'), "index.json: no tensor model.embed_tokens.weight"),
    ],
)
def test_a_damaged_checkpoint_is_one_error_that_names_the_file(
    old: Path, damage: Callable[[Path], object], expected: str
) -> None:
    damage(old)
    with pytest.raises(UserError) as caught:
        load_model(old, CPU)
    assert expected in str(caught.value)


def test_a_missing_tensor_and_another_shape_are_named(old: Path) -> None:
    weights = load_file(old / "model.safetensors")
    save_file({**weights, "model.norm.weight": torch.ones(7)}, old / "model.safetensors")
    with pytest.raises(UserError, match=r"another shape: model\.norm\.weight has shape \[7\]"):
        load_model(old, CPU)
    del weights["model.norm.weight"]
    save_file(weights, old / "model.safetensors")
    with pytest.raises(UserError, match=r"no tensor model\.norm\.weight"):
        load_model(old, CPU)


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.cat([tensor.flatten()[1:], torch.tensor([value])]).view_as(tensor)


@pytest.mark.parametrize(
    ("stem", "change", "expected"),
    [
        ("optimizer-step", lambda count: count.repeat(7), "has [7] counts for model.norm.weight, not one"),
        ("optimizer-step", filled(math.nan), "model.norm.weight is not finite"),
        ("optimizer-step", filled(-5), "model.norm.weight holds -5, below 0"),
        ("optimizer-step", filled(7), "has from 7 to 8 updates"),
        ("optimizer-step", torch.Tensor.int, "model.norm.weight is int32, not float32"),
        ("optimizer-exp_avg", filled(math.nan), "model.norm.weight is not finite"),
        ("optimizer-exp_avg", filled(-math.inf), "model.norm.weight is not finite"),
        ("optimizer-exp_avg", torch.Tensor.long, "model.norm.weight is int64, not float32"),
        ("optimizer-exp_avg", lambda moment: moment[None], "another shape: model.norm.weight has shape [1, 32]"),
        ("optimizer-exp_avg", lambda moment: moment[:0], "model.norm.weight is empty"),
        ("optimizer-exp_avg_sq", filled(-1e-9), "model.norm.weight holds -1e-09, below 0"),
        ("model", filled(math.nan), "model.norm.weight is not finite"),
    ],
)
def test_a_run_does_not_go_on_from_numbers_that_none_has_saved(
    run_dir: Path,
    old: Path,
    llm_here: Llm,
    tmp_path: Path,
    stem: str,
    change: Callable[[torch.Tensor], torch.Tensor],
    expected: str,
) -> None:
    file = old / f"{stem}.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.norm.weight": change(tensors["model.norm.weight"]).contiguous()}, file)
    error = error_of_going_on(llm_here, run_dir, old, tmp_path / "on")
    assert stem in error
    assert expected in error
    assert "use another checkpoint" in error


@pytest.mark.parametrize("stem", ["optimizer-step", "optimizer-exp_avg", "optimizer-exp_avg_sq"])
def test_a_run_does_not_go_on_without_an_optimizer_file(
    run_dir: Path, copy: Path, llm_here: Llm, tmp_path: Path, stem: str
) -> None:
    (copy / f"{stem}.safetensors").unlink()
    assert f"{stem}.safetensors: missing" in error_of_going_on(llm_here, run_dir, copy, tmp_path / "on")


def error_of_going_on(llm_here: Llm, run_dir: Path, source: Path, run: Path) -> str:
    """What `llm train --resume SOURCE` says; it has written nothing."""
    more = [f"checkpoint.dir={run}", "train.total_tokens=8192"]
    code, _, err = llm_here("train", "--config", run_dir.parent / "config.json", "--resume", source, *more)
    assert code == 1
    (error,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert f"error: {source}" in error
    assert not run.exists()
    return error


def test_nothing_reads_a_pickle() -> None:
    readers = re.compile(
        r"torch\.load\b|\bimport (?:pickle|dill|joblib|marshal|shelve)\b|from pickle|allow_pickle=True"
    )
    for folder in ("llm", "kernels"):
        for file in (REPOSITORY / folder).glob("*.py"):
            assert not readers.search(file.read_text()), file


def test_a_pickle_in_its_place_is_refused_not_run(copy: Path) -> None:
    torch.save({"model.norm.weight": torch.ones(1)}, copy / "model.safetensors")
    with pytest.raises(UserError, match="damaged"):
        load_model(copy, CPU)


def test_weights_alone_start_a_new_run(run_dir: Path, small_shards: Path, tmp_path: Path) -> None:
    tree = small_config(
        small_shards, tmp_path / "run", train__init_from=str(run_dir), train__total_tokens=512, optimizer__lr=1e-9
    )
    (tmp_path / "config.json").write_text(json.dumps(tree))
    result = result_of(run_llm("train", "--config", tmp_path / "config.json", "--json"))
    assert result["step"] == 1
    assert read_losses(tmp_path / "run")[0] < read_losses(run_dir)[0] - 0.2


def test_a_folder_whose_name_is_not_utf8_is_read_and_written(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"donn\xe9es")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_tensors(folder / "model.safetensors", {"a": torch.arange(4.0)})
    with open_tensors(folder, "model") as get:
        assert get("a").tolist() == [0.0, 1.0, 2.0, 3.0]
