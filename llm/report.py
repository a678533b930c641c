"""Pictures of a run."""

import os
from pathlib import Path

from llm.atomic import atomic_file
from llm.errors import UserError
from llm.metrics import read_metrics


def loss_curve(metrics_path: str | os.PathLike[str], png_path: str | os.PathLike[str]) -> None:
    """Draws training and validation loss over tokens from a metrics.jsonl into a PNG.

    Raises UserError where there is no such file or no step in it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    path = Path(metrics_path)
    try:
        lines = read_metrics(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `llm train` writes it into checkpoint.dir") from None
    trained = [(line["tokens"], line["loss"]) for line in lines if "loss" in line]
    validated = [(line["tokens"], line["val_loss"]) for line in lines if "val_loss" in line]
    if not trained and not validated:
        raise UserError(f"{path}: holds no step yet; `llm train` writes one every train.log_every_steps")
    # A Figure of its own rather than pyplot: no display is touched and no global state is kept.
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if trained:
        axes.plot(*zip(*trained, strict=True), color="tab:blue", linewidth=1.2, label="training")
    if validated:
        axes.plot(*zip(*validated, strict=True), color="tab:orange", marker="o", markersize=4, label="validation")
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(png_path) as file:
        FigureCanvasAgg(figure).print_png(file)
