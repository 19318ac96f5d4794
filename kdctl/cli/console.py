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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, TextIO

from kdctl.errors import KdctlError

_NUMBER = re.compile(r"[-+]?[\d,.]+(e[-+]?\d+)?( ?%)?|-?")
_level = 1


def set_up(quiet: bool = False, verbose: bool = False) -> None:
    """Sets how much `say` and `detail` print, and makes both streams replace what they cannot encode."""
    global _level
    _level = 0 if quiet else 2 if verbose else 1
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure and not _is_utf8(stream):
            reconfigure(errors="replace")


def out(text: str = "") -> None:
    """A line of the result, on stdout."""
    print(text)


def say(text: str) -> None:
    """A line of progress or advice, on stderr; silent under --quiet."""
    if _level >= 1:
        print(text, file=sys.stderr, flush=True)


def detail(text: str) -> None:
    """A line for --verbose alone, on stderr."""
    if _level >= 2:
        print(text, file=sys.stderr, flush=True)


def print_error(error: KdctlError) -> None:
    """Every problem as `file:line: key: message`, its hint on a line below, on stderr; also under --quiet."""
    for problem in error.problems:
        print(replace(problem, file=problem.file and near(problem.file)).where() + problem.message, file=sys.stderr)
        if problem.hint:
            print(f"  hint: {problem.hint}", file=sys.stderr)
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
    print(json.dumps(_jsonable(document), indent=2, ensure_ascii=not _is_utf8(sys.stdout), allow_nan=False))


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
    cells = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    right = [bool(cells) and all(_NUMBER.fullmatch(row[i]) for row in cells) for i in range(len(headers))]
    if sys.stdout.isatty():
        _draw(headers, cells, right)
    else:
        for line in _lines(headers, cells, right):
            print(line)


def _lines(headers: Sequence[str], cells: list[list[str]], right: list[bool]) -> list[str]:
    """Aligned lines, two blanks between columns: the same in a pipe, a file and a log."""
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

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for header, is_right in zip(headers, right, strict=True):
        table.add_column(Text(header), justify="right" if is_right else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    Console(highlight=False, emoji=False, markup=False).print(table)


def _is_utf8(stream: TextIO) -> bool:
    return (getattr(stream, "encoding", None) or "ascii").lower().replace("-", "") in ("utf8", "cp65001")
