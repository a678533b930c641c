"""A live bar on a terminal, plain lines in a log, nothing on the other ranks."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from llm.display import Display, _Percentage, tell
from llm.errors import UserError, exit_code, visible

PROGRAM = """
import sys, time
from llm.display import Display
with Display("training", 10, 4, silent=len(sys.argv) > 1) as display:
    display.line("step 5  loss [1.0]")
    display.update(5, "loss 1.000 [/x]")
    time.sleep(0.3)
"""


def test_a_terminal_shows_a_bar_with_the_time_that_is_left() -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
    assert process.wait() == 0
    text = shown.decode()
    assert "step 5  loss [1.0]" in text
    assert "loss 1.000 [/x]" in text
    assert "50.0%" in text
    assert "left" in text


def test_a_log_holds_plain_lines() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stderr == "step 5  loss [1.0]\n"
    assert done.stdout == ""


def test_other_ranks_show_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, "silent"], capture_output=True, text=True, check=True)
    assert done.stderr == done.stdout == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain [bold]\ttext\n", "plain [bold]\ttext\n"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x00\r\x7f\x9b", "\\x00\\r\\x7f\\x9b"),
        ("\u202eevil\u2066\u2028", "\\u202eevil\\u2066\\u2028"),
        ("caf\udce9 naïve 日本 🙂", "caf\\udce9 naïve 日本 🙂"),
    ],
)
def test_control_characters_are_shown_as_escapes(text: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert visible(text) == expected
    tell(text)
    assert capsys.readouterr().out == expected + "\n"
    Display("title", 1).line(text)  # one line, whatever a name holds
    assert capsys.readouterr().err == expected.replace("\n", "\\n") + "\n"


def test_a_log_file_has_every_line_also_those_before_it_and_the_error_that_ends_the_work(tmp_path: Path) -> None:
    for _ in range(2):
        display = Display("title", 1)
        display.line("before [x]")
        display.log_to(tmp_path / "log.txt")
        display.line("after\x1b")
        with pytest.raises(UserError), display:
            raise UserError("the\nend\x07")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("--- 2")] == 2 * [
        "before [x]",
        "after\\x1b",
        "UserError: the end\\x07",
    ]
    assert lines[0].startswith("--- ")
    Display("title", 1).log_to(tmp_path)  # cannot be written, and ends nothing


def test_work_whose_end_is_not_known_shows_no_percentage() -> None:
    display = Display("reading", 5)
    display.update(5, "reading")
    display.endless("training")
    (task,) = display._bar.tasks
    assert (task.total, task.description, task.finished) == (None, "training", False)
    assert _Percentage().render(task).plain == ""


def test_an_error_is_one_line_of_visible_characters(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UserError("a\x1b[2Jb\nc" + 10_000 * "x" + "; the way out")

    assert exit_code(fail) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: a\\x1b[2Jb cxxx")
    assert error.endswith("x; the way out\n")
    assert len(error) < 5_000


def test_a_log_on_a_full_disk_ends_no_work() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", PROGRAM + "print('went on')"], stdout=subprocess.PIPE, stderr=full)
    assert done.stdout == b"went on\n"
