"""What reaches the terminal: results on stdout, everything else on stderr; plain text wherever it is not a terminal.

Nothing here writes a carriage return or a character that the output cannot encode. rich is imported only to draw a
table on a terminal.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, TextIO

from kdctl.errors import KdctlError

_NUMBER = re.compile(r"[-+]?[\d,.]+(e[-+]?\d+)?( ?%)?|-?")
_PATIENCE_S, _PAUSE_S = 0.5, 0.1
"""Seconds after which a work is long enough for a bar, and the least between two drawings of it."""
_TEXT = 16
"""Columns that a text in a table is given before the table is broken into parts."""
_level = 1
_drawn = 0
"""Columns of the live line that stands on stderr, 0 where there is none."""
_bars: list[Any] = []
"""The bars that stand on stderr, the last one below."""


def set_up(quiet: bool = False, verbose: bool = False) -> None:
    """Sets how much `say` and `detail` print, and makes both streams replace what they cannot encode.

    A stream that was closed (`>&-`) is one that nobody reads from now on.
    """
    global _level, _drawn
    _open_closed()
    _level = 0 if quiet else 2 if verbose else 1
    _drawn = 0
    asked = any(os.environ.get(name) for name in ("PYTHONIOENCODING", "PYTHONUTF8"))
    plain = os.environ.get("LC_ALL") in ("C", "POSIX") and not asked  # which Python takes for UTF-8
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure and plain:
            reconfigure(encoding="ascii", errors="replace")
        elif reconfigure:  # also UTF-8 has no place for the bytes of a path that is not UTF-8
            reconfigure(errors="backslashreplace" if is_utf8(stream) else "replace")


def _open_closed() -> None:
    """Opens closed streams on the null device: the next file to be opened would else take their number."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is not None:
            continue
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.fstat(number)
        except OSError:
            os.dup2(null, number)
        setattr(sys, name, open(null, "w", encoding="utf-8"))


def out(text: str = "") -> None:
    """A line of the result, on stdout."""
    clear()
    print(text)


def say(text: str) -> None:
    """A line of progress or advice, on stderr; silent under --quiet. On a terminal it is broken between words."""
    if _level >= 1:
        clear()
        print(_broken(text) if is_live(sys.stderr) else text, file=sys.stderr, flush=True)


def detail(text: str) -> None:
    """A line for --verbose alone, on stderr."""
    if _level >= 2:
        clear()
        print(text, file=sys.stderr, flush=True)


def print_error(error: KdctlError) -> None:
    """Every problem as `file:line: key: message`, its hint on a line below, on stderr; also under --quiet."""
    clear()
    for problem in error.problems:
        lines = [replace(problem, file=problem.file and near(problem.file)).where() + problem.message]
        lines += [f"  hint: {problem.hint}"] if problem.hint else []
        for line in lines:
            print(_broken(line) if is_live(sys.stderr) else line, file=sys.stderr)
    sys.stderr.flush()


def near(place: str) -> str:
    """A place in a file below the working directory, as the user would type it."""
    return place.removeprefix(f"{Path.cwd()}{os.sep}")


def yaml_text(value: object) -> str:
    """A plain value on one line, as it stands in an experiment file."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {yaml_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(yaml_text(v) for v in value) + "]"
    return str(value)


def print_json(document: Mapping[str, Any]) -> None:
    """One JSON document on stdout. Numbers that are not finite become null, paths and other objects text."""
    text = json_text(document, ascii_only=not is_utf8(sys.stdout))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # the bytes of a path that is not UTF-8
        text = json_text(document, ascii_only=True)
    print(text)


def json_text(document: Mapping[str, Any], ascii_only: bool = False) -> str:
    """What `print_json` prints."""
    return json.dumps(_jsonable(document), indent=2, ensure_ascii=ascii_only, allow_nan=False)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"a document holds plain values, not {type(value).__name__}: {value!r}")


def print_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout: None prints as '-', columns of numbers stand right. Cells that do not fit a terminal wrap."""
    clear()
    if sys.stdout.isatty():
        _draw(headers, *_cells(headers, rows))
    else:
        for line in table_lines(headers, rows):
            print(line)


def _cells(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> tuple[list[list[str]], list[bool]]:
    """The cells as text, and which columns stand right."""
    cells = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    return cells, [bool(cells) and all(_NUMBER.fullmatch(row[i]) for row in cells) for i in range(len(headers))]


def table_lines(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Aligned lines, two blanks between columns: the same in a pipe, a file and a log."""
    cells, right = _cells(headers, rows)
    widths = [max(len(text) for text in column) for column in zip(headers, *cells, strict=True)]
    lines = []
    for row in (headers, *cells):
        padded = [
            text.rjust(width) if is_right else text.ljust(width)
            for text, width, is_right in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return lines


def _draw(headers: Sequence[str], cells: list[list[str]], right: list[bool]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    screen = Console(highlight=False, emoji=False, markup=False)
    for number, chosen in enumerate(_beside_each_other(headers, cells, right, screen.width)):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for i in chosen:
            side: Any = "right" if right[i] else "left"
            table.add_column(Text(headers[i]), justify=side, overflow="fold", no_wrap=right[i] and len(chosen) > 2)
        for row in cells:
            table.add_row(*(Text(row[i]) for i in chosen))
        if number:
            screen.print()
        screen.print(table)


def _beside_each_other(
    headers: Sequence[str], cells: list[list[str]], right: list[bool], size: int
) -> Iterator[list[int]]:
    """The columns of a table in parts that fit so many columns of a terminal: each part begins with the first column,
    and numbers are never broken. Text is, where it is long."""
    widths = [max(columns(text) for text in column) for column in zip(headers, *cells, strict=True)]
    least = [wide if is_right else min(wide, _TEXT) for wide, is_right in zip(widths, right, strict=True)]
    part, used = [0], least[0] + 2
    for i in range(1, len(headers)):
        if used + least[i] > size and len(part) > 1:
            yield part
            part, used = [0], least[0] + 2
        part.append(i)
        used += least[i] + 2
    yield part


# ------------------------------------------------------------------------------------------------------- the terminal


def is_utf8(stream: TextIO) -> bool:
    """Whether the stream can show every character."""
    return (getattr(stream, "encoding", None) or "ascii").lower().replace("-", "") in ("utf8", "cp65001")


def is_live(stream: TextIO) -> bool:
    """Whether the stream is a terminal whose last line can be written over."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def draw(text: str) -> None:
    """Shows a line on stderr, a terminal, in the place of the one drawn before; the next line takes its place."""
    global _drawn
    room = width(sys.stderr) - 1
    text = cut(text, room)
    sys.stderr.write("\r" + text + " " * max(0, min(_drawn, room) - columns(text)))
    sys.stderr.flush()
    _drawn = columns(text)


def clear() -> None:
    """Takes away the line that was drawn, if there is one, and bars, which come back by themselves."""
    global _drawn
    for shown in _bars:
        shown.clear()
    if _drawn:
        sys.stderr.write("\r" + " " * min(_drawn, width(sys.stderr) - 1) + "\r")
        sys.stderr.flush()
        _drawn = 0


@contextmanager
def bar(what: str, total: int | None) -> Iterator[Callable[[int], object]]:
    """Shows how far a work is that takes more than a moment, on stderr where that is a terminal, else nothing.

    Gives what is told, after each part, how many that part had. The bar goes away with its end; silent under --quiet.
    """
    if _level < 1 or not is_live(sys.stderr):
        yield lambda number: None
        return
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread of its own
    form = "{desc}  {n:,}" if total is None else "{desc}  {bar}  {n:,} of {total:,}  left {remaining}"
    with tqdm(
        desc=what, total=total, file=sys.stderr, leave=False, delay=_PATIENCE_S, mininterval=_PAUSE_S, miniters=1,
        bar_format=form, ncols=width(sys.stderr) - 1, ascii=not is_utf8(sys.stderr),
    ) as shown:  # fmt: skip
        _bars.append(shown)
        try:
            yield shown.update
        finally:
            _bars.remove(shown)


def leave() -> None:
    """Ends the line on which a terminal has put its ^C, so that the shell begins on one of its own."""
    if is_live(sys.stderr):
        clear()
        print(file=sys.stderr, flush=True)


def width(stream: TextIO) -> int:
    """Columns of the terminal that the stream goes to: COLUMNS where it is set; 80 where nobody can tell."""
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given) > 0:
        return int(given)
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):  # no terminal, or a stream without a file
        return 80


def columns(text: str) -> int:
    """Columns that a line takes on a terminal: East Asian wide characters take two, combining ones none."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def cut(text: str, size: int) -> str:
    """The beginning of a line that takes at most so many columns."""
    while columns(text) > size:
        text = text[:-1]
    return text


def _broken(text: str) -> str:
    """The text in lines that fit the terminal, broken between words; a longer word, such as a path, stays whole."""
    size = width(sys.stderr) - 1
    fill = textwrap.TextWrapper(
        max(size, 10), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    ).fill
    return "\n".join(line if columns(line) <= size else fill(line) for line in text.split("\n"))
