"""Killed at any moment and started again, a run ends as if it had never been killed."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from running import environment, read_losses

WriteConfig = Callable[..., Path]
SCRIPT = Path(__file__).parent / "kills.py"


@pytest.mark.parametrize(
    ("kills", "seed"),
    [(3, 1), pytest.param(20, 2, marks=pytest.mark.slow), pytest.param(60, 3, marks=pytest.mark.slow)],
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
