import json

import pytest

from llm.errors import UserError
from llm.report import loss_curve

STEPS = [{"step": step, "tokens": 1000 * step, "loss": 8 - 0.5 * step} for step in range(1, 9)]
VALIDATIONS = [{"step": step, "tokens": 1000 * step, "val_loss": 8 - 0.4 * step} for step in (0, 4, 8)]


def written(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, to look at what was drawn."""
    from matplotlib.backends import backend_agg

    saved = []
    original = backend_agg.FigureCanvasAgg.print_png

    def keep(self, *arguments, **options):
        saved.append(self.figure)
        return original(self, *arguments, **options)

    monkeypatch.setattr(backend_agg.FigureCanvasAgg, "print_png", keep)
    return saved


def test_draws_both_losses_over_tokens_with_labelled_axes(tmp_path, figures):
    png = tmp_path / "pictures" / "loss.png"
    loss_curve(written(tmp_path / "metrics.jsonl", VALIDATIONS + STEPS), png)
    assert png.read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn["training"] == [[line["tokens"], line["loss"]] for line in STEPS]
    assert drawn["validation"] == [[line["tokens"], line["val_loss"]] for line in VALIDATIONS]
    assert "tokens" in axes.get_xlabel()
    assert "nats" in axes.get_ylabel()


@pytest.mark.parametrize("lines", [STEPS, VALIDATIONS])
def test_one_kind_of_line_is_enough(tmp_path, lines):
    loss_curve(written(tmp_path / "metrics.jsonl", lines), tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_run_without_steps_is_an_error_and_leaves_no_picture(tmp_path):
    with pytest.raises(UserError, match="holds no step yet"):
        loss_curve(written(tmp_path / "metrics.jsonl", []), tmp_path / "loss.png")
    with pytest.raises(UserError, match="no such file"):
        loss_curve(tmp_path / "none.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
