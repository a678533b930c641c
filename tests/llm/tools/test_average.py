"""The mean of a run's last checkpoints is a model folder like any other."""

import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from running import small_config, without_checksums
from safetensors.torch import load_file, save_file

from llm.config_file import parse_config
from llm.data.manifest import read_manifest
from llm.data.shards import ORDER_VERSION
from llm.data.tokenizer import load_tokenizer
from llm.errors import UserError
from llm.model.checkpoint import DataState, TrainState, load_model, read_state, read_weights, write_state
from llm.model.hf import to_hf
from llm.model.transformer import Transformer
from llm.tools import average as averaging
from llm.tools.average import average
from llm.training import saving

Llm = Callable[..., tuple[int, str, str]]
STEPS = (2, 4, 6)


def make_run(folder: Path, shards: Path, tokenizer: Path, **changes: Any) -> Path:
    """A run with a checkpoint of random weights at each of STEPS."""
    pieces = load_tokenizer(tokenizer)
    shape = {"model__vocab_size": pieces.vocab_size, "data__seq_len": 64, **changes}
    config = parse_config(small_config(shards, folder, **shape), "test")
    for step in STEPS:
        model = Transformer(config.model)
        model.init_weights(step)
        tensors: dict[str, torch.Tensor] = {}
        for name, value in model.named_parameters():
            tensors |= {key: part.detach().clone() for key, part in to_hf(config.model, name, value).items()}
        data = DataState(read_manifest(shards).dataset_hash, 64, 1337, ORDER_VERSION, 8 * step)
        state = TrainState(step, 512 * step, data, val_loss=3.0, best_val_loss=3.0, worse_validations=1)
        saving.write_checkpoint(folder / f"step-{step:08d}", {"model": tensors}, config, state, pieces)
    return folder


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def run(request: pytest.FixtureRequest, small_shards: Path, small_tokenizer: Path, tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", small_shards, small_tokenizer, model__tie_embeddings=request.param)


@pytest.mark.parametrize("last", [1, 2, 3])
def test_every_weight_is_the_mean_of_the_last_checkpoints(run: Path, tmp_path: Path, last: int) -> None:
    made = average(run, tmp_path / "mean", last=last)
    assert made["checkpoints"] == [f"step-{step:08d}" for step in STEPS[-last:]]
    parts = [load_file(run / name / "model.safetensors") for name in made["checkpoints"]]
    found = load_file(tmp_path / "mean/model.safetensors")
    assert found.keys() == parts[0].keys()
    for name, value in found.items():
        assert value.dtype == torch.float32
        exact = torch.stack([part[name].double() for part in parts]).mean(0)
        torch.testing.assert_close(value.double(), exact, rtol=3e-7, atol=1e-8, msg=name)
    if last == 1:
        assert all(torch.equal(value, parts[0][name]) for name, value in found.items())


def test_without_a_number_all_that_the_run_keeps_are_averaged(run: Path, tmp_path: Path) -> None:
    assert average(run, tmp_path / "mean")["checkpoints"] == [f"step-{step:08d}" for step in STEPS]


def test_without_a_number_older_checkpoints_than_keep_last_do_not_count(
    small_shards: Path, small_tokenizer: Path, llm_here: Llm, tmp_path: Path
) -> None:
    """Such a one is the best, or where the decay of wsd begins: at another rate."""
    run = make_run(tmp_path / "run", small_shards, small_tokenizer, checkpoint__keep_last=2)
    assert average(run)["checkpoints"] == ["step-00000004", "step-00000006"]
    assert read_state(run / "average-2")[0].step == 6
    code, out, err = llm_here("average", run, "--last", 3, "--json")
    assert code == 0, err
    assert json.loads(out)["out_dir"] == str(run / "average-3")
    assert f"next: llm eval --ckpt {run / 'average-3'}" in err


def test_the_folder_has_what_a_checkpoint_has_but_for_the_optimizer(run: Path, tmp_path: Path) -> None:
    average(run, tmp_path / "mean", last=2)
    names = {path.name for path in (tmp_path / "mean").iterdir()}
    assert names == {path.name for path in (run / "step-00000006").iterdir()}
    assert (tmp_path / "mean/config.json").read_bytes() == (run / "step-00000006/config.json").read_bytes()
    state, config = read_state(tmp_path / "mean")
    assert (state.step, state.tokens, state.val_loss, state.best_val_loss, state.worse_validations) == (
        *(6, 3072, None, None, 0),
    )
    assert (tmp_path / "mean/model.safetensors").stat().st_mode == (tmp_path / "mean/config.json").stat().st_mode
    weights = dict(read_weights(tmp_path / "mean", config.model))
    assert weights.keys() == dict(Transformer(config.model).named_parameters()).keys()


def test_other_verbs_take_it(
    run: Path, llm_here: Llm, small_shards: Path, tmp_path: Path, write_config: Callable[..., Path]
) -> None:
    mean = tmp_path / "mean"
    code, out, err = llm_here("average", run, "--last", "3", "--out_dir", mean, "--json")
    assert code == 0, err
    assert json.loads(out)["checkpoints"] == ["step-00000002", "step-00000004", "step-00000006"]
    assert f"{mean}: the mean of step-00000002, step-00000004, step-00000006" in err
    tied = read_state(mean)[1].model.tie_embeddings
    for arguments in (
        ("eval", "--ckpt", mean, "--input", small_shards),
        ("generate", "--ckpt", mean, "--prompt", "def ", "--max_new_tokens", "2"),
        ("export", "--ckpt", mean, "--out_dir", tmp_path / "export"),
        (
            *("train", "--config", write_config(train__init_from=str(mean), model__tie_embeddings=tied)),
            *("train.total_tokens=512", f"checkpoint.dir={tmp_path / 'new'}"),
        ),
    ):
        code, _, err = llm_here(*arguments)
        assert code == 0, err
    theirs = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(mean)
    ours, tokenizer = load_model(mean, torch.device("cpu"))
    ids = torch.randint(tokenizer.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = theirs(ids).logits, ours(ids)
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()


def test_a_tensor_is_in_the_file_before_the_next_is_read(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, live = averaging.write_tensors, []

    def watched(
        path: Path, shapes: dict[str, torch.Size], blocks: Callable[[str], Iterator[torch.Tensor]]
    ) -> dict[str, str]:
        def read_alone(name: str) -> Iterator[torch.Tensor]:
            assert not [reference for reference in live if reference() is not None], (
                f"another is held while {name} is read"
            )
            for tensor in blocks(name):
                live.append(weakref.ref(tensor))
                yield tensor

        return write(path, shapes, read_alone)

    monkeypatch.setattr(averaging, "write_tensors", watched)
    average(run, tmp_path / "mean", last=2)
    assert len(live) == len(load_file(tmp_path / "mean/model.safetensors"))


def test_what_cannot_be_averaged_is_one_line_and_leaves_nothing(run: Path, llm_here: Llm, tmp_path: Path) -> None:
    mean = tmp_path / "mean"

    def refused(*arguments: object) -> str:
        code, out, err = llm_here("average", *arguments, "--out_dir", mean)
        assert (code, out) == (1, "")
        assert not mean.exists()
        assert not list(tmp_path.glob(".mean*"))
        return err

    assert f"error: {run}: holds 3 checkpoints, not 4: name the folder" in refused(run, "--last", "4")
    assert "holds 0 checkpoints, not 2" in refused(tmp_path / "nowhere", "--last", "2")
    weights = run / "step-00000004/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert f"error: {weights}: damaged" in refused(run, "--last", "2")
    tensors = load_file_from(whole, tmp_path)
    sealed = (run / "step-00000004/state.json").read_bytes()
    without_checksums(run / "step-00000004")
    save_file({**tensors, "model.norm.weight": torch.full((32,), torch.nan)}, weights)
    assert f"error: {weights}: damaged (model.norm.weight is not finite)" in refused(run, "--last", "2")
    save_file({**tensors, "model.norm.weight": torch.ones(1)}, weights)
    assert "model is of another shape: model.norm.weight is [1], its config asks for [32]" in refused(
        run, "--last", "2"
    )
    weights.write_bytes(whole)
    (run / "step-00000004/state.json").write_bytes(sealed)
    data = asdict(read_state(run / "step-00000004")[0].data) | {"dataset_hash": "other"}
    write_state(run / "step-00000004", {"data": data})
    assert "step-00000004: is of another model or other data than step-00000006" in refused(run, "--last", "2")


def load_file_from(content: bytes, folder: Path) -> dict[str, torch.Tensor]:
    (folder / "intact.safetensors").write_bytes(content)
    return load_file(folder / "intact.safetensors")


def test_nothing_is_overwritten(run: Path, tmp_path: Path) -> None:
    kept = Path(shutil.copytree(run / "step-00000006", tmp_path / "kept"))
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    with pytest.raises(UserError, match="kept: exists already"):
        average(run, kept, last=2)
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
