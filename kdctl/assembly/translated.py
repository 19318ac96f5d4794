"""Teachers of texts that read them by another tokenizer than the data's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdctl.data.prepare import Data
from kdctl.data.tokenizer import Tokenizer
from kdctl.errors import ConfigError, MissingError, Problem
from kdctl.models.record import Model, ModelRecord
from kdctl.signals import TokenInput

_WHOLE = ("sample", "embedding")


class Translated(Model):
    """A model whose texts are made into other numbers first: those of the data become text, and that its own numbers.

    What the data's tokenizer loses of a text (case, rare signs), or hides behind its mask, this model does not see.
    theirs, own: the tokenizers of the data and of the model.
    """

    def __init__(
        self, net: nn.Module, record: ModelRecord, base: Path | None, theirs: Tokenizer, own: Tokenizer
    ) -> None:
        super().__init__(net, record, base)
        self._theirs, self._own = theirs, own

    def around(self, net: nn.Module) -> Model:
        return Translated(net, self.record, self.base, self._theirs, self._own)

    def _read(self, numbers: Tensor, tokens: TokenInput) -> Any:
        own = self.record.reads
        assert own is not None
        return super()._read(self.translated(numbers, tokens, own), own)

    def translated(self, numbers: Tensor, tokens: TokenInput, own: TokenInput) -> Tensor:
        """The texts of numbers (N, L) in the model's own numbers (N, L'), int64."""
        rows = [[number for number in row if number != tokens.pad] for row in numbers.tolist()]
        first, *more = ([self._theirs.decode(half) for half in halves] for halves in _halves(rows, tokens))
        ids = self._own.encode(first, more[0] if more else None, own.length)
        longest = max(map(len, ids))
        return torch.tensor([[*row, *[own.pad] * (longest - len(row))] for row in ids], device=numbers.device)


def _halves(rows: Sequence[list[int]], tokens: TokenInput) -> list[list[list[int]]]:
    """The texts, or of pairs the first ones and the second ones."""
    if not tokens.pairs:
        return [list(rows)]
    ends = [row.index(tokens.separator) if tokens.separator in row else len(row) for row in rows]
    pairs = list(zip(rows, ends, strict=True))
    return [[row[:end] for row, end in pairs], [row[end:] for row, end in pairs]]


def as_read(data: Data, path: Path) -> tuple[Data, Callable[[Model], Model]]:
    """The data as a model sees them that reads by the tokenizer at `path`, and what makes such a model take the data's.

    Raises ConfigError where the data are no texts, or the answers are about their tokens, MissingError where there is
    no tokenizer.
    """
    if data.tokens is None or data.tokenizer is None:
        raise ConfigError(Problem("the data are no texts", key="tokenizer", hint="leave it out"))
    if data.head not in _WHOLE:
        message = "the task asks about each token of a text, and another tokenizer cuts texts into other tokens"
        hint = "texts that the teacher wrote beforehand cross tokenizers: data: {kind: corpus}"
        raise ConfigError(Problem(message, key="tokenizer", hint=hint))
    try:
        own = Tokenizer.read(path)
    except (ConfigError, MissingError) as error:
        raise type(error)(*(replace(p, key="tokenizer") for p in error.problems)) from None
    theirs, tokens = Tokenizer(data.tokenizer), data.tokens
    read = replace(data, own_tokens=own.tokens(tokens.length, tokens.pairs), tokenizer=own.text)

    def translated(model: Model) -> Model:
        record = replace(model.record, tokens=tokens, reads=model.record.tokens)
        return Translated(model.net, record, model.base, theirs, own)

    return read, translated
