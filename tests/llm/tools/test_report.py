"""`llm report`: a page that stands alone, its pictures, and the figures in them."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llm.errors import UserError
from llm.tools.history import read_lines
from llm.tools.report import loss_curve, report

Llm = Callable[..., tuple[int, str, str]]

STEPS = [
    {
        "step": step,
        "tokens": 1000 * step,
        "loss": 8 - 0.5 * step,
        "lr": 1e-3,
        "grad_norm": 1.0 + 0.1 * step,
        "tokens_per_second": 500.0,
        "step_ms": 2000.0,
        "data_wait_ms": 20.0,
        "mfu": None,
        "memory": 10**9,
    }
    for step in range(1, 9)
]
VALIDATIONS: list[dict[str, Any]] = [
    {"step": step, "tokens": 1000 * step, "val_loss": 8 - 0.4 * step, "bits_per_byte": 3 - 0.1 * step}
    for step in (0, 4, 8)
]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_run(folder: Path, lines: list[dict[str, Any]], lr: float = 1e-3, message: str | None = None) -> Path:
    folder.mkdir(parents=True)
    config = {"optimizer": {"lr": lr}, "train": {"seed": 1}, "checkpoint": {"dir": str(folder)}}
    described = {"config": config, "versions": {"torch": "2.13"}, "commit": "abc", "device": "x86_64"}
    (folder / "run.json").write_text(json.dumps(described))
    status = "stopped" if message else "complete"
    (folder / "status.json").write_text(json.dumps({"status": status, "result": None, "message": message}))
    write_lines(folder / "metrics.jsonl", lines)
    return folder


class Reader(HTMLParser):
    """The texts of a page, each cell of its tables as a row, and what it would load."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.loads: list[str] = []
        self._open: list[str] = []
        self.feed(page.read_text())
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were saved as PNG, to look at what was drawn."""
    from matplotlib.backends import backend_agg

    saved = []
    original = backend_agg.FigureCanvasAgg.print_png

    def keep(self: Any, *arguments: Any, **options: Any) -> Any:
        saved.append(self.figure)
        return original(self, *arguments, **options)

    monkeypatch.setattr(backend_agg.FigureCanvasAgg, "print_png", keep)
    return saved


def test_a_page_of_one_run(llm_here: Llm, tmp_path: Path) -> None:
    lines = [VALIDATIONS[0], *STEPS, {**VALIDATIONS[2], "samples": [{"prompt": "a <b> ", "text": "& c\n"}]}]
    run = write_run(tmp_path / "some" / "run", lines, message="SIGTERM on rank 1")
    code, out, err = llm_here("report", run, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["runs"] == ["some/run"]
    names = {Path(picture).stem for picture in result["pictures"]}
    speed = {"tokens_per_second", "step_time", "memory"}
    assert names == {"loss", "loss_over_time", "bits_per_byte", "learning_rate", "gradient_norm"} | speed
    for picture in result["pictures"]:
        assert Path(picture).read_bytes().startswith(b"\x89PNG")
    assert result["report"] == str(run / "report/report.html")

    page = Reader(Path(result["report"]))
    assert all(load.startswith("#") for load in page.loads)
    source = Path(result["report"]).read_text()
    assert set(re.findall(r"https?://[\w./]+", source)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/TR/SVG11/DTD/svg11.dtd",
    }
    assert source.count("<svg") == len(names)
    assert "prefers-color-scheme: dark" in source
    text = " ".join(page.texts)
    assert "Stopped: SIGTERM on rank 1" in text
    assert "a <b> " in page.texts
    assert "& c\n" in page.texts
    assert '"lr": 0.001' in text
    assert ["commit", "abc"] in page.rows
    for figure in ("4.8000", "2.2000", "16 s", "500", "data wait 1 %, the rest 99 %."):
        assert figure in page.texts


def test_several_runs_are_drawn_over_each_other_and_what_differs_is_shown(tmp_path: Path, figures: list[Any]) -> None:
    runs = [write_run(tmp_path / name, [*VALIDATIONS, *STEPS], lr) for name, lr in (("a", 1e-3), ("b", 2e-3))]
    result = report(runs, tmp_path / "out")
    page = Reader(tmp_path / "out" / "report.html")
    assert result["runs"] == ["a", "b"]
    differing = page.rows[page.rows.index(["", "a", "b"], 1) + 1 :]
    assert [row for row in differing if len(row) == 3] == [["optimizer.lr", "0.001", "0.002"]]
    drawn = dict(zip([Path(picture).stem for picture in result["pictures"]], figures, strict=True))
    assert [line.get_label() for line in drawn["learning_rate"].axes[0].lines] == ["a", "b"]
    assert {line.get_color() for line in drawn["learning_rate"].axes[0].lines} == {"#2563c9", "#d9690a"}
    assert {"step_time_1", "step_time_2"} <= drawn.keys()


def test_time_is_that_of_the_steps(tmp_path: Path) -> None:
    lines = [{"step": 10, "loss": 1.0, "step_ms": 100.0}, {"step": 10, "val_loss": 1.0}]
    lines += [{"step": 15, "loss": 1.0, "step_ms": 200.0}]
    steps, validations = read_lines(write_lines(tmp_path / "metrics.jsonl", lines))
    assert [line["seconds"] for line in steps] == [1.0, 2.0]
    assert [line["seconds"] for line in validations] == [1.0]


def test_the_time_of_a_step_and_beside_it_and_its_outliers_are_shown(tmp_path: Path, figures: list[Any]) -> None:
    split = {"forward_ms": 500.0, "backward_ms": 900.0, "optimizer_ms": 100.0, "communication_ms": 80.0}
    beside = {"validation_ms": 400.0, "save_ms": 100.0, "data_wait_ms_p99": 30.0}
    speed = {"mfu": 0.4, "mfu_causal": 0.35, "matmul_fraction": 0.5, "tokens_per_second_run": 400.0}
    steps = [{**line, **split, **beside, **speed} for line in STEPS]
    outlier = {"step": 5, "tokens": 4500, "metric": "grad_norm", "value": 30.0, "deviations": 9.0}
    steps[5] = {**steps[5], "outliers": [outlier, {**outlier, "metric": "loss", "value": 7.5}]}
    result = report([write_run(tmp_path / "run", [*VALIDATIONS, *steps])], tmp_path / "out")
    drawn = dict(zip([Path(picture).stem for picture in result["pictures"]], figures, strict=True))
    assert [label.get_text() for label in drawn["step_time"].legends[0].texts] == [
        *("data wait", "forward", "backward", "optimizer", "communication", "the rest")
    ]
    for name, value in (("gradient_norm", 30.0), ("loss", 7.5)):
        assert drawn[name].axes[0].lines[-1].get_xydata().tolist() == [[4500, value]]
    texts = Reader(tmp_path / "out" / "report.html").texts
    expected = "data wait 1 %, forward 25 %, backward 45 %, optimizer 5 %, communication 4 %, the rest 20 %."
    for text in (expected, "16, 4 %", "1, 1", "< 1.5 %", "400", "40.0 %", "35.0 %", "50.0 %"):
        assert text in texts, text


def test_draws_both_losses_over_tokens_with_labelled_axes(tmp_path: Path, figures: list[Any]) -> None:
    png = tmp_path / "pictures" / "loss.png"
    loss_curve(write_lines(tmp_path / "metrics.jsonl", VALIDATIONS + STEPS), png)
    assert png.read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn["training"] == [[line["tokens"], line["loss"]] for line in STEPS]
    assert drawn["validation"] == [[line["tokens"], line["val_loss"]] for line in VALIDATIONS]
    assert "tokens" in axes.get_xlabel()
    assert "nats" in axes.get_ylabel()


def test_a_steep_beginning_may_leave_the_chart_and_is_named(tmp_path: Path, figures: list[Any]) -> None:
    lines = [{"step": step, "tokens": step, "loss": 3.0 + 8.0 * (step < 4)} for step in range(1, 101)]
    loss_curve(write_lines(tmp_path / "metrics.jsonl", lines), tmp_path / "loss.png")
    (axes,) = figures[0].axes
    assert axes.get_ylim()[1] < 4
    assert axes.get_title() == "Begins at 11.0, above the chart."


@pytest.mark.parametrize("lines", [STEPS, VALIDATIONS])
def test_one_kind_of_line_is_enough(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    report([write_run(tmp_path / "run", lines)])
    loss_curve(tmp_path / "run" / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_run_without_steps_is_an_error_and_leaves_no_picture(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no step yet"):
        loss_curve(write_lines(tmp_path / "metrics.jsonl", []), tmp_path / "loss.png")
    with pytest.raises(UserError, match="no such file"):
        loss_curve(tmp_path / "none.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl: no such file"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "holds no step yet"),
        (lambda run: (run / "metrics.jsonl").write_text("{\n"), "metrics.jsonl:1: damaged"),
        (lambda run: (run / "run.json").write_text("{"), "run.json: damaged"),
        (lambda run: (run / "status.json").unlink(), "status.json: missing"),
    ],
    ids=["no metrics", "no step", "bad metrics", "bad description", "no status"],
)
def test_a_folder_without_a_run_is_one_line(
    llm_here: Llm, tmp_path: Path, damage: Callable[[Path], object], expected: str
) -> None:
    run = write_run(tmp_path / "run", STEPS)
    damage(run)
    code, out, err = llm_here("report", run)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert expected in err
    assert not (run / "report").exists()


def test_a_run_is_named_once_and_exists(llm_here: Llm, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", STEPS)
    assert "named twice" in llm_here("report", run, tmp_path / "." / "run")[2]
    assert "no such folder" in llm_here("report", tmp_path / "none")[2]
