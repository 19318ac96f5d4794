"""The rows of files of texts: tables with a header or without, JSON lines, and words one a line (CoNLL)."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from kdctl.errors import ConfigError, MissingError, Problem

Row = dict[str, Any]
Numbered = Iterator[tuple[int, Row]]
"""Rows as {column: value}, each with the line that it ends on."""
_AS_IN_GLUE: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
_PACKED: dict[str, Callable[..., IO[str]]] = {".xz": lzma.open, ".gz": gzip.open}
_WORDS = (".conll", ".txt")
_TABLES = (".tsv", ".csv", ".jsonl")
_LONGEST = 2**30
"""Signs of a table's cell; Python's own limit is 131,072."""
WORD, TAG = "tokens", "tags"
"""What the columns of a CoNLL file are called where nobody names them: the first one, and the last."""


def read_rows(path: Path, columns: Sequence[str] | None, words: bool) -> Numbered:
    """The rows of a file by its ending, which may be followed by .xz or .gz.

    columns: the names of the columns of a table without a header, or of a CoNLL file. words: whether a row is to hold
    lists of words: of a .conll or .txt file the sentences, or JSON lines.
    Raises MissingError where there is no file, ConfigError where it is none of these or damaged.
    """
    packed = path.suffix.lower() in _PACKED
    kind = (path.with_suffix("") if packed else path).suffix.lower()
    allowed = (".jsonl", *_WORDS) if words else _TABLES
    if not path.is_file():
        raise MissingError(Problem("there is no such file", file=str(path)))
    if kind not in allowed:
        hint = f"allowed: {', '.join(allowed)}, each also packed as .xz or .gz"
        asked = " for words with tags" if words and kind in _TABLES else ""
        raise ConfigError(Problem(f"files of the kind '{kind}' are not read{asked}", file=str(path), hint=hint))
    if columns is not None and kind == ".jsonl":
        message = "data.columns names the columns of a file that does not name them itself, and JSON lines do"
        raise ConfigError(Problem(message, key="data.columns", file=str(path), hint="leave data.columns out"))
    unpack = _PACKED[path.suffix.lower()] if packed else open
    try:
        with unpack(path, "rt", encoding="utf-8-sig", newline="" if kind == ".csv" else None) as file:
            if kind == ".jsonl":
                yield from _json_lines(path, file)
            elif kind in _WORDS:
                yield from _sentences(path, file, columns)
            else:
                yield from _table(path, file, columns, {} if kind == ".csv" else _AS_IN_GLUE)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(Problem(f"the file cannot be read: {error}", file=str(path), hint="is it whole?")) from None


def wrong_line(path: Path, line: int, message: str, hint: str | None) -> NoReturn:
    """Raises the ConfigError of a line of a file."""
    raise ConfigError(Problem(message, file=str(path), line=line, hint=hint))


def _table(path: Path, file: IO[str], columns: Sequence[str] | None, form: dict[str, Any]) -> Numbered:
    csv.field_size_limit(_LONGEST)
    reader = csv.DictReader(file, fieldnames=columns, **form)
    for row in reader:
        if columns is not None and None in row:
            message = f"{len(columns) + len(row[None])} columns, and data.columns names {len(columns)}"
            wrong_line(path, reader.line_num, message, "name every column, in their order")
        yield reader.line_num, row


def _json_lines(path: Path, file: IO[str]) -> Numbered:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            wrong_line(path, number, f"this is no JSON: {error}", None)
        if not isinstance(row, dict):
            wrong_line(path, number, "a line is one JSON object", None)
        yield number, row


def _sentences(path: Path, file: IO[str], columns: Sequence[str] | None) -> Numbered:
    """Sentences, with an empty line between two, as lists by column; lines that begin with -DOCSTART- are left out."""
    rows: list[list[str]] = []
    width, number = 0 if columns is None else len(columns), 0
    for number, line in enumerate(file, 1):
        cells = line.rstrip("\n").split("\t") if "\t" in line else line.split()
        if not line.strip():
            if rows:
                yield number - 1, _by_column(rows, columns)
            rows = []
        elif cells[0] != "-DOCSTART-":
            width = width or len(cells)
            if len(cells) != width:
                wanted = "data.columns names" if columns is not None else "the first line has"
                message = f"{len(cells)} columns, and {wanted} {width}"
                wrong_line(path, number, message, "a word, its tag and whatever is between them, on one line")
            rows.append(cells)
    if rows:
        yield number, _by_column(rows, columns)


def _by_column(rows: list[list[str]], columns: Sequence[str] | None) -> Row:
    by_column = [list(column) for column in zip(*rows, strict=True)]
    if columns is not None:
        return dict(zip(columns, by_column, strict=True))
    return {WORD: by_column[0]} | ({TAG: by_column[-1]} if len(by_column) > 1 else {})
