"""What one training step sees: a Batch of samples, and the Signals of a model on it.

Shapes: N samples, C classes, H x W pixels, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

IGNORE = -100
"""A target that is not there: an unlabelled sample, a padded token, a void pixel."""
CLEAN = -1
"""The view and the turn of samples that are not augmented."""


@dataclass
class Batch:
    """Samples of one step.

    inputs: what the model takes; images are float (N, C, H, W) in [0, 1].
    targets: the task's labels, IGNORE where there is none; classes (N,) int64, of tokens (N, L), of several (N, C);
        numbers (N,) float32, NaN where there is none.
    index: (N,) int64, the sample's number in its split: keys of augmentation, stores and memory banks.
    view: (N,) int64, which augmented view of the sample this is; -1 is the clean sample.
    keep: None, or a bool mask over the rows of the logits that count (tokens that are not padding).
    split, turn, stream: name the pixels together with `index`. Each sample has one view in a turn: of `fresh` views the
        turn is the epoch, of k or all of them it is the epoch modulo their number; -1 for clean samples. stream tells
        several augmented versions of one view apart.
    """

    inputs: Any
    targets: Tensor
    index: Tensor
    view: Tensor
    keep: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    split: str = "train"
    turn: int = CLEAN
    stream: int = 0
    strong: Any = None
    """The inputs of the same samples in a second, strongly augmented version, where the experiment has one."""

    @property
    def size(self) -> int:
        return int(self.index.shape[0])

    def num_rows(self) -> int | Tensor:
        """How many rows of logits count: samples, or kept tokens."""
        return self.size if self.keep is None else self.keep.sum()

    def labelled(self) -> Tensor:
        """(N,) bool: which samples have a label, of tokens at least one."""
        targets = self.targets.reshape(self.size, -1)
        return (~targets.isnan() if targets.is_floating_point() else targets != IGNORE).any(1)

    def row_labels(self) -> tuple[Tensor, Tensor]:
        """The label of each row of logits (R,) int64, 0 where there is none, and which rows have one (R,) bool."""
        targets = self.targets.reshape(-1)
        if self.keep is not None:
            targets = targets[self.keep.reshape(-1)]
        return targets.clamp_min(0), targets != IGNORE

    def micro_batches(self, parts: int) -> list[Batch]:
        """Micro-batches of nearly equal size, in order; fewer than `parts` when there are fewer samples."""
        if parts == 1:
            return [self]
        positions = torch.arange(self.size).tensor_split(min(parts, self.size))
        return [self.take(slice(int(p[0]), int(p[-1]) + 1)) for p in positions]

    def strongly(self) -> Batch:
        """The same samples in their strongly augmented version."""
        return replace(self, inputs=self.strong, strong=None, stream=1)

    def take(self, rows: slice | Tensor) -> Batch:
        """The samples at these rows."""

        def cut(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: cut(v) for k, v in value.items()}
            return value[rows]

        return replace(
            self,
            inputs=cut(self.inputs),
            strong=None if self.strong is None else cut(self.strong),
            targets=self.targets[rows],
            index=self.index[rows],
            view=self.view[rows],
            keep=None if self.keep is None else self.keep[rows],
            extra=cut(self.extra),
        )


@dataclass(frozen=True)
class TokenInput:
    """What a batch of texts, int64 (N, L), is made of.

    vocab_size: token numbers are below it. length: the longest text. pad: the number behind a text that is shorter than
    its batch's longest. first, separator: the numbers that begin a text and end it, mask: the one that stands for a
    hidden token; None where there is none. pairs: whether a row is two texts, each ended by the separator. tokenizer:
    the hash of what made the numbers.
    """

    vocab_size: int
    length: int
    pad: int
    first: int | None = None
    separator: int | None = None
    mask: int | None = None
    pairs: bool = False
    tokenizer: str = ""

    def is_text(self, tokens: Tensor) -> Tensor:
        """(N, L) bool: which positions are not padding."""
        return tokens != self.pad

    def is_word(self, tokens: Tensor) -> Tensor:
        """(N, L) bool: which positions are neither padding nor a text's first or separating token."""
        found = self.is_text(tokens)
        for number in (self.first, self.separator):
            found = found if number is None else found & (tokens != number)
        return found

    def segments(self, tokens: Tensor) -> Tensor:
        """(N, L) int64: of pairs 1 behind the first separator of a row, up to its padding; else 0."""
        if not self.pairs or self.separator is None:
            return torch.zeros_like(tokens)
        ended = (tokens == self.separator).long()
        return ((ended.cumsum(1) - ended > 0) & self.is_text(tokens)).long()


@dataclass
class Signals:
    """What a loss sees of a model on a batch.

    logits: in the task's shape, classes last but one for maps: (N, C), (N, C, H, W) or (N, L, C) with class_dim 2.
    link: how logits become what is learnt: softmax over classes, one sigmoid a class, or the numbers as they are; of an
        embedding they are its numbers, as many as the model is wide.
    features: the output at each tap.
    keep: mask of the rows that count, None for all.
    """

    logits: Tensor
    link: Literal["softmax", "sigmoid", "identity", "embedding"] = "softmax"
    features: dict[str, Tensor] = field(default_factory=dict)
    keep: Tensor | None = None
    class_dim: int = 1
    members: tuple[Signals, ...] = ()
    """Of several teachers: what each of them says."""
    strong: Signals | None = None
    """The same model on the strongly augmented version of the batch, where there is one."""

    def rows(self) -> Tensor:
        """Logits as rows (R, C) of the samples, pixels or tokens that count, in float32 or better."""
        logits = self.logits if self.logits.dtype == torch.float64 else self.logits.float()
        if logits.ndim > 2:
            logits = logits.movedim(self.class_dim, -1).reshape(-1, logits.shape[self.class_dim])
        return logits if self.keep is None else logits[self.keep.reshape(-1)]

    def map(self, function: Callable[[Tensor], Tensor]) -> Signals:
        """The same signals with a function applied to every tensor."""
        features = {tap: function(value) for tap, value in self.features.items()}
        keep = None if self.keep is None else function(self.keep)
        members = tuple(member.map(function) for member in self.members)
        strong = None if self.strong is None else self.strong.map(function)
        return replace(self, logits=function(self.logits), features=features, keep=keep, members=members, strong=strong)

    def feature(self, tap: str) -> Tensor:
        """The feature at a tap, in float32 or better."""
        value = self.features[tap]
        return value if value.dtype == torch.float64 else value.float()


def find_logits(outputs: Any) -> Any:
    """The logits in what a model returns: the output itself, its `logits`, or the first of a tuple."""
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return outputs["logits"]
    if hasattr(outputs, "logits"):
        return outputs.logits
    return outputs[0] if isinstance(outputs, tuple | list) and outputs else outputs
