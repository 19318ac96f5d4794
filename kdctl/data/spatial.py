"""Operations that move pixels: crop, flip, cutout, resized crop. Whole batches at once, in exact arithmetic.

Arithmetic is on integers, or in float32 where it is exact, so that pixels do not depend on where they were made.
N images, C channels, H x W pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdctl.config.types import Fraction, NonNegativeInt, Positive, PositiveInt
from kdctl.data.augment import Augmentation
from kdctl.data.base import Shape
from kdctl.data.counter import Draws
from kdctl.errors import ConfigError, Problem

_RATIOS = 4096


class RandomCrop(Augmentation):
    """Zero padding on all sides, then a window at a random place (He et al., CVPR 2016, section 4.2).

    padding: pixels on each side. size: side of the square window; the image's own height and width when left out.
    """

    def __init__(self, *, padding: NonNegativeInt = 4, size: PositiveInt | None = None) -> None:
        self.padding = padding
        self.size = size

    def output_shape(self, shape: Shape) -> Shape:
        channels, height, width = shape
        out = (channels, self.size or height, self.size or width)
        if out[1] > height + 2 * self.padding or out[2] > width + 2 * self.padding:
            message = f"a window of {out[1]}x{out[2]} in images of {height}x{width} with padding {self.padding}"
            raise ConfigError(Problem(f"{message} does not fit", key="data.augment.random_crop"))
        return out

    def _places(self, shape: Shape) -> tuple[int, int]:
        _, height, width = self.output_shape(shape)
        return shape[1] + 2 * self.padding - height + 1, shape[2] + 2 * self.padding - width + 1

    def num_choices(self, shape: Shape) -> int:
        rows, columns = self._places(shape)
        return rows * columns

    def apply(self, images: Tensor, parameters: Tensor) -> Tensor:
        num, channels, height, width = images.shape
        _, out_height, out_width = self.output_shape((channels, height, width))
        rows, columns = self._places((channels, height, width))
        p = self.padding
        tall, wide = height + 2 * p, width + 2 * p
        area = channels * tall * wide
        # In the flat padded batch, moving the window is moving where a sample's run of bytes starts: one copy each.
        # The last run may end past the batch, by as far as a window may move.
        slack = (rows - 1) * wide + columns - 1
        flat = images.new_zeros(num * area + slack)
        flat[: num * area].view(num, channels, tall, wide)[:, :, p : p + height, p : p + width] = images
        top, left = parameters // columns, parameters % columns
        starts = torch.arange(num, device=images.device) * area + top * wide + left
        runs = flat.as_strided(((num - 1) * area + slack + 1, area), (1, 1)).index_select(0, starts)
        return runs.view(num, channels, tall, wide)[:, :, :out_height, :out_width]


class HorizontalFlip(Augmentation):
    """Left and right exchanged with probability p."""

    def __init__(self, *, p: Fraction = 0.5) -> None:
        self.p = p

    def num_choices(self, shape: Shape) -> int:
        return 2 if 0 < self.p < 1 else 1

    def draw(self, draws: Draws, shape: Shape) -> Tensor:
        if self.num_choices(shape) == 2:
            return (draws.uniform() < self.p).long()
        return draws.below(1)

    def apply(self, images: Tensor, parameters: Tensor) -> Tensor:
        if self.p == 0:
            return images
        if self.p == 1:
            return images.flip(3)
        images = images.contiguous()
        chosen = (parameters * 255).to(torch.uint8)[:, None, None, None]
        return images ^ ((images ^ images.flip(3)) & chosen)  # where() is several times slower on bytes


class Cutout(Augmentation):
    """A black square, centred on a random pixel and cut off at the border (DeVries and Taylor, arXiv:1708.04552).

    size: side of the square in pixels; covers fewer near the border.
    """

    def __init__(self, *, size: PositiveInt = 16) -> None:
        self.size = size

    def num_choices(self, shape: Shape) -> int:
        return shape[1] * shape[2]

    def apply(self, images: Tensor, parameters: Tensor) -> Tensor:
        height, width = images.shape[2:]
        rows = self._kept(parameters // width, height)
        columns = self._kept(parameters % width, width)
        return images & (rows[:, None, :, None] | columns[:, None, None, :])

    def _kept(self, centre: Tensor, length: int) -> Tensor:
        """(N, length) uint8: 0 at the positions from size // 2 before the centre on, size of them; 255 elsewhere."""
        offset = torch.arange(length, device=centre.device) - centre[:, None] + self.size // 2
        return ((offset < 0) | (offset >= self.size)).to(torch.uint8) * 255


class RandomResizedCrop(Augmentation):
    """A window of random area and aspect at a random place, resized (Szegedy et al., CVPR 2015, section 6).

    size: side of the square result; the image's own height and width when left out. scale: smallest and largest share
    of the image's area, evenly drawn. ratio: smallest and largest width over height, evenly drawn on a log scale. A
    window that would be higher or wider than the image is cut to it. Bilinear, without antialiasing: meant for results
    that are not much smaller than the window.
    """

    def __init__(
        self,
        *,
        size: PositiveInt | None = None,
        scale: tuple[Positive, Positive] = (0.08, 1.0),
        ratio: tuple[Positive, Positive] = (0.75, 1.3333333333333333),
    ) -> None:
        for name, (low, high) in (("scale", scale), ("ratio", ratio)):
            if low > high or (name == "scale" and high > 1):
                key = f"data.augment.random_resized_crop.{name}"
                allowed = "the smaller number first" + (", at most 1" if name == "scale" else "")
                raise ConfigError(Problem(f"got [{low}, {high}]; allowed: {allowed}", key=key))
        self.size = size
        self.scale = scale
        # Roots of the aspect from a table: logarithms and powers are rounded differently by different devices.
        low, high = math.log(ratio[0]), math.log(ratio[1])
        self._roots = [math.exp((low + (high - low) * (i + 0.5) / _RATIOS) / 2) for i in range(_RATIOS)]

    def output_shape(self, shape: Shape) -> Shape:
        return shape[0], self.size or shape[1], self.size or shape[2]

    def draw(self, draws: Draws, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Top, left, height and width of each window, (N,) int64 pixels."""
        _, height, width = shape
        side = (draws.uniform() * (self.scale[1] - self.scale[0]) + self.scale[0]).mul_(height * width).sqrt_()
        root = torch.tensor(self._roots, dtype=torch.float32, device=side.device)[draws.below(_RATIOS)]
        tall = (side / root).round_().clamp_(1, height).long()
        wide = (side * root).round_().clamp_(1, width).long()
        top = (draws.uniform() * (height - tall + 1)).long()
        left = (draws.uniform() * (width - wide + 1)).long()
        return top, left, tall, wide

    def apply(self, images: Tensor, parameters: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        top, left, tall, wide = parameters
        _, height, width = self.output_shape((images.shape[1], images.shape[2], images.shape[3]))
        rows = _resampled(images.permute(0, 2, 1, 3), top, tall, height)  # (N, H', C, W)
        columns = _resampled(rows.permute(0, 3, 2, 1), left, wide, width)  # (N, W', C, H')
        return columns.permute(0, 2, 3, 1).contiguous()


def _resampled(lines: Tensor, start: Tensor, length: Tensor, size: int) -> Tensor:
    """Lines start .. start + length of (N, L, ...), linearly resampled to `size` of them: uint8 (N, size, ...).

    Lines are copied whole, and blended with weights in 128ths, which keeps products within 16 bits.
    """
    num, total = lines.shape[:2]
    flat = lines.reshape(num * total, -1)
    steps = 2 * torch.arange(size, device=lines.device) + 1
    place = (steps * length[:, None] * 64).div_(size, rounding_mode="floor").sub_(64).clamp_min_(0)
    last = length[:, None] - 1
    upper = torch.minimum(place >> 7, last)
    lower = torch.minimum(upper + 1, last)
    offset = torch.arange(num, device=lines.device)[:, None] * total + start[:, None]
    blend = flat.index_select(0, (lower + offset).flatten()).to(torch.int16)
    base = flat.index_select(0, (upper + offset).flatten()).to(torch.int16)
    blend.sub_(base).mul_((place & 127).to(torch.int16).view(-1, 1)).add_(64).bitwise_right_shift_(7).add_(base)
    return blend.to(torch.uint8).view(num, size, *lines.shape[2:])
