"""The live line of training and the plain lines of epochs: what they hold, what fits, how often the device is read."""

from __future__ import annotations

import io
import itertools
import re
from typing import Any

import pytest

from kdctl.cli import console, progress
from kdctl.cli.progress import TextReporter, duration, live_line
from kdctl.errors import KdctlError
from kdctl.watch import Epoch, Reading


def reading() -> Reading:
    return Reading(0.2744, {"supervised": 2.2879, "kd": 0.0484}, 0.0085, 5217.4)


def epoch(read: Any = reading, pause: float = 0.0, stage: str = "student") -> Epoch:
    return Epoch(stage, 2, 30, 100, read, pause)


def line(number: int, **changes: Any) -> dict[str, Any]:
    told = {"stage": "student", "epoch": number, "lr": 0.00578, "loss": 0.2474}
    told |= {"terms": {"supervised": 2.286, "kd": 0.0484}, "gradient_shares": {"supervised": 0.36, "kd": 0.64}}
    told |= {"val": {"top1": 13.08, "nll": 2.27, "ece": 1.0}, "best": True, "seconds": 50.0, "eval_seconds": 10.0}
    return told | {"samples_per_second": 5006.2} | changes


class Terminal(io.TextIOWrapper):
    """A stream that says that it is a terminal, and keeps what it got."""

    def __init__(self, encoding: str = "utf-8", terminal: bool = True) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", newline="\n")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    @property
    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


@pytest.fixture
def stream(monkeypatch):
    """Puts a stream in the place of stderr, with a number of columns."""

    def install(columns: int = 80, term: str = "xterm", **kind: Any) -> Terminal:
        made = Terminal(**kind)
        monkeypatch.setattr("sys.stderr", made)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", term)
        console.set_up()
        return made

    return install


@pytest.fixture
def clock(monkeypatch):
    """The reporter's clock, moved by hand."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def train(reporter: TextReporter, clock: list[float], seconds: float = 0.05, **given: Any) -> None:
    reporter.begin(epoch(**given))
    for step in range(1, 101):
        clock[0] += seconds
        reporter.step("student", 2, 30, step, 100)


# -------------------------------------------------------------------------------------------------------- the live line


def test_a_wide_terminal_shows_everything():
    shown = live_line(epoch(), 60, reading(), 12.4, 3725, 200)
    assert shown == (
        "student 3/30  " + "█" * 18 + "░" * 12 + "  60 %  loss 0.2744  supervised 2.2879  kd 0.0484  lr 0.0085  5,217/s"
        "  left 0:12 / 1:02:05"
    )


def test_eighty_columns_hold_the_terms_and_the_times():
    shown = live_line(epoch(), 60, reading(), 12.4, 390, 79)
    assert shown == "student 3/30  60 %  supervised 2.2879  kd 0.0484  5,217/s  left 0:12 / 6:30"


def test_narrow_terminals_drop_parts():
    assert live_line(epoch(), 60, reading(), 12.4, 390, 39) == "student 3/30  60 %  left 0:12 / 6:30"
    assert live_line(epoch(), 60, reading(), 12.4, 390, 20) == "student 3/30  60 %"
    assert live_line(epoch(), 60, reading(), 12.4, 390, 9) == "student 3"


@pytest.mark.parametrize("width", range(1, 160, 7))
@pytest.mark.parametrize("name", ["kd", "überlang" * 4, "教師"])
def test_no_line_is_wider_than_asked(width, name):
    many = Reading(1.0, {f"{name}{i}": 0.5 for i in range(4)}, 0.1, 1e6)
    assert console.columns(live_line(epoch(), 5, many, 1e6, 1e7, width)) <= width


def test_a_bar_without_unicode():
    shown = live_line(epoch(), 50, reading(), 1, 1, 200, unicode=False)
    assert shown.isascii() and "#" * 15 + "." * 15 in shown


def test_it_is_drawn_ten_times_a_second(stream, clock):
    shown = stream()
    train(TextReporter(), clock, seconds=0.01)  # a second of steps
    drawn = [part for part in shown.text.split("\r") if part.strip()]
    assert 9 <= len(drawn) <= 11
    assert all(len(part) <= 79 for part in shown.text.split("\r"))
    assert "100 %" in drawn[-1] and "\x1b" not in shown.text and "\n" not in shown.text


@pytest.mark.parametrize(("pause", "most"), [(0.0, 55), (1.0, 6)])
def test_the_device_is_read_no_oftener_than_it_may(stream, clock, pause, most):
    stream()
    reads = []
    train(TextReporter(), clock, read=lambda: reads.append(clock[0]) or reading(), pause=pause)  # five seconds
    assert most / 2 <= len(reads) <= most
    assert all(later - before >= pause for before, later in itertools.pairwise(reads))


def test_nothing_is_read_where_nothing_is_drawn(stream, clock):
    for kind in ({"terminal": False}, {"term": "dumb"}):
        shown = stream(**kind)
        train(TextReporter(), clock, read=lambda: pytest.fail("read"))
        assert shown.text == ""
    shown = stream()
    train(TextReporter(quiet=True), clock, read=lambda: pytest.fail("read"))
    assert shown.text == ""


def test_time_left_counts_evaluations_of_epochs_that_were_seen(stream, clock):
    shown = stream(200)
    reporter = TextReporter()
    reporter.begin(epoch())
    clock[0] += 2
    reporter.step("student", 2, 30, 20, 100)  # after a resume at step 19: a step took two seconds
    assert "left 2:40 / 1:32:40" in shown.text  # 80 steps, then 27 epochs of 100
    reporter.epoch(line(3), 30)
    reporter.begin(Epoch("student", 3, 30, 100, reading, 0.0))
    clock[0] += 1
    reporter.step("student", 3, 30, 50, 100)
    assert "left 0:50 / 26:50" in shown.text  # 26 more epochs of 60 seconds


@pytest.mark.parametrize(
    "say",
    [
        lambda reporter: reporter.say("word " * 30),
        lambda reporter: console.say("word " * 30),
        lambda reporter: console.print_error(KdctlError("word " * 30)),
    ],
)
def test_the_live_line_makes_room(stream, clock, say):
    shown = stream()
    reporter = TextReporter()
    train(reporter, clock)
    say(reporter)
    tail = shown.text.rpartition("100 %")[2]
    blanks = re.search(r"\r( +)\r", tail)
    assert blanks is not None and len(blanks[1]) <= 79
    lines = tail.rpartition("\r")[2].splitlines()
    assert len(lines) == 2 and max(map(len, lines)) <= 79


# ------------------------------------------------------------------------------------------------------- plain lines


def test_one_plain_line_an_epoch_in_a_pipe(stream):
    shown = stream(40, terminal=False)
    reporter = TextReporter()
    reporter.epoch(line(1), 30)
    reporter.epoch(line(30, best=False, gradient_shares={}), 30)
    assert shown.text.splitlines() == [
        "student   1/30  loss 0.2474  (supervised 2.2860 [36 %] kd 0.0484 [64 %])  lr 0.00578  "
        "val top1 13.08 nll 2.27 *  5006/s  left 29:00",
        "student  30/30  loss 0.2474  (supervised 2.2860 kd 0.0484)  lr 0.00578  val top1 13.08 nll 2.27  5006/s",
    ]


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (40, "student   1/30  loss 0.2474  left 29:00"),
        (39, "student   1/30  loss 0.2474  5006/s"),
        (80, "student   1/30  loss 0.2474  val top1 13.08 nll 2.27 *  5006/s  left 29:00"),
        (16, "student   1/30"),
    ],
)
def test_an_epoch_on_a_terminal_fits(stream, width, expected):
    shown = stream(width)
    TextReporter().epoch(line(1), 30)
    assert shown.text == expected + "\n"


def test_quiet_says_nothing(stream):
    shown = stream()
    reporter = TextReporter(quiet=True)
    console.set_up(quiet=True)
    reporter.say("x")
    reporter.epoch(line(1), 30)
    console.set_up()
    assert shown.text == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0:00"), (7.4, "0:07"), (750, "12:30"), (11_100, "3:05:00"), (187_200, "2 d 4 h"), (59.6, "1:00")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_bar_only_for_who_watches(stream, monkeypatch):
    """Drawn once a work takes long, on a terminal; a line that is said in between stands above it, whole."""
    monkeypatch.setattr(console, "_PATIENCE_S", 1e-9)
    monkeypatch.setattr(console, "_PAUSE_S", 0.0)
    terminal = stream(50)
    with console.bar("asking", 40) as advance:
        advance(10)
        console.say("a line")
        advance(30)
    text = terminal.text
    assert "10 of 40" in text and "\ra line\n" in text and text.rpartition("\r")[2] == ""
    assert max(map(len, text.split("\r"))) <= 50
    for quiet, kind in ((True, True), (False, False)):
        silent = stream(50, terminal=kind)
        console.set_up(quiet=quiet)
        with console.bar("asking", 40) as advance:
            advance(40)
        assert silent.text == ""
    console.set_up()
