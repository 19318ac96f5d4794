"""Texts as token numbers: a split of them, and what makes numbers of text.

One text is one row of numbers: special tokens included, cut to the longest length that the data allow. A batch is one
int64 array (N, L), padded behind to the longest of its texts; which positions are padding, and where the second of two
texts begins, a model reads from the numbers themselves (`TokenInput`), so that a batch is a single array everywhere:
in stores, in measuring, and in exported files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdctl.data import counter
from kdctl.data.base import Shape, Split, check_targets
from kdctl.errors import ConfigError
from kdctl.signals import TokenInput

_WINDOW = 64
"""Batches among which texts of like length are brought together."""


class TokenSplit(Split):
    """Texts in memory, one after the other in one array.

    ids: int32 (T,). starts: int64 (N + 1,), where each text begins and the last one ends. tokens: what the numbers
    mean. targets, index: as of Split.
    """

    def __init__(
        self, ids: Tensor, starts: Tensor, targets: Tensor, tokens: TokenInput, index: Tensor | None = None
    ) -> None:
        check_targets(targets, len(starts) - 1)
        self.ids, self.starts, self.targets, self.tokens = ids, starts, targets, tokens
        self.index = torch.arange(len(targets)) if index is None else index

    @classmethod
    def of(cls, texts: Sequence[Sequence[int] | NDArray[np.int32]], targets: Tensor, tokens: TokenInput) -> TokenSplit:
        """A split of lists of token numbers. Raises ConfigError for one that is empty or too long."""
        lengths = torch.tensor([len(text) for text in texts], dtype=torch.int64)
        if len(lengths) and not 0 < int(lengths.min()) <= int(lengths.max()) <= tokens.length:
            raise ConfigError(
                f"texts must have 1 to {tokens.length} tokens; got {int(lengths.min())} to {int(lengths.max())}"
            )
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        ids = (
            np.concatenate([np.asarray(text, dtype=np.int32) for text in texts])
            if len(texts)
            else np.zeros(0, np.int32)
        )
        return cls(torch.from_numpy(ids), starts, targets, tokens)

    @property
    def input_shape(self) -> Shape:
        return (self.tokens.length,)

    @property
    def lengths(self) -> Tensor:
        """(N,) tokens of each text."""
        return self.starts[1:] - self.starts[:-1]

    def fetch(self, rows: Tensor) -> Tensor:
        """int64 (n, L), L the longest of these texts, padded behind."""
        starts, lengths = self.starts[rows], self.lengths[rows]
        position = torch.arange(int(lengths.max()))
        inside = position[None] < lengths[:, None]
        places = (starts[:, None] + position[None]).masked_fill(~inside, 0)
        return self.ids[places].long().masked_fill(~inside, self.tokens.pad)

    def subset(self, rows: Tensor) -> TokenSplit:
        """The samples at these rows, with the numbers they had."""
        lengths = self.lengths[rows]
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        shift = torch.repeat_interleave(self.starts[rows] - starts[:-1], lengths)
        ids = self.ids[torch.arange(len(shift)) + shift]
        return TokenSplit(ids, starts, self.targets[rows], self.tokens, self.index[rows])

    def labelled(self, targets: Tensor, index: Tensor | None = None) -> TokenSplit:
        """The same texts with other targets, and other numbers where given."""
        return TokenSplit(self.ids, self.starts, targets, self.tokens, self.index if index is None else index)

    def extra(self, inputs: Tensor) -> dict[str, Tensor]:
        """`attention_mask`, int64 (n, l): 0 where there is padding, which losses on tokens leave out."""
        return {"attention_mask": self.tokens.is_text(inputs).long()}

    def clean_order(self) -> Tensor:
        """All rows, the longest texts first: batches have little padding, and memory that suffices once suffices."""
        return torch.argsort(self.lengths, descending=True, stable=True)

    def arranged(self, rows: Tensor, batch_size: int, key: int) -> Tensor:
        """Texts of like length side by side: little of a batch is padding.

        Within windows of many batches the rows are sorted by length and cut into batches; these come in an order drawn
        by the key, a last one that is not full at the end.
        """
        whole = len(rows) // batch_size * batch_size
        batches = []
        for window in rows[:whole].split(_WINDOW * batch_size):
            by_length = window[torch.argsort(self.lengths[window], stable=True)]
            batches.append(by_length.view(-1, batch_size))
        if not batches:
            return rows
        full = torch.cat(batches)
        return torch.cat([full[counter.permutation(len(full), key)].flatten(), rows[whole:]])

    @classmethod
    def together(cls, splits: list[TokenSplit]) -> TokenSplit:
        """One after the other, numbered anew. Raises ConfigError where their tokens are not the same."""
        first = splits[0].tokens
        if any(split.tokens != first for split in splits):
            raise ConfigError("these texts were made into numbers by different tokenizers, or cut to different lengths")
        texts = torch.cat([split.lengths for split in splits])
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), texts.cumsum(0)])
        return cls(torch.cat([s.ids for s in splits]), starts, torch.cat([s.targets for s in splits]), first)

    def fingerprint(self) -> str:
        """SHA-256 over numbers, lengths and targets, and what the numbers mean."""
        digest = hashlib.sha256(repr(self.tokens).encode())
        for values in (self.ids, self.starts, self.targets):
            digest.update(np.ascontiguousarray(values.numpy()).data)
        return digest.hexdigest()
