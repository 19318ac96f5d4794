"""Texts with labels, from TSV, CSV, JSONL or CoNLL files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdctl.config.types import PathStr, PositiveInt
from kdctl.data import cells
from kdctl.data.base import Dataset, Source
from kdctl.data.rows import TAG, WORD, Numbered, Row, read_rows, wrong_line
from kdctl.data.tokenizer import Tokenizer
from kdctl.data.tokens import TokenSplit, kept_encoding
from kdctl.errors import ConfigError, MissingError, Problem
from kdctl.signals import IGNORE, TokenInput

Encoded = tuple[list[NDArray[np.int32]], list[NDArray[np.int32]] | None]
"""The numbers of each text and, of words with tags, which word each of them begins, -1 where it begins none."""


class Text(Source):
    """Texts in .tsv, .csv or .jsonl files with a column of labels; tokenised once, and kept.

    What a label is, the task says. A class, an empty cell being no label. Of a multilabel task the classes with
    `separator` in between, or in JSON a list; empty is no label, and an empty list is none of the classes. Of a
    regression a number. Of token_classification a text is a list of words in .jsonl (`tokens`, with `tags` of the same
    length), or a sentence of a CoNLL file (.conll or .txt: a word a line, an empty line between two sentences); the
    first token of a word carries its tag, and words beyond max_length have none. Of sentence_embedding a class, which
    measures the embeddings and is not learnt; no text needs one.

    root: the folder of the files, which may be packed as .xz or .gz. train, val, test: their names in it. columns: the
    names of the columns of files without a header; of CoNLL files they are the words in the first and the tags in the
    last where left out. text: the column of the text; pair: that of a second one. label: the column of the labels; none
    where no text has one. class_names: their names in the order of their numbers, which may stand in the cells in their
    place, or a file in `root` with one name a line; left out, those of the training file, sorted, and numbers in their
    own order. tokenizer: a tokenizer.json, or the folder of a model that has one; left out, a WordPiece tokenizer of
    `vocab_size` tokens is trained on the training texts. max_length: tokens of a text, special ones included; longer
    ones are cut.
    Raises MissingError where a file is not there, ConfigError for a column that is not or a label that is none.
    """

    def __init__(
        self,
        *,
        root: PathStr,
        train: str = "train.tsv",
        val: str | None = None,
        test: str | None = None,
        columns: list[str] | None = None,
        text: str = "text",
        pair: str | None = None,
        label: str | None = "label",
        separator: str = ",",
        class_names: list[str] | str | None = None,
        tokenizer: PathStr | None = None,
        vocab_size: PositiveInt = 8000,
        max_length: PositiveInt = 128,
        target: str = "class",
    ) -> None:
        if target not in cells.KINDS:
            hint = "data: {kind: corpus}"
            raise ConfigError(Problem("the task learns from texts without labels", key="data.kind", hint=hint))
        self.root = Path(root).expanduser()
        self.files = {name: file for name, file in (("train", train), ("val", val), ("test", test)) if file}
        self.columns, self.text, self.pair, self.label = columns, text, pair, label
        self.class_names = class_names
        self.tokenizer = None if tokenizer is None else Path(tokenizer).expanduser()
        self.vocab_size, self.max_length = vocab_size, max_length
        self.words, self.embeds = target == "tags", target == "embedding"
        self._check(target, separator)
        self.cells = cells.cells_of(target, separator)

    def _check(self, target: str, separator: str) -> None:
        if self.words and self.pair is not None:
            message = "words with tags are of one text, not of a pair"
            raise ConfigError(Problem(message, key="data.pair", hint="leave it out"))
        if target == "number" and self.class_names is not None:
            message = "a regression has no classes to be named"
            raise ConfigError(Problem(message, key="data.class_names", hint="leave it out"))
        if not separator:
            raise ConfigError(Problem("what stands between two labels is empty", key="data.separator", hint="','"))

    def load(self) -> Dataset:
        given = self.given_names()
        read = {name: _Read(*self.open(name), self) for name in self.files}
        names = given or read["train"].names()
        if self.tokenizer is None:
            tokenizer = Tokenizer.trained(read["train"].plain(), self.vocab_size)
        else:
            tokenizer = Tokenizer.read(self.tokenizer)
        least = tokenizer.special_count(self.pair is not None) + 1
        if self.max_length < least:
            message = f"got {self.max_length}, and this tokenizer adds {least - 1} special tokens to a text"
            raise ConfigError(Problem(message, key="data.max_length", hint=f"{least} at least"))
        tokens = tokenizer.tokens(self.max_length, self.pair is not None)
        number_of = cells.numbers_of(names, given is not None)
        splits = {name: one.split(tokenizer, tokens, names, number_of) for name, one in read.items()}
        return Dataset(
            splits["train"], splits.get("val"), splits.get("test"), class_names=names, tokenizer=tokenizer.text
        )

    def open(self, name: str) -> tuple[Path, Numbered]:
        """Where a split stands, and its rows."""
        path = self.root / self.files[name]
        if not path.is_file():
            raise MissingError(Problem(f"there is no file {path}", key=f"data.{name}"))
        return path, read_rows(path, self.columns, self.words)

    def given_names(self) -> list[str] | None:
        """The classes as somebody named them; None where nobody did."""
        if self.class_names is None:
            return None
        names, file = self.class_names, None
        if isinstance(names, str):
            path = self.root / names
            file = str(path)
            if not path.is_file():
                hint = "a list of names, or a file in data.root with one name a line"
                raise MissingError(Problem(f"there is no file {path}", key="data.class_names", hint=hint))
            names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
        if twice is not None or not names:
            message = "no class is named" if twice is None else f"'{twice}' is named twice"
            raise ConfigError(Problem(message, key="data.class_names", file=file, hint="name each class once"))
        return names


class _Read:
    """One split: its texts and labels as they stand."""

    def __init__(self, path: Path, rows: Numbered, source: Text) -> None:
        self.path, self.source = path, source
        self.texts: list[Any] = []
        self.seconds: list[str] | None = [] if source.pair is not None else None
        self.cells: list[cells.Cell] = []
        self.lines: list[int] = []
        labelled = source.label is None
        for line, row in rows:
            text, label = self._columns(row)
            self.lines.append(line)
            self.texts.append(self._text(row, text, line))
            if self.seconds is not None and source.pair is not None:
                self.seconds.append(self._text(row, source.pair, line))
            self.cells.append(self._cell(row, label, line))
            labelled = labelled or label in row
        if not self.texts:
            raise ConfigError(Problem("there is no text in this file", file=str(path)))
        if not labelled:
            message = f"no text has a column '{source.label}'; there are: {', '.join(map(str, row))}"
            hint = "data.label names the column; label: null where no text has a label"
            raise ConfigError(Problem(message, key="data.label", file=str(path), hint=hint))

    def _columns(self, row: Row) -> tuple[str, str | None]:
        """The columns of the text and of its label: of words also under the names that are usual for them."""
        text, label = self.source.text, self.source.label
        if self.source.words and text == "text" and text not in row:
            text = WORD
        if self.source.words and label == "label" and label not in row:
            label = TAG
        return text, label

    def _text(self, row: Row, column: str, line: int) -> Any:
        """A text or, where the source is of words, the list of its words."""
        value = row.get(column)
        if self.source.words:
            good = isinstance(value, list) and value and all(isinstance(word, str) for word in value)
            what = "list of words"
        else:
            good, what = isinstance(value, str), "text"
        if not good:
            there = ", ".join(map(str, row))
            name = "data.pair" if column == self.source.pair else "data.text"
            wrong_line(
                self.path, line, f"there is no {what} '{column}'; there are: {there}", f"{name} names the column"
            )
        try:
            "\0".join(value if isinstance(value, list) else [str(value)]).encode()
        except UnicodeEncodeError as error:
            sign = f"U+{ord(error.object[error.start]):04X}"
            hint = "it was cut within a sign: write the file anew, or delete the line"
            wrong_line(self.path, line, f"the text holds {sign}, half of a sign", hint)
        return value

    def _cell(self, row: Row, label: str | None, line: int) -> cells.Cell:
        try:
            cell = None if label is None else self.source.cells.read(row.get(label))
        except ValueError as error:
            wrong_line(self.path, line, str(error), "data.label names the column of the labels")
        if self.source.words and cell is not None and len(cell) != len(self.texts[-1]):
            message = f"{len(cell)} tags for {len(self.texts[-1])} words"
            wrong_line(self.path, line, message, "one tag a word")
        return cell

    def plain(self) -> list[str]:
        """All texts, as a tokenizer is trained on them."""
        return [" ".join(text) if self.source.words else text for text in self.texts] + (self.seconds or [])

    def names(self) -> list[str]:
        """The labels that there are."""
        names = self.source.cells.names(self.cells)
        if not names and not self.source.embeds:
            hint = "data.label names the column; data.class_names the classes, where no text has a label"
            raise ConfigError(Problem("no text of this file has a label", file=str(self.path), hint=hint))
        return names

    def split(
        self, tokenizer: Tokenizer, tokens: TokenInput, names: Sequence[str], number_of: dict[str, int]
    ) -> TokenSplit:
        for line, cell in zip(self.lines, self.cells, strict=True):
            try:
                self.source.cells.check(cell, number_of)
            except cells.Unknown as unknown:
                message = f"'{unknown}' is no class; there are: {', '.join(names[:20])}"
                wrong_line(self.path, line, message, "data.class_names lists them all")
        targets = self.source.cells.targets(self.cells, number_of, len(names))
        encoded, words = self._encoded(tokenizer, tokens)
        if words is None:
            asks = "embedding" if self.source.embeds else "targets"
            return TokenSplit.of(encoded, targets, tokens, asks=asks)
        return TokenSplit.of(encoded, targets, tokens, tags=self._tags(words, number_of), asks="tags")

    def _tags(self, words: list[NDArray[np.int32]], number_of: dict[str, int]) -> torch.Tensor:
        """int32 (T,): of each token that begins a word the number of the word's tag, else IGNORE."""
        tags = []
        for cell, begun in zip(self.cells, words, strict=True):
            numbers = np.array([*([] if cell is None else (number_of[tag] for tag in cell)), IGNORE], np.int32)
            tags.append(np.full(len(begun), IGNORE, np.int32) if cell is None else numbers[begun])
        return torch.from_numpy(np.concatenate(tags))

    def _encoded(self, tokenizer: Tokenizer, tokens: TokenInput) -> Encoded:
        """The numbers of each text, kept from an earlier call where there was one."""
        if not self.source.words:
            texts, seconds = self.texts, self.seconds
            kept = [*texts, *(seconds or [])]
            return kept_encoding("texts", kept, tokens, lambda: tokenizer.encode(texts, seconds, tokens.length)), None
        kept = ["".join(f"{word}\1" for word in words) for words in self.texts]
        both = kept_encoding(
            "words",
            kept,
            tokens,
            lambda: [[*ids, *begun] for ids, begun in tokenizer.encode_words(self.texts, tokens.length)],
        )
        halves = [np.split(numbers, 2) for numbers in both]
        return [ids for ids, _ in halves], [begun for _, begun in halves]
