"""What a store keeps of a teacher's signals, and in which form.

N samples, C classes, k kept classes.
    logits                              (N, C), in fp16 or fp32
    top_values, top_indices, rest       instead of logits, with `top_k`: the k largest logits (N, k), their classes, and
                                        the log-sum-exp (N,) of all others in fp32
    tap:<path>                          the feature at a tap (N, ...), in fp16 or fp32
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdctl.errors import ConfigError, Problem
from kdctl.signals import Signals

TOP = ("top_values", "top_indices", "rest")


@dataclass(frozen=True)
class Contents:
    """What is kept: logits (of the top_k classes alone, or of all), features at taps; dtype: fp16 or fp32."""

    logits: bool
    top_k: int | None
    taps: tuple[str, ...]
    dtype: str
    num_classes: int

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

    def encode(self, signals: Signals) -> dict[str, Tensor]:
        """The fields of a batch, on its device. Raises ConfigError where logits cannot be cut to their largest."""
        fields = {f"tap:{tap}": self._rounded(signals.features[tap]) for tap in self.taps}
        if not self.logits:
            return fields
        if self.top_k is None:
            return {"logits": self._rounded(signals.logits)} | fields
        logits = signals.logits.float()
        if logits.shape[1:] != (self.num_classes,):
            message = f"top_k keeps the largest of {self.num_classes} logits a sample; these are {tuple(logits.shape)}"
            raise ConfigError(Problem(message, key="teacher_cache.top_k", hint="leave top_k out"))
        values, indices = logits.topk(self.top_k, dim=1)
        rest = logits.scatter(1, indices, -math.inf).logsumexp(1)
        kept = (self._rounded(values), indices, rest)
        return dict(zip(TOP, kept, strict=True)) | fields

    def _rounded(self, values: Tensor) -> Tensor:
        return values.to(torch.float16 if self.dtype == "fp16" else torch.float32)

    def decode(self, fields: dict[str, Tensor]) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Logits (None where their fields are not given) and features by tap, in float32.

        The classes outside the top k share the rest's mass evenly: at temperature 1 the probabilities of the k classes
        and the sum of all others are exact. At T > 1 that sum comes out too large and at T < 1 too small, the more the
        others differ among themselves.
        """
        features = {name[4:]: values.float() for name, values in fields.items() if name.startswith("tap:")}
        if "logits" in fields:
            return fields["logits"].float(), features
        if "rest" not in fields:
            return None, features
        values, indices = fields["top_values"].float(), fields["top_indices"].long()
        others = self.num_classes - values.shape[1]
        spread = (fields["rest"] - math.log(others))[:, None].expand(-1, self.num_classes)
        return spread.scatter(1, indices, values), features
