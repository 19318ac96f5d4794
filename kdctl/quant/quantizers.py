"""What rounds a tensor to few levels in training: with steps that are learned, or with ranges that follow the data.

Values are rounded in fp32 (float64 stays float64), whatever precision they come in; gradients pass straight through the
rounding, and stop where a value is clipped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kdctl.quant.ranges import weight_scales

_LEAST = 1e-8
"""No step is smaller: a learned one may not pass through zero."""
_SLACK = 1e-4
"""By how much of a step a value may lie outside and not count as clipped: the largest weight, divided by the step that
makes it the last level, does by rounding."""
_KEPT = 0.99
"""How much of a followed range a batch leaves as it is."""
_FIRST_HIGH = 8.0
"""The range of an input that was not calibrated yet is [-8, 8]."""


class _Rounded(torch.autograd.Function):
    """y = s clamp(round(x / s), -z, top - z), where z = clamp(round(-offset / s), 0, top) or a given number.

    With v = x / s and q its level: dy/dx is 1 where v is not clipped, else 0; dy/ds is q - v inside, and outside q,
    without offset (Esser et al., 2020, equations 2 and 3), or 0 and top, with one (Bhalgat et al., 2020, whose grid
    begins at the offset; here it is moved so that zero is a level); dy/doffset is 0 inside and 1 outside. The last two
    are summed over what shares a step and multiplied by `scale`. An offset of 0 or above has no gradient, so that the
    range of an input without negative values keeps all its levels above zero.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, offset: Tensor | None, zero: int, top: int, scale: float) -> Tensor:
        ctx.save_for_backward(x, step, offset)
        ctx.zero, ctx.top, ctx.scale = zero, top, scale
        s, lowest, highest = _grid(step, offset, zero, top)
        return (x / s).round_().clamp_(lowest, highest).mul_(s)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, step, offset = ctx.saved_tensors
        s, lowest, highest = _grid(step, offset, ctx.zero, ctx.top)
        v = x / s
        # A mask of numbers: torch.where and products with truth values take several times as long on a CPU.
        inside = (v >= lowest - _SLACK).logical_and_(v <= highest + _SLACK).to(v.dtype)
        by_x = gradient * inside
        by_step = by_offset = None
        if ctx.needs_input_grad[1]:
            q = v.round().clamp_(lowest, highest)
            by_step = q.sub_(v.mul_(inside)).mul_(gradient).sum_to_size(step.shape) * ctx.scale
        if offset is not None and ctx.needs_input_grad[1]:
            clipped = (gradient - by_x).sum_to_size(offset.shape) * ctx.scale
            by_step = by_step - lowest * clipped
            by_offset = clipped * (offset < 0)
        return by_x, by_step, by_offset, None, None, None


def _grid(step: Tensor, offset: Tensor | None, zero: int, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """The step, and the lowest and highest level."""
    s = step.clamp_min(_LEAST)
    z = torch.full_like(s, zero) if offset is None else (-offset / s).round().clamp(0, top)
    return s, -z, top - z


def rounded(
    x: Tensor, step: Tensor, *, zero: int, top: int, offset: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """x on a grid of top + 1 levels, `zero` of them below zero; with an offset, as many as it takes to reach that.

    step, offset: shaped to meet x. scale: of the gradient of both, which is that of the learned step size.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    moved = None if offset is None else offset.to(wide.dtype)
    return _Rounded.apply(wide, step.to(wide.dtype), moved, zero, top, scale).to(x.dtype)


# -------------------------------------------------------------------------------------------------------------- weights


class WeightQuantizer(nn.Module):
    """Rounds the weights (C, ...) of a layer to the levels -(2^(bits-1) - 1) .. 2^(bits-1) - 1 times a step."""

    def __init__(self, bits: int, per_channel: bool, weight: Tensor) -> None:
        super().__init__()
        self.bits = bits
        self.per_channel = per_channel
        self.top = 2 ** (bits - 1) - 1

    def step_of(self, weight: Tensor) -> Tensor:
        """The step: (C,), or (1,) for the whole tensor."""
        raise NotImplementedError

    def used_step(self, weight: Tensor) -> Tensor:
        """The step that `forward` rounds with, above zero where the learned one is not; shaped as `step_of`."""
        return self.step_of(weight).clamp_min(_LEAST)

    def fit(self, weight: Tensor, search: bool) -> None:
        """Takes the step from the weights: by the largest of them or, with `search`, by the least square error."""

    def forward(self, weight: Tensor) -> Tensor:
        step = self.step_of(weight).view(-1, *[1] * (weight.ndim - 1))
        scale = (weight.numel() / step.numel() * self.top) ** -0.5
        return rounded(weight, step, zero=self.top, top=2 * self.top, scale=scale)

    def _rows(self, weight: Tensor) -> Tensor:
        return weight.detach().flatten(1) if self.per_channel else weight.detach().flatten()[None]


class LearnedWeights(WeightQuantizer):
    """The step is learned, its gradient multiplied by 1 / sqrt(N top), N the weights that share it (Esser et al.,
    Learned Step Size Quantization, ICLR 2020); it begins at 2 mean|w| / sqrt(top)."""

    def __init__(self, bits: int, per_channel: bool, weight: Tensor) -> None:
        super().__init__(bits, per_channel, weight)
        mean = self._rows(weight).float().abs().mean(1)
        self.step = nn.Parameter(torch.where(mean > 0, 2 * mean * self.top**-0.5, 1.0))

    def step_of(self, weight: Tensor) -> Tensor:
        return self.step

    @torch.no_grad()
    def fit(self, weight: Tensor, search: bool) -> None:
        found = weight_scales(self._rows(weight).float().cpu().numpy(), self.bits, search)
        self.step.copy_(torch.from_numpy(found))


class LargestWeights(WeightQuantizer):
    """The largest magnitude has the last level, at every step anew (Jacob et al., Quantization and Training of Neural
    Networks for Efficient Integer-Arithmetic-Only Inference, CVPR 2018)."""

    def step_of(self, weight: Tensor) -> Tensor:
        largest = self._rows(weight).abs().amax(1)
        return torch.where(largest > _LEAST * self.top, largest / self.top, 1.0)


# --------------------------------------------------------------------------------------------------------------- inputs


class InputQuantizer(nn.Module):
    """Rounds the input (N, ...) of a layer to 2^bits levels, zero among them.

    watch: while it is set, it is shown the input as a numpy array of fp32, and nothing is rounded.
    """

    watch: Callable[[NDArray[np.float32]], None] | None = None

    def __init__(self, bits: int, symmetric: bool) -> None:
        super().__init__()
        self.bits = bits
        self.symmetric = symmetric
        self.top = 2**bits - 1
        self.middle = 2 ** (bits - 1)

    def set_range(self, low: float, high: float) -> None:
        """Takes a range [low, high], low <= 0 <= high; one of no width becomes [0, 1]."""
        raise NotImplementedError

    def grid(self) -> tuple[Tensor, Tensor | None]:
        """The step (1,), and where the range begins (1,); None where it is symmetric."""
        raise NotImplementedError

    def range(self) -> tuple[float, float]:
        """[low, high] of the levels: both are whole multiples of (high - low) / (2^bits - 1)."""
        step, offset = self.grid()
        s, lowest, highest = (float(value.detach()) for value in _grid(step, offset, self.middle, self.top))
        return lowest * s, highest * s

    def forward(self, x: Tensor) -> Tensor:
        if self.watch is not None:
            self.watch(x.detach().float().cpu().numpy())
            return x
        step, offset = self.grid()
        scale = (max(x[:1].numel(), 1) * self.top) ** -0.5
        return rounded(x, step, zero=self.middle, top=self.top, offset=offset, scale=scale)

    def _step(self, low: float, high: float) -> float:
        if self.symmetric:
            return max(-low / self.middle, high / (self.top - self.middle)) or 1 / self.top
        return (high - low) / self.top or 1 / self.top


class LearnedInputs(InputQuantizer):
    """Step and offset are learned (Esser et al., ICLR 2020; Bhalgat et al., LSQ+: Improving Low-bit Quantization
    through Learnable Offsets and Better Initialization, CVPR workshops 2020). Both gradients are multiplied by
    1 / sqrt(N top), N the numbers in the input of one sample."""

    def __init__(self, bits: int, symmetric: bool) -> None:
        super().__init__(bits, symmetric)
        self.step = nn.Parameter(torch.empty(1))
        self.offset = None if symmetric else nn.Parameter(torch.empty(1))
        self.set_range(-_FIRST_HIGH, _FIRST_HIGH)

    @torch.no_grad()
    def set_range(self, low: float, high: float) -> None:
        self.step.fill_(self._step(low, high))
        if self.offset is not None:
            self.offset.fill_(low)

    def grid(self) -> tuple[Tensor, Tensor | None]:
        return self.step, self.offset


class FollowedInputs(InputQuantizer):
    """The range follows the extremes of the batches: each batch in train mode moves it by a hundredth of the way (Jacob
    et al., CVPR 2018). observing: whether it still does."""

    low: Tensor
    high: Tensor
    observing: bool = True

    def __init__(self, bits: int, symmetric: bool) -> None:
        super().__init__(bits, symmetric)
        self.register_buffer("low", torch.full((1,), -_FIRST_HIGH))
        self.register_buffer("high", torch.full((1,), _FIRST_HIGH))

    @torch.no_grad()
    def set_range(self, low: float, high: float) -> None:
        self.low.fill_(low)
        self.high.fill_(high)

    def grid(self) -> tuple[Tensor, Tensor | None]:
        if self.symmetric:
            width = torch.maximum(-self.low / self.middle, self.high / (self.top - self.middle))
        else:
            width = (self.high - self.low) / self.top
        return torch.where(width > _LEAST, width, 1 / self.top), None if self.symmetric else self.low

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.observing and self.watch is None:
            self._follow(x.detach().float())
        return super().forward(x)

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        low, high = torch.aminmax(x)
        self.low.lerp_(low.clamp_max(0).view(1), 1 - _KEPT)
        self.high.lerp_(high.clamp_min(0).view(1), 1 - _KEPT)
