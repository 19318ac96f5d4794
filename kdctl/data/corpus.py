"""Plain texts to learn the language of: cut into blocks of tokens, one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kdctl.config.types import Fraction, PathStr, PositiveInt
from kdctl.data.base import Dataset, Source
from kdctl.data.tokenizer import Tokenizer
from kdctl.data.tokens import TokenSplit, kept_encoding
from kdctl.errors import ConfigError, MissingError, Problem
from kdctl.signals import TokenInput

_DEFAULTS = {"next": "bpe", "hidden": "wordpiece"}
_ENDINGS = (".txt", ".jsonl")


class Corpus(Source):
    """Plain texts for language models: .txt files, or .jsonl files with a text a line; tokenised once, and kept.

    The texts of a file are joined and cut into blocks of `max_length` tokens. Where the next token is learnt, a block
    begins with the last token of the one before it, so that every token but a file's first is asked about once; where
    hidden tokens are, it lies between the tokenizer's first and separating tokens.

    root: the folder of the files. train, val, test: their names in it. val_share, test_share: of a split without a
    file, how much of the end of the training text it gets instead. text: the key of the text in a .jsonl file.
    tokenizer: a tokenizer.json, or the folder of a model that has one; left out, one of `vocab_size` tokens is trained
    on the training text. units: what its tokens are: `bpe`, pieces of any text; `wordpiece`, pieces of lower-case
    words, as BERT has them; or all `characters`; left out, bpe, and where hidden tokens are learnt, wordpiece.
    max_length: tokens of a block. Raises MissingError where a file is not there, ConfigError where it holds no text or
    less than a block.
    """

    def __init__(
        self,
        *,
        root: PathStr,
        train: str = "train.txt",
        val: str | None = None,
        test: str | None = None,
        val_share: Fraction = 0.05,
        test_share: Fraction = 0.05,
        text: str = "text",
        tokenizer: PathStr | None = None,
        units: Literal["bpe", "wordpiece", "characters"] | None = None,
        vocab_size: PositiveInt = 4000,
        max_length: PositiveInt = 128,
        target: str,
    ) -> None:
        self.root = Path(root).expanduser()
        self.files = {name: file for name, file in (("train", train), ("val", val), ("test", test)) if file}
        self.shares = {name: share for name, share in (("val", val_share), ("test", test_share)) if share}
        self.text = text
        self.tokenizer = None if tokenizer is None else Path(tokenizer).expanduser()
        self.units = units or _DEFAULTS.get(target, "bpe")
        self.vocab_size, self.max_length = vocab_size, max_length
        if target not in _DEFAULTS:
            message = "a corpus is plain text, of which the next token or hidden ones are learnt"
            raise ConfigError(
                Problem(message, key="data.kind", hint="task: causal_lm or masked_lm; or data: {kind: text}")
            )
        self.target = target

    def load(self) -> Dataset:
        whole = {name: self.read(name) for name in self.files}
        parts = whole | self._held_out(whole)
        tokenizer = self._tokenizer(parts["train"])
        tokens = tokenizer.tokens(self.max_length)
        if self.target == "hidden" and None in (tokens.first, tokens.separator):
            raise ConfigError(Problem("this tokenizer has no tokens that begin and end a text", key="data.tokenizer"))
        splits = {name: self._blocks(tokenizer, tokens, text) for name, text in parts.items()}
        names = tokenizer.vocabulary()
        return Dataset(
            splits["train"], splits.get("val"), splits.get("test"), class_names=names, tokenizer=tokenizer.text
        )

    def read(self, name: str) -> str:
        """The text of a split."""
        path = self.root / self.files[name]
        if path.suffix not in _ENDINGS:
            hint = f"allowed: {', '.join(_ENDINGS)}"
            raise ConfigError(Problem(f"files of the kind '{path.suffix}' are not read", file=str(path), hint=hint))
        if not path.is_file():
            raise MissingError(Problem(f"there is no file {path}", key=f"data.{name}"))
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(Problem(f"the file is not UTF-8: {error.reason}", file=str(path))) from None
        text = text if path.suffix == ".txt" else "\n".join(_texts_of(path, text, self.text))
        if not text.strip():
            raise ConfigError(Problem("there is no text in this file", file=str(path)))
        return text

    def _held_out(self, texts: dict[str, str]) -> dict[str, str]:
        """The training text without its end, and the parts of that end that stand in for splits without a file."""
        shares = {name: share for name, share in self.shares.items() if name not in texts}
        train = texts["train"]
        end = round(len(train) * (1 - sum(shares.values())))
        if end <= 0:
            message = f"val_share and test_share leave nothing of the training text: {sum(shares.values()):g} of it go"
            raise ConfigError(Problem(message, key="data.val_share"))
        parts, start = {"train": train[:end]}, end
        for name, share in shares.items():
            stop = start + round(len(train) * share)
            parts[name], start = train[start:stop], stop
        return parts

    def _tokenizer(self, text: str) -> Tokenizer:
        if self.tokenizer is not None:
            return Tokenizer.read(self.tokenizer)
        return Tokenizer.trained(text.splitlines(keepends=True), self.vocab_size, self.units)

    def _blocks(self, tokenizer: Tokenizer, tokens: TokenInput, text: str) -> TokenSplit:
        ids = kept_encoding("plain", [text], tokens, lambda: [tokenizer.encode_plain(text)])[0]
        if (ids == tokens.pad).any():
            name = tokenizer.vocabulary()[tokens.pad]
            message = f"'{name}' stands within the text, and this tokenizer has no other token for padding"
            hint = "add a token [PAD] to the tokenizer, or take it out of the text"
            raise ConfigError(Problem(message, key="data.tokenizer", hint=hint))
        edges = [] if self.target == "next" else [tokens.first, tokens.separator]
        size = self.max_length - len(edges)
        step = size - 1 if self.target == "next" else size
        if size < 2 or len(ids) < 2:
            message = f"blocks of {self.max_length} tokens cannot be cut from a text of {len(ids)}"
            raise ConfigError(Problem(message, key="data.max_length"))
        last = len(ids) - (1 if self.target == "next" else 0)
        blocks: list[NDArray[np.int32]] = [ids[start : start + size] for start in range(0, last, step)]
        if edges:
            first, separator = (np.asarray([edge], np.int32) for edge in edges)
            blocks = [np.concatenate([first, block, separator]) for block in blocks]
        return TokenSplit.of(blocks, torch.zeros(len(blocks), dtype=torch.int64), tokens, asks=self.target)


def _texts_of(path: Path, content: str, key: str) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(Problem(f"this is no JSON: {error}", file=str(path), line=number)) from None
        if not isinstance(row, dict) or not isinstance(row.get(key), str):
            hint = "data.text names the key"
            raise ConfigError(Problem(f"there is no text '{key}' in this line", file=str(path), line=number, hint=hint))
        yield row[key]
