"""Killed at any moment and started again, a run ends as if it had never been killed."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from running import environment, read_losses, run_llm, small_config

WriteConfig = Callable[..., Path]
SCRIPT = Path(__file__).parent / "kills.py"


@pytest.mark.slow
def test_kills_of_the_other_commands_leave_a_complete_result_or_none(
    small_corpus: Path, small_tokenizer: Path, small_shards: Path, tmp_path: Path
) -> None:
    text = "".join(line for line in small_corpus.read_text().splitlines(keepends=True)[:220])
    (tmp_path / "text.jsonl").write_text(text)
    shutil.copyfile(small_tokenizer, tmp_path / "tok.model")
    config = small_config(small_shards, tmp_path / "run", train__total_tokens=1024, checkpoint__every_steps=1)
    (tmp_path / "config.json").write_text(json.dumps(config))
    run_llm("train", "--config", tmp_path / "config.json")
    run_llm("export", "--ckpt", tmp_path / "run", "--out_dir", tmp_path / "export")
    command = [sys.executable, SCRIPT, "verbs", tmp_path, "60", "7"]
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3_000:]
    done = json.loads((tmp_path / "kills.json").read_text())
    killed = [kill for kill in done if kill["killed"]]
    counts = {verb: sum(kill["verb"] == verb for kill in killed) for verb in {kill["verb"] for kill in done}}
    print(f"{len(killed)} kills: {counts}; complete all the same: {sum(kill['complete'] for kill in killed)}")
    assert len(killed) >= 60
    assert min(counts.values()) >= 8


@pytest.mark.parametrize(
    ("kills", "seed"),
    [(3, 5), pytest.param(20, 2, marks=pytest.mark.slow), pytest.param(60, 3, marks=pytest.mark.slow)],
)
def test_kills_at_random_moments_change_no_bit(
    write_config: WriteConfig, tmp_path: Path, kills: int, seed: int
) -> None:
    config = write_config(
        train__total_tokens=30 * 512, train__eval_every_steps=10, checkpoint__every_steps=3, checkpoint__keep_last=2
    )
    command = [sys.executable, SCRIPT, config, tmp_path, str(kills), str(seed)]
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3_000:]
    done = json.loads((tmp_path / "kills.json").read_text())
    assert len(done) == kills
    assert any(name.startswith(".step-") for kill in done for name in kill["left"]), "none came inside a save"
    whole = tmp_path / "whole"
    for run in sorted({kill["run"] for kill in done}):
        killed = tmp_path / str(run)
        assert read_losses(killed) == read_losses(whole)
        assert not list(killed.glob(".*"))
        assert sorted(path.name for path in killed.glob("step-*")) == ["step-00000027", "step-00000030"]
        for file in sorted((whole / "latest").glob("*.safetensors")):
            assert file.read_bytes() == (killed / "latest" / file.name).read_bytes(), (run, file.name)
