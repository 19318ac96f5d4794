"""Sparse training: small weights become zero, more and more of them, and stay zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch

from kdctl.config.types import Fraction, PositiveInt
from kdctl.errors import ConfigError, KdctlError, Problem
from kdctl.methods import masks
from kdctl.methods.base import Parts
from kdctl.methods.distill import Distill
from kdctl.models.record import Model
from kdctl.signals import Batch

_LOOKS = 10
"""How often, at least, the masks grow between begin and end."""


class Sparse(Distill):
    """Training while the smallest weights go, with or without a teacher.

    Formula: after the share x of the way from begin to end the share s (1 - (1 - x)^3) of the weights is zero, the
        smallest by magnitude; what is zero stays zero. N:M: of every M neighbours along the input the N largest stay.
    Paper: Zhu & Gupta, To Prune, or Not to Prune, ICLR 2018 workshop. 2:4: Mishra et al., Accelerating Sparse Deep
        Neural Networks, 2021.
    Published: a look every 100 to 1000 steps.

    The zeros are in the shipped weights. Dense kernels multiply by them all the same: without a runtime for sparse
    weights nothing is faster, and a file is smaller only where it is packed (gzip).

    sparsity: s. pattern: `any`, or N:M, which sets its own sparsity. scope: whether the smallest of all layers together
    go, or of each alike. begin, end: shares of the stage. every: steps between two looks; ten looks there are
    at least. skip: patterns of layers that stay dense. Before `end` no epoch counts as the best one.
    """

    parallel: ClassVar[bool] = False
    shapes_student: ClassVar[bool] = True

    def __init__(
        self,
        *,
        sparsity: Fraction = 0.9,
        pattern: Literal["any", "2:4", "4:8", "1:4"] = "any",
        scope: Literal["global", "layer"] = "global",
        begin: Fraction = 0.0,
        end: Fraction = 0.5,
        every: PositiveInt = 100,
        skip: list[str] | None = None,
    ) -> None:
        if end < begin:
            raise ConfigError(Problem(f"end {end} lies before begin {begin}", key="method.end"))
        self.sparsity, self.pattern, self.scope = sparsity, pattern, scope
        self.begin, self.end, self.every, self.skip = begin, end, every, skip or []
        self._done = 0
        self._reached = False
        self._masks: dict[str, torch.Tensor] = {}

    def assemble(self, parts: Parts) -> None:
        super().assemble(parts)
        self._weights = masks.weights(self.student.net, self.skip, self.pattern)
        self._steps = max(1, parts.epochs * parts.steps_per_epoch)

    def begin_step(self, batch: Batch, epoch: float) -> Batch:
        begin, end = (min(share * self._steps, self._steps - 1) for share in (self.begin, self.end))
        every = min(self.every, max(1, int((end - begin) / _LOOKS)))
        due = self._done >= end or (self._done >= begin and self._done % every == 0)
        if due and not self._reached:
            final = self.sparsity if self.pattern == "any" else 1.0
            now = masks.cubic(final, self._done, begin, end)
            self._masks = masks.magnitude(self._weights, now, self.pattern, self.scope)
            self._reached = self._done >= end
            self._apply()
        self._done += 1
        return super().begin_step(batch, epoch)

    def end_step(self) -> None:
        self._apply()
        super().end_step()

    def averaged(self) -> None:
        self._apply()

    def ready(self) -> bool:
        return self._reached

    @torch.no_grad()
    def _apply(self) -> None:
        for path, mask in self._masks.items():
            self._weights[path].mul_(mask)

    def state_dict(self) -> dict[str, Any]:
        return {"masks": self._masks, "done": self._done, "reached": self._reached}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._masks = {path: mask.to(self._weights[path].device) for path, mask in state["masks"].items()}
        self._done, self._reached = state["done"], state["reached"]

    def finalize(self) -> Model:
        """The student; also averaged weights, when they are loaded into it, get the zeros.

        Raises KdctlError where training ended before the sparsity was reached.
        """
        if not self._reached:
            hint = "a smaller method.end, more epochs or more train.max_minutes"
            raise KdctlError("the training ended before its weights were as sparse as asked for", hint=hint)
        self.student.net.register_load_state_dict_post_hook(lambda *_: self._apply())
        return super().finalize()
