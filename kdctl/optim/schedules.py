"""Schedules: what multiplies the learning rate at a step, and what a loss term weighs at a moment.

Both are pure functions of progress, so they have no state to save and a resumed run follows the same curve.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

from kdctl.config.types import Fraction, NonNegative, Positive
from kdctl.errors import ConfigError


class Schedule:
    """The factor of the learning rate: a linear rise over the first `warmup_epochs`, then a curve of one's own."""

    def __init__(self, *, warmup_epochs: NonNegative = 0.0) -> None:
        self.warmup_epochs = warmup_epochs

    def factor(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        """What multiplies the learning rate at `step` (from 0) of `total_steps`.

        In a warm-up of w steps, step i has (i + 1) / w. A warm-up longer than the run is cut to it.
        """
        warmup = min(round(self.warmup_epochs * steps_per_epoch), total_steps)
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(total_steps - warmup, 1)
        return self.curve(min(progress, 1.0), step / steps_per_epoch)

    def curve(self, progress: float, epoch: float) -> float:
        """The factor after warm-up. progress: 0 at its end, 1 at the end of the run; epoch: fractional, from 0."""
        raise NotImplementedError


class Constant(Schedule):
    """The same learning rate throughout, after an optional warm-up."""

    def curve(self, progress: float, epoch: float) -> float:
        return 1.0


class Cosine(Schedule):
    """Half a cosine from the full learning rate to min_factor of it (Loshchilov & Hutter, ICLR 2017, no restarts)."""

    def __init__(self, *, warmup_epochs: NonNegative = 0.0, min_factor: Fraction = 0.0) -> None:
        super().__init__(warmup_epochs=warmup_epochs)
        self.min_factor = min_factor

    def curve(self, progress: float, epoch: float) -> float:
        return _cosine(1.0, self.min_factor, progress)


class Linear(Schedule):
    """A straight line from the full learning rate to min_factor of it."""

    def __init__(self, *, warmup_epochs: NonNegative = 0.0, min_factor: Fraction = 0.0) -> None:
        super().__init__(warmup_epochs=warmup_epochs)
        self.min_factor = min_factor

    def curve(self, progress: float, epoch: float) -> float:
        return 1.0 + (self.min_factor - 1.0) * progress


class MultiStep(Schedule):
    """Multiplied by gamma at each milestone: after that many epochs, counted from the start of the run."""

    def __init__(self, *, milestones: list[Positive], gamma: Fraction = 0.1, warmup_epochs: NonNegative = 0.0) -> None:
        super().__init__(warmup_epochs=warmup_epochs)
        self.milestones = sorted(milestones)
        self.gamma = gamma

    def curve(self, progress: float, epoch: float) -> float:
        return self.gamma ** bisect_right(self.milestones, epoch)


class OneCycle(Schedule):
    """Up from start_factor to the full learning rate over the share `rise` of the run, then down to min_factor.

    Both along cosines (Smith & Topin, 2018; the learning rate alone, momentum stays).
    """

    def __init__(self, *, rise: Fraction = 0.3, start_factor: Fraction = 0.04, min_factor: Fraction = 0.000004) -> None:
        super().__init__()
        self.rise = rise
        self.start_factor = start_factor
        self.min_factor = min_factor

    def curve(self, progress: float, epoch: float) -> float:
        if progress < self.rise:
            return _cosine(self.start_factor, 1.0, progress / self.rise)
        return _cosine(1.0, self.min_factor, (progress - self.rise) / max(1.0 - self.rise, 1e-12))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def curve_at(value: float | Mapping[Any, float], epoch: float, steps_per_epoch: int = 1) -> float:
    """A number, or what a map {moment: number} says after `epoch` (fractional) epochs: linear between its moments and
    constant outside. A moment is a number of epochs, or the text `500 steps`."""
    if not isinstance(value, Mapping):
        return float(value)
    if not value:
        raise ConfigError("a schedule needs at least one moment", hint="for example {0: 0, 5: 1000}")
    points = sorted((_epochs(moment, steps_per_epoch), float(number)) for moment, number in value.items())
    moments = [moment for moment, _ in points]
    right = bisect_right(moments, epoch)
    if right in (0, len(moments)):
        return points[min(right, len(moments) - 1)][1]
    (start, before), (end, after) = points[right - 1], points[right]
    return before + (after - before) * (epoch - start) / (end - start)


def _epochs(moment: float | str, steps_per_epoch: int) -> float:
    return int(moment.removesuffix(" steps")) / steps_per_epoch if isinstance(moment, str) else float(moment)


class WeightSchedule:
    """The weight of a loss term: a number, or {moment: number}, linear in between (`curve_at`)."""

    def __init__(self, weight: float | Mapping[Any, float], steps_per_epoch: int = 1) -> None:
        self.weight, self.steps_per_epoch = weight, steps_per_epoch
        curve_at(weight, 0.0)

    def at(self, epoch: float) -> float:
        """The weight after `epoch` (fractional) epochs."""
        return curve_at(self.weight, epoch, self.steps_per_epoch)
