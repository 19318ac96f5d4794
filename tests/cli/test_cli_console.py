"""Tables in pipes, on narrow terminals and in encodings that know no Unicode; JSON of odd values."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kdctl.cli import console

TABLE = "from kdctl.cli import console; console.print_table(['name', 'top1'], [['résnet [bold]', '9.5'], ['b', None]])"
LONG = "from kdctl.cli import console; console.print_table(['name', 'summary'], [['a', 'word ' * 20]])"


def test_columns_are_aligned(capsys):
    console.print_table(["name", "top1", "bytes"], [["a", "9.50", 12], ["longer", "91.25", None]])
    assert capsys.readouterr().out.splitlines() == [
        "name     top1  bytes",
        "a        9.50     12",
        "longer  91.25      -",
    ]


def test_text_columns_stand_left(capsys):
    console.print_table(["run", "note"], [["003", "x3 smaller"], ["12", "-"]])
    assert capsys.readouterr().out.splitlines() == ["run  note", "003  x3 smaller", " 12  -"]


def test_a_table_without_rows(capsys):
    console.print_table(["name", "top1"], [])
    assert capsys.readouterr().out == "name  top1\n"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_other_encodings_never_fail(encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    code = f"from kdctl.cli import console; console.set_up(); {TABLE}; console.out('→ ✓')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"[bold]" in done.stdout and b"\r" not in done.stdout


def test_a_path_that_is_not_utf8():
    code = "from kdctl.cli import console as c; c.set_up(); c.out('a\\udce9'); c.print_json({'a': 'é\\udce9'})"
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    line, _, document = done.stdout.partition(b"\n")
    assert (line, json.loads(document)) == (b"a\\udce9", {"a": "é\udce9"}), done.stderr


@pytest.fixture
def terminal():
    """What a program writes to a terminal of a given width."""
    pty = pytest.importorskip("pty")

    def call(code: str, width: int = 80, **environment: str) -> str:
        ours, theirs = pty.openpty()
        settings = {**os.environ, "COLUMNS": str(width), "TERM": "xterm-256color", **environment}
        process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, env=settings)
        os.close(theirs)
        text = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:
                break
            if not part:
                break
            text += part
        os.close(ours)
        assert process.wait() == 0
        return text.decode("utf-8").replace("\r\n", "\n")

    return call


def test_a_terminal_gets_a_bold_header(terminal):
    text = terminal(TABLE)
    assert "\x1b[1m" in text and "résnet [bold]" in text


def test_no_colour_codes(terminal):
    assert "\x1b[3" not in terminal(TABLE, NO_COLOR="1")
    assert "\x1b" not in terminal(TABLE, TERM="dumb")


def test_a_narrow_terminal_wraps(terminal):
    lines = re.sub(r"\x1b\[[\d;]*m", "", terminal(LONG, width=30)).splitlines()
    assert len(lines) > 3 and max(map(len, lines)) <= 30
    assert " ".join(lines).split().count("word") == 20


def test_numbers_are_never_broken_on_a_narrow_terminal(terminal):
    """What has no room beside the others stands below, again with the first column."""
    names = [f"number {i}" for i in range(8)]
    rows = [["first row", *(f"{i}{i},345.678" for i in range(8))]]
    code = f"from kdctl.cli import console; console.print_table({['what', *names]!r}, {rows!r})"
    lines = re.sub(r"\x1b\[[\d;]*m", "", terminal(code, width=60)).splitlines()
    assert max(map(len, lines)) <= 60 and "" in lines
    parts = [line.split()[2:] for line in lines if line.startswith("first row")]
    assert len(parts) > 1 and [word for part in parts for word in part] == rows[0][1:]
    assert len(re.sub(r"\x1b\[[\d;]*m", "", terminal(code, width=200)).splitlines()) == 2


def test_a_pipe_does_not_wrap(capsys):
    console.print_table(["name", "summary"], [["a", "word " * 60]])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_json_of_odd_values(capsys):
    console.print_json({"nan": float("nan"), "inf": [float("inf")], "path": Path("a/b"), 3: (1, True, None, "é")})
    text = capsys.readouterr().out
    assert json.loads(text) == {"nan": None, "inf": [None], "path": "a/b", "3": [1, True, None, "é"]}


def test_json_in_ascii(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    console.print_json({"name": "é"})
    stream.flush()
    assert json.loads(stream.buffer.getvalue()) == {"name": "é"}


def test_objects_are_refused_in_json():
    with pytest.raises(TypeError, match="plain values"):
        console.print_json({"x": object()})


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "null"), (True, "true"), ([1, "a"], "[1, a]"), ({"a": False}, "{a: false}"), (0.5, "0.5")],
)
def test_yaml_text(value, text):
    assert console.yaml_text(value) == text
