"""The measurement of preparation on Ray runs and compares it with processes."""

import json
from pathlib import Path

import pytest

from benchmarks import bench_ray


@pytest.mark.slow
def test_a_table_for_people_and_json_for_machines(
    tmp_path: Path, small_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    arguments = [
        "--input",
        str(small_corpus),
        "--vocab_size",
        "600",
        "--workers",
        "1",
        "--copies",
        "2",
        "--rounds",
        "1",
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            patch.setenv(name, "")  # to be put back at the end
        bench_ray.main([*arguments, "--rounds", "1", "--output", str(output)])
    (row,) = json.loads(output.read_text())["rows"]
    assert row["workers"] == 1
    assert row["bytes"] > 200_000
    assert min(row["processes"], row["ray"], row["ratio"], row["main_mb_per_cpu_second"]) > 0
    assert "ratio" in capsys.readouterr().out
