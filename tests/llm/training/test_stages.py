"""Runs whose data change in stages: what they read, when they go on, and validation by source."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import read_losses, torchrun, without_checksums

from llm.data.manifest import read_manifest
from llm.data.mixture import mix
from llm.data.prepare import prepare_data
from llm.metrics import read_metrics
from llm.training.batch_plan import Plan
from llm.training.setup import open_loader, validation_sources
from llm.world import World

WriteConfig = Callable[..., Path]
Llm = Callable[..., tuple[int, str, str]]
STEP = 512
"""Tokens a step of the small config."""


@pytest.fixture(scope="module")
def better(small_corpus: Path, small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the longer documents of the small corpus."""
    folder = tmp_path_factory.mktemp("better")
    longest = sorted(small_corpus.read_text("utf-8").splitlines(keepends=True), key=len)[-20:]
    (folder / "text.jsonl").write_text("".join(longest), "utf-8")
    files = [str(folder / "text.jsonl")], str(small_tokenizer), str(folder / "shards")
    prepare_data(*files, seq_len=64, shard_tokens=20_000, val_fraction=0.1, workers=1)
    return folder / "shards"


def stage(from_tokens: int, **weights: Any) -> dict[str, Any]:
    """stage(tokens, path=weight, ...), with paths as `Path`."""
    return {"from_tokens": from_tokens, "sources": [{"path": p, "weight": w} for p, w in weights.items()]}


def staged(*stages: dict[str, Any]) -> str:
    return f"data.stages={json.dumps(stages)}"


def train(llm_here: Llm, config: Path, *overrides: object) -> str:
    code, _, err = llm_here("train", "--config", config, *overrides)
    assert code == 0, err
    return err


def refused(llm_here: Llm, config: Path, *overrides: object) -> str:
    code, _, err = llm_here("train", "--config", config, *overrides)
    assert code == 1
    (error,) = (line for line in err.splitlines() if line.startswith("error: "))
    return error


def validations(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if "val_loss" in line]


def saved_hash(run: Path) -> str:
    found: str = json.loads((run / "latest/state.json").read_text())["data"]["dataset_hash"]
    return found


def test_a_run_goes_on_with_stages_that_it_began_without(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path, small_shards: Path, better: Path
) -> None:
    config = write_config(schedule__kind="wsd", schedule__decay_tokens=0, checkpoint__every_steps=2)
    both = stage(4 * STEP - 100, **{str(small_shards): 1, str(better): 3})
    whole, run = tmp_path / "whole", tmp_path / "run"
    shown = train(llm_here, config, staged(both), f"checkpoint.dir={whole}")
    assert "stage       1 of 2, from token 0 on\n" in shown
    assert "stage       2 of 2, from token 2,048 on (data.stages asks for 1,948; rounded up to whole steps)\n" in shown
    assert (
        "stage       2 of 2, from token 2,048 on (data.stages asks for 1,948; rounded up to whole steps) begins"
        in shown
    )
    assert f"source      3072/4096 (75.00 %) of the sequences from {better}: " in shown
    assert " with the stages before" in shown

    alone = read_manifest(small_shards).dataset_hash
    shown = train(llm_here, config, f"train.total_tokens={4 * STEP}")
    assert "stage  " not in shown
    # A checkpoint that was made when there were no stages.
    state = without_checksums(run / "latest") / "state.json"
    tree = json.loads(state.read_text())
    assert tree["data"]["dataset_hash"] == alone
    del tree["config"]["data"]["stages"]
    state.write_text(json.dumps(tree))
    shown = train(llm_here, config, staged(both))
    assert "changed     validation reads the 2 sources of all stages" in shown
    assert read_losses(run) == read_losses(whole)
    last, expected = validations(run)[-1], validations(whole)[-1]
    assert last == expected
    assert saved_hash(run) == saved_hash(whole) != alone
    assert json.loads((whole / "step-00000004/state.json").read_text())["data"]["dataset_hash"] == alone


def test_a_run_resumes_before_at_and_after_a_boundary(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path, small_shards: Path, better: Path
) -> None:
    config = write_config(checkpoint__every_steps=1, checkpoint__keep_last=20)
    stages = staged(stage(3 * STEP, **{str(better): 1}), stage(5 * STEP, **{str(better): 1, str(small_shards): 1}))
    train(llm_here, config, stages)
    losses = read_losses(tmp_path / "run")
    for step in (2, 3, 4):
        other = tmp_path / f"other{step}"
        train(llm_here, config, stages, f"checkpoint.dir={other}", "--resume", tmp_path / f"run/step-{step:08d}")
        assert read_losses(other) == losses[step:]
        assert saved_hash(other) == saved_hash(tmp_path / "run")


def test_what_was_trained_stays_and_what_comes_may_change(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path, small_shards: Path, better: Path
) -> None:
    config = write_config(train__total_tokens=4 * STEP)
    first = stage(2 * STEP, **{str(better): 1})
    to_come = stage(4 * STEP, **{str(small_shards): 1})
    train(llm_here, config, staged(first, to_come))
    before = sorted(tmp_path.rglob("*"))
    more = f"train.total_tokens={5 * STEP}"
    for changed in (
        [],  # the stage is dropped
        [staged(stage(3 * STEP, **{str(better): 1}))],
        [staged(stage(STEP, **{str(better): 1}))],
        [staged(stage(2 * STEP, **{str(better): 1, str(small_shards): 1}))],
        [staged(first, stage(3 * STEP, **{str(small_shards): 1}))],
        [staged(first, to_come), f"train.global_batch_tokens={3 * STEP}"],
    ):
        error = refused(llm_here, config, more, *changed)
        assert "(dataset_hash: " in error
        assert "data.stages may only change from token 2,048 on, and no stage before it may move" in error
    assert sorted(tmp_path.rglob("*")) == before
    shown = train(llm_here, config, more, staged(first, stage(4 * STEP, **{str(better): 1, str(small_shards): 3})))
    assert "stage       3 of 3, from token 2,048 on begins" in shown


def test_a_stage_after_the_end_is_shown_as_not_reached(write_config: WriteConfig, llm_here: Llm, better: Path) -> None:
    config = write_config(train__total_tokens=STEP)
    shown = train(llm_here, config, staged(stage(10_000, **{str(better): 1})))
    assert (
        "stage       2 of 2, from token 10,240 on (data.stages asks for 10,000; rounded up to whole steps): not"
        in shown
    )


@pytest.mark.parametrize("limit", [None, 1_024])
def test_validation_by_source_is_that_of_each_source_alone(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path, small_shards: Path, better: Path, limit: int | None
) -> None:
    config = write_config(train__total_tokens=STEP, train__eval_tokens=limit)
    shown = train(llm_here, config, staged(stage(10 * STEP, **{str(better): 1})))
    first, *_ = validations(tmp_path / "run")
    parts = first["val_loss_by_source"]
    assert set(parts) == {str(small_shards), str(better)}
    assert f"validation by source: {small_shards} {parts[str(small_shards)]:.4f}  {better} " in shown
    assert min(parts.values()) < first["val_loss"] < max(parts.values())
    if limit is None:  # else other sequences of each are read
        for path, loss in parts.items():
            alone = tmp_path / Path(path).parent.name
            train(llm_here, config, f"data.path={path}", f"checkpoint.dir={alone}")
            line = validations(alone)[0]
            assert line["val_loss"] == pytest.approx(loss, rel=1e-12)
            assert "val_loss_by_source" not in line


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 3), (2, 4), (4, 1)])
def test_the_rows_of_a_validation_batch_are_told_apart(
    write_config: WriteConfig, small_shards: Path, better: Path, world_size: int, micro_batch: int
) -> None:
    from llm.config_file import load_config
    from llm.training.resolve import resolve

    data = mix([read_manifest(small_shards), read_manifest(better)], [1, 1])
    config, _ = resolve(load_config(write_config()), data)
    plan = Plan(64, 8, micro_batch, 1, world_size, 0, None, None, 0.0, "CPU")  # type: ignore[arg-type]
    texts = []
    for source in data.sources:
        world = World(0, 0, 1, torch.device("cpu"), torch.float32)
        alone = mix([source], [1])
        with open_loader(config, alone, plan, world, "val", end=alone.sequences("val", 64)) as loader:
            rows = (row for batch in loader for row in batch.input_ids.tolist() if any(row))
            texts.append({tuple(row) for row in rows})
    assert not texts[0] & texts[1]
    end = data.sequences("val", 64) - 1
    sources, seen = validation_sources(data, 64, end).tolist(), 0
    for rank in range(world_size):
        world = World(rank, rank, world_size, torch.device("cpu"), torch.float32)
        with open_loader(config, data, plan, world, "val", end=end) as loader:
            for number, batch in enumerate(loader):
                first = (number * world_size + rank) * micro_batch
                for source, row in zip(sources[first : first + micro_batch], batch.input_ids.tolist(), strict=False):
                    seen += 1
                    assert tuple(row) in texts[source]
    assert seen == end


@pytest.mark.slow
def test_two_processes_see_the_same_stages(
    write_config: WriteConfig, llm_here: Llm, tmp_path: Path, small_shards: Path, better: Path
) -> None:
    config = write_config(checkpoint__every_steps=3, train__eval_every_steps=3)
    stages = staged(stage(3 * STEP, **{str(better): 1}), stage(5 * STEP, **{str(better): 1, str(small_shards): 1}))
    train(llm_here, config, stages)
    two = tmp_path / "two"
    arguments = ["llm", "train", "--config", config, stages, f"checkpoint.dir={two}"]
    torchrun(2, *arguments, f"train.total_tokens={8 * STEP}", "--resume", tmp_path / "run/step-00000003")
    assert read_losses(two) == pytest.approx(read_losses(tmp_path / "run")[3:], rel=1e-5)
    expected, found = validations(tmp_path / "run")[-1], validations(two)[-1]
    assert found["val_loss_by_source"] == pytest.approx(expected["val_loss_by_source"], rel=1e-5)
    assert saved_hash(two) == saved_hash(tmp_path / "run")
