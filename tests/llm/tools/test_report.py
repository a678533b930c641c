"""`llm report`: a page that stands alone, its pictures, and the figures in them."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llm.errors import UserError
from llm.tools.history import read_runs
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


ABOUT = {"started": "2026-03-01T09:05:07+00:00", "parameters": 1234567, "world_size": 1, "device": "Some CPU, 2 cores"}


def write_run(
    folder: Path,
    lines: list[dict[str, Any]],
    lr: float = 1e-3,
    message: str | None = None,
    data: str = "some/shards",
    **described: Any,
) -> Path:
    folder.mkdir(parents=True)
    train = {"seed": 1, "total_tokens": 8000}
    config = {"data": {"path": data}, "optimizer": {"lr": lr}, "train": train, "checkpoint": {"dir": str(folder)}}
    described = {"config": config, "versions": {"torch": "2.13"}, "commit": "abc", **ABOUT, **described}
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
        self.best: list[list[str]] = []  # the first cell and the text of each cell that is marked
        self.loads: list[str] = []
        self.charts: dict[str, str] = {}  # by title, what is shown under the pointer
        self._marked = False
        self._open: list[str] = []
        self.feed(page.read_text())
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self._open.append(tag)
        if tag == "svg":
            found = dict(attrs)
            self.charts[found["aria-label"] or ""] = found["data-chart"] or ""
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._marked = ("class", "best") in attrs
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data
            if self._marked:
                self.best.append([self.rows[-1][0], data])


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
    rules = {"optimizer.lr": {"key": "optimizer.lr", "value": 0.001, "rule": "2 / d"}}
    run = write_run(tmp_path / "some" / "run", lines, message="SIGTERM on rank 1", rules=rules)
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
    for text in ("1,234,567", "2026-03-01 09:05 UTC", "Some CPU, 2 cores", "some/shards"):
        assert text in page.texts, text
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
    assert ["optimizer.lr, by rule", "0.001: 2 / d"] in page.rows
    for figure in ("4.8000", "2.2000", "16 s", "500", "data wait 1 %, the rest 99 %."):
        assert figure in page.texts


def test_several_runs_are_drawn_over_each_other_and_what_differs_is_shown(tmp_path: Path, figures: list[Any]) -> None:
    rules = [{key: {"key": key, "value": 1, "rule": "a / b"}} for key in ("optimizer.embed_lr", "optimizer.head_lr")]
    values = (("a", 1e-3, rules[0]), ("b", 2e-3, rules[1]))
    runs = [write_run(tmp_path / name, [*VALIDATIONS, *STEPS], lr, rules=rule) for name, lr, rule in values]
    write_lines(runs[1] / "metrics.jsonl", [*VALIDATIONS, *({**line, "lr": 2e-3} for line in STEPS)])
    result = report(runs, tmp_path / "out")
    page = Reader(tmp_path / "out" / "report.html")
    assert result["runs"] == ["a", "b"]
    differing = page.rows[page.rows.index(["", "a", "b"], 1) + 1 :]
    assert [row for row in differing if len(row) == 3] == [["optimizer.lr", "0.001", "0.002"]]
    assert ["optimizer.embed_lr, by rule", "1: a / b"] in page.rows
    drawn = dict(zip([Path(picture).stem for picture in result["pictures"]], figures, strict=True))
    assert [line.get_label() for line in drawn["learning_rate"].axes[0].lines] == ["a", "b"]
    assert {line.get_color() for line in drawn["learning_rate"].axes[0].lines} == {"#2563c9", "#d9690a"}
    assert {"step_time_1", "step_time_2"} <= drawn.keys()


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
    assert axes.get_title() == "Begins at 11, above the chart."


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
        (lambda run: (run / "run.json").write_text("{"), "run.json: damaged"),
        (lambda run: (run / "status.json").unlink(), "status.json: missing"),
    ],
    ids=["no metrics", "no step", "bad description", "no status"],
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


@pytest.mark.parametrize(
    "damage",
    [b"{\n", b"[]\n", b"{}\n", b"\xff\n", b'{"step": "1"}\n', b'{"step": 1, "tokens": 2, "loss": "x"}\n', b"\0\n"],
)
def test_damaged_lines_are_left_out_with_a_line(llm_here: Llm, tmp_path: Path, damage: bytes) -> None:
    metrics = write_run(tmp_path / "run", STEPS) / "metrics.jsonl"
    metrics.write_bytes(damage + metrics.read_bytes())
    code, _, err = llm_here("report", tmp_path / "run")
    assert code == 0
    assert err.splitlines()[0] == f"{metrics}: 1 damaged lines are left out, the first is line 1"


def test_a_run_is_named_once_and_exists(llm_here: Llm, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", STEPS)
    assert "named twice" in llm_here("report", run, tmp_path / "." / "run")[2]
    assert "no such folder" in llm_here("report", tmp_path / "none")[2]


def test_folders_without_a_run_are_passed_over_where_there_are_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, STEPS)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert [run.label for run in read_runs(sorted(tmp_path.iterdir()))] == ["a", "b"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == [str(tmp_path / name) for name in ("empty", "notes.txt")]
    with pytest.raises(UserError, match="no such file"):
        read_runs([tmp_path / "empty", tmp_path / "notes.txt"])
    with pytest.raises(UserError, match="no such folder"):
        read_runs([tmp_path / "a", tmp_path / "none"])


def test_control_characters_and_dollars_of_names_are_shown(llm_here: Llm, tmp_path: Path) -> None:
    sample = {"step": 8, "tokens": 8000, "val_loss": 3.0, "samples": [{"prompt": "\x1b]0;p\x07", "text": "\x9bx"}]}
    runs = [write_run(tmp_path / name, [*STEPS[:1], sample]) for name in ("lr$3e-4_$\\x", "e\x1b]0;x\x07$")]
    code, out, err = llm_here("report", *runs, "--out_dir", tmp_path / "out")
    assert code == 0, err
    page = (tmp_path / "out/report.html").read_text()
    assert not {"\x1b", "\x07", "\x9b"} & set(page + out + err)
    assert "\\x1b]0;p\\x07" in page


def scaled(factor: float) -> list[dict[str, Any]]:
    """The lines of a run whose losses are `factor` times as high, at the same speed."""
    steps = [{**line, "loss": factor * line["loss"]} for line in STEPS]
    return [*steps, *({**line, "val_loss": factor * line["val_loss"]} for line in VALIDATIONS)]


def test_the_best_of_each_row_is_marked(tmp_path: Path) -> None:
    slow = [{**line, "tokens_per_second": 400.0} if "loss" in line else line for line in scaled(0.9)]
    runs = [write_run(tmp_path / name, lines) for name, lines in (("a", scaled(1.0)), ("b", slow), ("c", slow))]
    report(runs, tmp_path / "out")
    page = Reader(tmp_path / "out/report.html")
    best = [[name.replace("\u00a0", " "), text] for name, text in page.best]
    # Lower is better for a loss, higher for a speed; what is equally good is marked in both, and equal rows nowhere.
    assert [entry for entry in best if "validation loss" in entry[0]] == [
        *(["validation loss ↓", "4.3200"], ["validation loss ↓", "4.3200"]),
        *(["best validation loss ↓", "4.3200"], ["best validation loss ↓", "4.3200"]),
    ]
    assert ["tokens/s, median ↑", "500"] in best
    assert {name for name, _ in best} == {
        *("validation loss ↓", "best validation loss ↓", "training loss, smoothed ↓", "tokens/s, median ↑")
    }


def test_losses_on_different_data_have_no_best(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, scaled(factor), data=name) for name, factor in (("a", 1.0), ("b", 0.9))]
    report(runs, tmp_path / "out")
    page = Reader(tmp_path / "out/report.html")
    assert page.best == []
    assert any("the runs read different data" in text for text in page.texts)
    assert ["data", "a", "b"] in page.rows


def test_a_source_of_a_mixture_has_a_row_and_a_line(tmp_path: Path, figures: list[Any]) -> None:
    lines = [{**line, "val_loss_by_source": {"wiki": 5.0, "<code>": line["val_loss"] / 2}} for line in VALIDATIONS]
    runs = [write_run(tmp_path / "a", [*STEPS, *lines]), write_run(tmp_path / "b", [*STEPS, *VALIDATIONS])]
    result = report(runs[:1], tmp_path / "one")
    drawn = dict(zip([Path(picture).stem for picture in result["pictures"]], figures, strict=True))
    (axes,) = drawn["loss_by_source"].axes
    values = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert values == {
        "all": [[0, 8], [4000, 6.4], [8000, 4.8]],
        "wiki": [[0, 5], [4000, 5], [8000, 5]],
        "<code>": [[0, 4], [4000, 3.2], [8000, 2.4]],
    }
    texts = Reader(tmp_path / "one/report.html").texts
    assert texts[texts.index("validation loss, <code>") + 1] == "2.4000"

    result = report(runs, tmp_path / "several")
    assert {"loss_of_source_1", "loss_of_source_2"} <= {Path(picture).stem for picture in result["pictures"]}
    page = Reader(tmp_path / "several/report.html")
    assert ["validation loss, wiki\u00a0↓", "5.0000", "–"] in page.rows


def of_tasks(step: int, share: float, **scores: float | None) -> dict[str, Any]:
    """A line about train.eval_tasks."""
    return {"step": step, "tokens": 1000 * step, "tasks": scores, "tasks_seconds": 2.0, "tasks_share": share}


def test_scores_of_tasks_are_rows_and_charts(tmp_path: Path, figures: list[Any]) -> None:
    """The newest scores are in the table; no task says whether a high score is better."""
    hard = "<b>\x1b$x$/exact_match,strict-match"
    tasks = [of_tasks(4, 0.5, **{"own/acc": 0.25, hard: None}), of_tasks(8, 0.125, **{"own/acc": 0.5, hard: 1.0})]
    result = report([write_run(tmp_path / "a", [*STEPS, *tasks])], tmp_path / "one")
    page = Reader(tmp_path / "one/report.html")
    texts = page.texts
    assert texts[texts.index("own/acc") + 1] == "0.5000"
    assert texts[texts.index("<b>\\x1b$x$/exact_match,strict-match") + 1] == "1.0000"
    assert texts[texts.index("time of tasks") + 1] == "12.5 %"
    charts = {title: json.loads(values) for title, values in page.charts.items()}
    (line,) = charts["Task own/acc"]["lines"]
    assert (line["x"], line["y"]) == ([4000, 8000], [0.25, 0.5])
    (line,) = charts["Task <b>\\x1b$x$/exact_match,strict-match"]["lines"]
    assert (line["x"], line["y"]) == ([8000], [1.0])
    drawn = dict(zip([Path(picture).stem for picture in result["pictures"]], figures, strict=True))
    (axes,) = drawn["task_1"].axes
    assert axes.lines[0].get_xydata().tolist() == [[4000, 0.25], [8000, 0.5]]
    assert axes.get_ylabel() == "acc"


def test_scores_of_several_runs_are_side_by_side(tmp_path: Path) -> None:
    """Also where the runs have other tasks, or none."""
    lines = {
        "a": [of_tasks(4, 0.5, **{"own/acc": 0.25, "own/bits": 2.0}), of_tasks(8, 0.25, **{"own/acc": 0.5})],
        "b": [of_tasks(8, 0.125, **{"own/acc": 0.75, "more/acc": 0.0})],
        "c": [],
    }
    report([write_run(tmp_path / name, [*STEPS, *tasks]) for name, tasks in lines.items()], tmp_path / "out")
    page = Reader(tmp_path / "out/report.html")
    assert ["own/acc", "0.5000", "0.7500", "–"] in page.rows
    assert ["more/acc", "–", "0.0000", "–"] in page.rows
    assert ["time of tasks", "25.0 %", "12.5 %", "–"] in page.rows
    # Of a task that was measured earlier only, the chart has what the table has not.
    assert "own/bits" not in [row[0] for row in page.rows if row]
    charts = {title: json.loads(values) for title, values in page.charts.items()}
    drawn = {title: {line["name"]: line["y"] for line in chart["lines"]} for title, chart in charts.items()}
    assert drawn["Task own/acc"] == {"a": [0.25, 0.5], "b": [0.75]}
    assert drawn["Task own/bits"] == {"a": [2.0]}
    assert drawn["Task more/acc"] == {"b": [0.0]}
    assert not {"own/acc", "more/acc"} & {name for name, _ in page.best}


def test_the_page_has_the_values_for_the_pointer_and_one_script(tmp_path: Path) -> None:
    run = write_run(tmp_path / "it's <a> run", [*VALIDATIONS, *STEPS])
    report([run], tmp_path / "out")
    page = Reader(tmp_path / "out/report.html")
    charts = {title: json.loads(values) for title, values in page.charts.items()}
    lines = {line["name"]: line for line in charts["Loss over tokens"]["lines"]}
    assert lines["validation"]["x"] == [0, 4000, 8000]
    assert lines["validation"]["y"] == [8, 6.4, 4.8]
    assert lines["training"]["y"] == [line["loss"] for line in STEPS]
    left, right = charts["Loss over tokens"]["box"]
    assert 0 < left < right < 72 * 4
    assert charts["Loss over tokens"]["range"][1] > 8000
    assert (tmp_path / "out/report.html").read_text().count("<script>") == 1


def test_a_run_that_has_not_trained_yet_has_a_page(tmp_path: Path) -> None:
    result = report([write_run(tmp_path / "run", VALIDATIONS[:1])], tmp_path / "out")
    assert {Path(picture).stem for picture in result["pictures"]} == {"loss", "loss_over_time", "bits_per_byte"}
    assert "Speed" not in Reader(tmp_path / "out/report.html").texts


def test_an_older_runs_description_is_enough(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", STEPS)
    (run / "run.json").write_text(json.dumps({"config": {}, "versions": {}, "commit": None}))
    report([run], tmp_path / "out")
    texts = Reader(tmp_path / "out/report.html").texts
    assert not {"parameters", "started", "device", "data"} & set(texts)
