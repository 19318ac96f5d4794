"""What a store keeps of a teacher's signals, and in which form.

N samples, C classes, k kept classes.
    logits                              (N, C), of tokens (N, L, C), in fp16 or fp32
    top_values, top_indices, rest       instead of logits, with `top_k`: the k largest logits (..., k), their classes,
                                        and the log-sum-exp (...) of all others in fp32
    tap:<path>                          the feature at a tap (N, ...), in fp16 or fp32

A batch of texts is as long as the longest of them, so logits and features of their tokens, (N, L, D) and
(N, heads, L, L), lie at the length of the longest text that there can be, with zeros for padding, and are given back at
that of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdctl.errors import ConfigError, Problem
from kdctl.signals import Signals, TokenInput

TOP = ("top_values", "top_indices", "rest")


@dataclass(frozen=True)
class Contents:
    """What is kept: logits (of the top_k classes alone, or of all), features at taps; dtype: fp16 or fp32.

    tokens: what the texts are made of that the outputs are of; None of images.
    """

    logits: bool
    top_k: int | None
    taps: tuple[str, ...]
    dtype: str
    num_classes: int
    tokens: TokenInput | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The fields of a row."""
        return (*self.names_of((), True), *(f"tap:{tap}" for tap in self.taps))

    def names_of(self, taps: Collection[str], logits: bool) -> tuple[str, ...]:
        """The fields that hold these features, and the logits if wanted."""
        kept = () if not (logits and self.logits) else ("logits",) if self.top_k is None else TOP
        return (*kept, *(f"tap:{tap}" for tap in taps))

    def holds(self, taps: Collection[str], logits: bool) -> bool:
        """Whether all that is asked for is kept."""
        return (self.logits or not logits) and set(taps) <= set(self.taps)

    def numpy_dtype(self, name: str) -> str:
        """How a field lies on the disk."""
        if name == "top_indices":
            return "<u2" if self.num_classes <= 1 << 16 else "<i4"
        return "<f4" if name == "rest" or self.dtype == "fp32" else "<f2"

    def to_dict(self) -> dict[str, Any]:
        """The part of a store's key that says what it keeps."""
        return {"logits": self.logits, "top_k": self.top_k, "taps": list(self.taps), "dtype": self.dtype}

    def encode(self, signals: Signals, inputs: Tensor | None = None) -> dict[str, Tensor]:
        """The fields of a batch, on its device; inputs: the batch's. Raises ConfigError where logits cannot be cut to
        their largest."""
        fields = {f"tap:{tap}": self._rounded(self._widened(signals.features[tap], inputs)) for tap in self.taps}
        if not self.logits:
            return fields
        if self.top_k is None:
            return {"logits": self._rounded(self._widened(signals.logits, inputs))} | fields
        logits = signals.logits.float()
        if logits.shape[-1] != self.num_classes:
            message = f"top_k keeps the largest of {self.num_classes} logits a sample; these are {tuple(logits.shape)}"
            raise ConfigError(Problem(message, key="teacher_cache.top_k", hint="leave top_k out"))
        values, indices = logits.topk(self.top_k, dim=-1)
        rest = logits.scatter(-1, indices, -math.inf).logsumexp(-1, keepdim=True)
        kept = (self._rounded(self._widened(values, inputs)), self._widened(indices, inputs))
        return dict(zip(TOP, (*kept, self._widened(rest, inputs).squeeze(-1)), strict=True)) | fields

    def _rounded(self, values: Tensor) -> Tensor:
        return values.to(torch.float16 if self.dtype == "fp16" else torch.float32)

    def _widened(self, feature: Tensor, inputs: Tensor | None) -> Tensor:
        """A feature of tokens at full length, zero where there is padding; another one as it is."""
        if self.tokens is None or inputs is None:
            return feature
        padded, more = ~self.tokens.is_text(inputs), self.tokens.length - inputs.shape[1]
        axes = _token_axes(feature, inputs.shape[1])
        for axis in axes:
            shape = [len(padded), *(inputs.shape[1] if a == axis else 1 for a in range(1, feature.ndim))]
            feature = feature.masked_fill(padded.view(shape), 0)
        return F.pad(feature, {0: (), 1: (0, 0, 0, more), 2: (0, more, 0, more)}[len(axes)])

    def _narrowed(self, feature: Tensor, inputs: Tensor | None) -> Tensor:
        """A feature of tokens at the length of the batch."""
        if self.tokens is None or inputs is None:
            return feature
        for axis in _token_axes(feature, self.tokens.length):
            feature = feature.narrow(axis, 0, inputs.shape[1])
        return feature

    def decode(
        self, fields: dict[str, Tensor], inputs: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Logits (None where their fields are not given) and features by tap, in float32. inputs: the batch's.

        The classes outside the top k share the rest's mass evenly: at temperature 1 the probabilities of the k classes
        and the sum of all others are exact. At T > 1 that sum comes out too large and at T < 1 too small, the more the
        others differ among themselves.
        """
        taps = {name[4:]: values for name, values in fields.items() if name.startswith("tap:")}
        features = {tap: self._narrowed(values, inputs).float() for tap, values in taps.items()}
        if "logits" in fields:
            return self._narrowed(fields["logits"], inputs).float(), features
        if "rest" not in fields:
            return None, features
        kept = (fields["top_values"].float(), fields["top_indices"].long(), fields["rest"].unsqueeze(-1))
        values, indices, rest = (self._narrowed(field, inputs) for field in kept)
        spread = (rest - math.log(self.num_classes - values.shape[-1])).expand(*rest.shape[:-1], self.num_classes)
        return spread.scatter(-1, indices, values), features


def _token_axes(feature: Tensor, length: int) -> tuple[int, ...]:
    """The axes of a feature that are a text's tokens: of states (N, L, D), of attention maps (N, heads, L, L)."""
    axes = {3: (1,), 4: (2, 3)}.get(feature.ndim, ())
    return axes if all(feature.shape[axis] == length for axis in axes) else ()
