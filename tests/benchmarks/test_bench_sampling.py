import json

import pytest
import torch

from benchmarks import bench_sampling
from llm.inference.sampling import Sampler


def test_measures_every_setting_for_every_batch(tmp_path, capsys):
    arguments = ["--vocab_size", "300", "--batch_sizes", "1", "3", "--rounds", "2", "--output", tmp_path / "out.json"]
    assert bench_sampling.main([str(argument) for argument in arguments]) == 0
    lines = json.loads((tmp_path / "out.json").read_text())["lines"]
    assert [(line["setting"], line["batch"]) for line in lines] == [
        (setting, batch) for setting in bench_sampling.SETTINGS for batch in (1, 3)
    ]
    assert "ratio" in capsys.readouterr().out


@pytest.mark.parametrize("setting", bench_sampling.SETTINGS)
def test_both_draw_from_the_same_distribution(setting):
    """On a small vocabulary, by chi-square with a limit that one seed in a million exceeds."""
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5])
    sampling, count, generator = bench_sampling.SETTINGS[setting], 3000, torch.Generator().manual_seed(0)
    theirs = torch.tensor([bench_sampling.sample(logits, generator, sampling, [0, 0, 3]) for _ in range(count)])
    sampler = Sampler(sampling, [[0, 0, 3]] * count, 6, range(count))
    ours = torch.tensor([token for token, _ in sampler.choose(logits.expand(count, 6).numpy(), range(count))])
    a, b = torch.bincount(theirs, minlength=6), torch.bincount(ours, minlength=6)
    assert ((a > 0) == (b > 0)).all()
    assert ((a - b) ** 2 / (a + b).clamp(min=1)).sum() < 35.9  # 5 degrees of freedom
