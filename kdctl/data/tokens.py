"""Texts as token numbers: a split of them, and what makes numbers of text.

One text is one row of numbers: special tokens included, cut to the longest length that the data allow. A batch is one
int64 array (N, L), padded behind to the longest of its texts; which positions are padding, and where the second of two
texts begins, a model reads from the numbers themselves (`TokenInput`), so that a batch is a single array everywhere:
in stores, in measuring, and in exported files.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdctl import runs
from kdctl.data import counter
from kdctl.data.base import Posed, Shape, Split, check_targets
from kdctl.errors import ConfigError
from kdctl.signals import IGNORE, TokenInput

_WINDOW = 64
"""Batches among which texts of like length are brought together."""
HIDDEN_SHARE = 0.15
"""How many of its tokens are hidden from a model that learns to tell them (Devlin et al., BERT, NAACL 2019)."""
_HEADS = {"tags": "token", "next": "vocabulary", "hidden": "vocabulary", "embedding": "embedding"}


class TokenSplit(Split):
    """Texts in memory, one after the other in one array.

    ids: int32 (T,). starts: int64 (N + 1,), where each text begins and the last one ends. tokens: what the numbers
    mean. targets, index: as of Split. tags: int32 (T,), the class of each token, IGNORE where it has none. asks: what a
    model is to answer: "targets" of the texts; "embedding", a vector of each, which targets only measure; "tags";
    "next", the token after each; or "hidden", those tokens that are hidden from it, other ones in each view. Of the
    last three, targets only say with IGNORE which texts are unlabelled.
    """

    def __init__(
        self,
        ids: Tensor,
        starts: Tensor,
        targets: Tensor,
        tokens: TokenInput,
        index: Tensor | None = None,
        tags: Tensor | None = None,
        asks: str = "targets",
    ) -> None:
        check_targets(targets, len(starts) - 1)
        self.ids, self.starts, self.targets, self.tokens = ids, starts, targets, tokens
        self.index = torch.arange(len(targets)) if index is None else index
        self.tags, self.asks, self.head = tags, asks, _HEADS.get(asks, "sample")
        self.drawn = asks == "hidden"
        if asks == "hidden" and tokens.mask is None:
            raise ConfigError("this tokenizer has no token that stands for a hidden one, such as [MASK]")

    @classmethod
    def of(
        cls,
        texts: Sequence[Sequence[int] | NDArray[np.int32]],
        targets: Tensor,
        tokens: TokenInput,
        tags: Tensor | None = None,
        asks: str = "targets",
    ) -> TokenSplit:
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
        return cls(torch.from_numpy(ids), starts, targets, tokens, tags=tags, asks=asks)

    @property
    def input_shape(self) -> Shape:
        return (self.tokens.length,)

    @property
    def lengths(self) -> Tensor:
        """(N,) tokens of each text."""
        return self.starts[1:] - self.starts[:-1]

    def fetch(self, rows: Tensor) -> Tensor:
        """int64 (n, L), L the longest of these texts, padded behind."""
        return self._padded(self.ids, rows, self.tokens.pad)

    def _padded(self, values: Tensor, rows: Tensor, padding: int) -> Tensor:
        """The values of the tokens of these texts, int64 (n, L)."""
        starts, lengths = self.starts[rows], self.lengths[rows]
        position = torch.arange(int(lengths.max()))
        inside = position[None] < lengths[:, None]
        places = (starts[:, None] + position[None]).masked_fill(~inside, 0)
        return values[places].long().masked_fill(~inside, padding)

    def posed(self, rows: Tensor, inputs: Tensor, view: Tensor) -> Posed:
        """As Split has it. Of tokens, `keep` says which are asked about, with or without an answer that is known."""
        if self.asks in ("targets", "embedding"):
            return Posed(inputs, self.targets[rows])
        if self.asks == "tags":
            assert self.tags is not None
            shown, answers, keep = inputs, self._padded(self.tags, rows, IGNORE), self.tokens.is_word(inputs)
        elif self.asks == "next":
            shown, answers = inputs, torch.full_like(inputs, self.tokens.pad)
            answers[:, :-1] = inputs[:, 1:]
            keep = self.tokens.is_text(answers)
        else:
            keep = self._hidden(rows, inputs, view)
            shown, answers = inputs.masked_fill(keep, int(self.tokens.mask or 0)), inputs
        known = keep & (self.targets[rows] != IGNORE).to(keep.device)[:, None]
        return Posed(shown, answers.to(inputs.device).masked_fill(~known, IGNORE), keep)

    def _hidden(self, rows: Tensor, inputs: Tensor, view: Tensor) -> Tensor:
        """(n, L) bool: the tokens that are hidden in these views, one at least of a text that has a word."""
        keys = counter.fold(counter.fold(counter.key(counter.HIDE), self.index[rows].to(view.device)), view)
        drawn = counter.Draws(keys, 0).uniforms(self.tokens.length)[:, : inputs.shape[1]].to(inputs.device)
        drawn = drawn.masked_fill(~self.tokens.is_word(inputs), 1)
        return (drawn < HIDDEN_SHARE) | ((drawn == drawn.amin(1, keepdim=True)) & (drawn < 1))

    def subset(self, rows: Tensor) -> TokenSplit:
        """The samples at these rows, with the numbers they had."""
        lengths = self.lengths[rows]
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        shift = torch.repeat_interleave(self.starts[rows] - starts[:-1], lengths)
        places = torch.arange(len(shift)) + shift
        tags = None if self.tags is None else self.tags[places]
        return TokenSplit(self.ids[places], starts, self.targets[rows], self.tokens, self.index[rows], tags, self.asks)

    def labelled(self, targets: Tensor, index: Tensor | None = None) -> TokenSplit:
        """The same texts with other targets, and other numbers where given."""
        index = self.index if index is None else index
        return TokenSplit(self.ids, self.starts, targets, self.tokens, index, self.tags, self.asks)

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
        targets = torch.cat([s.targets for s in splits])
        tags = None if splits[0].tags is None else torch.cat([_tags_of(s) for s in splits])
        return cls(torch.cat([s.ids for s in splits]), starts, targets, first, tags=tags, asks=splits[0].asks)

    def fingerprint(self) -> str:
        """SHA-256 over numbers, lengths and targets, and what the numbers mean."""
        digest = hashlib.sha256(repr(self.tokens).encode())
        for values in (self.ids, self.starts, self.targets, *([] if self.tags is None else [self.tags])):
            digest.update(np.ascontiguousarray(values.numpy()).data)
        if self.asks != "targets":
            digest.update(self.asks.encode())
        return digest.hexdigest()


def _tags_of(split: TokenSplit) -> Tensor:
    """The classes of a split's tokens, IGNORE where it has none."""
    return torch.full_like(split.ids, IGNORE) if split.tags is None else split.tags


def kept_encoding(
    way: str, texts: Sequence[str], tokens: TokenInput, encode: Callable[[], Sequence[Sequence[int]]]
) -> list[NDArray[np.int32]]:
    """The numbers of each of some texts: from the file that an earlier call left, where that is whole, else encoded.

    way: names how `encode` makes numbers of a text; a file of one way is none of another.
    """
    digest = hashlib.sha256(f"{way} {tokens!r}".encode())
    for text in texts:
        digest.update(text.encode() + b"\0")
    place = runs.cache_home() / "texts" / f"{digest.hexdigest()[:32]}.npz"
    try:
        with np.load(place, allow_pickle=False) as kept:
            return np.split(kept["ids"], kept["ends"][:-1])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        pass
    encoded = [np.asarray(ids, np.int32) for ids in encode()]
    with suppress(OSError), runs.writing(place) as file:  # a cache that cannot be written costs time alone
        np.savez_compressed(file, ids=np.concatenate(encoded), ends=np.cumsum([len(ids) for ids in encoded]))
    return encoded
