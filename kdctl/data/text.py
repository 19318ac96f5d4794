"""Texts with labels, from TSV, CSV or JSONL files."""

from __future__ import annotations

import csv
import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from kdctl import runs
from kdctl.config.types import PathStr, PositiveInt
from kdctl.data.base import Dataset, Source
from kdctl.data.tokenizer import Tokenizer
from kdctl.data.tokens import TokenSplit
from kdctl.errors import ConfigError, MissingError, Problem
from kdctl.signals import IGNORE, TokenInput

Row = dict[str, Any]
_AS_IN_GLUE: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}


class Text(Source):
    """Texts in .tsv, .csv or .jsonl files with a column of labels; tokenised once, and kept.

    root: the folder of the files. train, val, test: their names in it. text: the column of the text; pair: that of a
    second one. label: the column of the class, which may be empty where a text has no label. class_names: their names
    in the order of their numbers; left out, those of the training file, sorted, and numbers in their own order.
    tokenizer: a tokenizer.json, or the folder of a model that has one; left out, a WordPiece tokenizer of `vocab_size`
    tokens is trained on the training texts. max_length: tokens of a text, special ones included; longer ones are cut.
    Raises MissingError where a file or column is not there, ConfigError for a label that is no class.
    """

    def __init__(
        self,
        *,
        root: PathStr,
        train: str = "train.tsv",
        val: str | None = None,
        test: str | None = None,
        text: str = "text",
        pair: str | None = None,
        label: str = "label",
        class_names: list[str] | None = None,
        tokenizer: PathStr | None = None,
        vocab_size: PositiveInt = 8000,
        max_length: PositiveInt = 128,
    ) -> None:
        self.root = Path(root).expanduser()
        self.files = {name: file for name, file in (("train", train), ("val", val), ("test", test)) if file}
        self.text, self.pair, self.label = text, pair, label
        self.class_names = class_names
        self.tokenizer = None if tokenizer is None else Path(tokenizer).expanduser()
        self.vocab_size, self.max_length = vocab_size, max_length

    def load(self) -> Dataset:
        read = {name: _Read(self.root / file, name, self) for name, file in self.files.items()}
        names = self.class_names or read["train"].classes()
        if self.tokenizer is None:
            tokenizer = Tokenizer.trained(read["train"].texts + (read["train"].seconds or []), self.vocab_size)
        else:
            tokenizer = Tokenizer.read(self.tokenizer)
        tokens = tokenizer.tokens(self.max_length, self.pair is not None)
        splits = {name: one.split(tokenizer, tokens, names) for name, one in read.items()}
        return Dataset(
            splits["train"], splits.get("val"), splits.get("test"), class_names=names, tokenizer=tokenizer.text
        )


class _Read:
    """One file: its texts and labels as they stand."""

    def __init__(self, path: Path, name: str, source: Text) -> None:
        self.path = path
        if not path.is_file():
            raise MissingError(Problem(f"there is no file {path}", key=f"data.{name}"))
        wanted = [column for column in (source.text, source.pair) if column is not None]
        self.texts: list[str] = []
        self.seconds: list[str] | None = [] if source.pair is not None else None
        self.labels: list[str] = []
        self.lines: list[int] = []
        for line, row in _rows(path):
            missing = next((column for column in wanted if not isinstance(row.get(column), str)), None)
            if missing is not None:
                there = ", ".join(map(str, row))
                _wrong(path, line, f"there is no text '{missing}'; there are: {there}", "data.text names the column")
            self.lines.append(line)
            self.texts.append(row[source.text])
            if self.seconds is not None and source.pair is not None:
                self.seconds.append(row[source.pair])
            label = row.get(source.label)
            self.labels.append("" if label is None else str(label).strip())
        if not self.texts:
            raise ConfigError(Problem("there is no text in this file", file=str(path)))

    def classes(self) -> list[str]:
        """The labels that there are: numbers in their order, other names sorted."""
        found = {label for label in self.labels if label}
        if not found:
            hint = "data.label names the column; data.class_names the classes, where no text has a label"
            raise ConfigError(Problem("no text of this file has a label", file=str(self.path), hint=hint))
        if all(label.isdecimal() for label in found):
            return sorted(found, key=int)
        return sorted(found)

    def split(self, tokenizer: Tokenizer, tokens: TokenInput, names: list[str]) -> TokenSplit:
        number_of = {name: number for number, name in enumerate(names)} | {"": IGNORE}
        wrong = next((i for i, label in enumerate(self.labels) if label not in number_of), None)
        if wrong is not None:
            message = f"'{self.labels[wrong]}' is no class; there are: {', '.join(names[:20])}"
            _wrong(self.path, self.lines[wrong], message, "data.class_names lists them all")
        targets = torch.tensor([number_of[label] for label in self.labels])
        return TokenSplit.of(self._encoded(tokenizer, tokens), targets, tokens)

    def _encoded(self, tokenizer: Tokenizer, tokens: TokenInput) -> list[NDArray[np.int32]]:
        """The numbers of each text: from the file that an earlier call left, where that is whole."""
        digest = hashlib.sha256(repr(tokens).encode())
        for text in [*self.texts, *(self.seconds or [])]:
            digest.update(text.encode() + b"\0")
        place = runs.cache_home() / "texts" / f"{digest.hexdigest()[:32]}.npz"
        try:
            with np.load(place, allow_pickle=False) as kept:
                return np.split(kept["ids"], kept["ends"][:-1])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            pass
        encoded = [np.asarray(ids, np.int32) for ids in tokenizer.encode(self.texts, self.seconds, tokens.length)]
        with runs.writing(place) as file:
            np.savez_compressed(file, ids=np.concatenate(encoded), ends=np.cumsum([len(ids) for ids in encoded]))
        return encoded


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    """The rows of a file by its ending, as {column: value}, each with the line that it ends on."""
    kind: Literal["tsv", "csv", "jsonl"] | str = path.suffix.lower().lstrip(".")
    with open(path, encoding="utf-8", newline="" if kind == "csv" else None) as file:
        if kind == "jsonl":
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    _wrong(path, number, f"this is no JSON: {error}", None)
                if not isinstance(row, dict):
                    _wrong(path, number, "a line is one JSON object", None)
                yield number, row
        elif kind in ("csv", "tsv"):
            read = csv.DictReader(file) if kind == "csv" else csv.DictReader(file, **_AS_IN_GLUE)
            yield from ((read.line_num, row) for row in read)
        else:
            hint = "allowed: .tsv, .csv, .jsonl"
            raise ConfigError(Problem(f"files of the kind '{path.suffix}' are not read", file=str(path), hint=hint))


def _wrong(path: Path, line: int, message: str, hint: str | None) -> NoReturn:
    raise ConfigError(Problem(message, file=str(path), line=line, hint=hint))
