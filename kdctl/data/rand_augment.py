"""RandAugment: a few operations, drawn anew for each image, all of one strength."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from kdctl.config.types import NonNegativeInt, PositiveInt
from kdctl.data import pixels
from kdctl.data.augment import Augmentation
from kdctl.data.base import Shape
from kdctl.errors import ConfigError, Problem, did_you_mean

Change = Callable[[Tensor], Tensor]
Matrix = tuple[float, float, float, float]
_UNIT = 1 << 16
_LARGEST_MAGNITUDE = 30
_MOST_OPS = 5
_IDENTITY: Matrix = (1.0, 0.0, 0.0, 1.0)
_FARTHEST = 150 / 331
"""The longest translation, as a share of the image's side."""


class RandAugment(Augmentation):
    """num_ops random operations in a row on each image, all of one magnitude (Cubuk et al., NeurIPS 2020).

    magnitude: 0..30, 30 the strongest. operations: which are drawn from; the paper's 14 when left out (`invert` is a
    further one). Signed ones (shear, translate, rotate and the enhancements) go either way with equal probability.
    Geometric ones take the nearest pixel and fill with black.
    """

    def __init__(
        self,
        *,
        num_ops: PositiveInt = 2,
        magnitude: NonNegativeInt = 9,
        operations: list[str] | None = None,
    ) -> None:
        for name, value, most in (("num_ops", num_ops, _MOST_OPS), ("magnitude", magnitude, _LARGEST_MAGNITUDE)):
            if value > most:
                key = f"data.augment.rand_augment.{name}"
                raise ConfigError(Problem(f"got {value}; allowed: at most {most}", key=key))
        names = operations if operations is not None else [name for name in CHANGES if name != "invert"]
        unknown = [name for name in names if name not in CHANGES]
        if unknown or not names:
            message = f"got {unknown or names}; allowed: {', '.join(CHANGES)}"
            hint = did_you_mean(str(unknown[0]), CHANGES) if unknown else None
            raise ConfigError(Problem(message, key="data.augment.rand_augment.operations", hint=hint))
        self.num_ops = num_ops
        strength = magnitude / _LARGEST_MAGNITUDE
        signed = [[CHANGES[name](strength, sign) for sign in (1, -1)] for name in names]
        self._changes: list[Change] = [change for pair in signed for change in pair]

    def num_choices(self, shape: Shape) -> int:
        """Ordered picks of num_ops from the operations with their signs; unsigned ones count twice."""
        return len(self._changes) ** self.num_ops

    def apply(self, images: Tensor, parameters: Tensor) -> Tensor:
        for _ in range(self.num_ops):
            images = self._apply_one(images, parameters % len(self._changes))
            parameters = parameters // len(self._changes)
        return images

    def _apply_one(self, images: Tensor, number: Tensor) -> Tensor:
        """Change `number` on each image: the images sorted by it, so that each change sees one block."""
        order = torch.argsort(number, stable=True)
        sizes = torch.zeros(len(self._changes), dtype=torch.int64, device=number.device)
        sizes.scatter_add_(0, number, torch.ones_like(number))
        blocks = images.index_select(0, order).split(sizes.tolist())
        changed = [change(block) for change, block in zip(self._changes, blocks, strict=True) if len(block)]
        result = torch.empty_like(images, memory_format=torch.contiguous_format)
        return result.index_copy_(0, order, torch.cat(changed))


def _warped(images: Tensor, matrix: Matrix, shift: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """Each pixel becomes the nearest one to matrix x (its place from the centre) + shift x (width, height)."""
    height, width = images.shape[2:]
    source = _warp_map(matrix, shift, height, width, images.device)
    flat = torch.nn.functional.pad(images.flatten(2), (0, 1))
    return flat.gather(2, source.expand(*flat.shape[:2], -1)).view(images.shape)


@lru_cache(maxsize=256)
def _warp_map(matrix: Matrix, shift: tuple[float, float], height: int, width: int, device: torch.device) -> Tensor:
    """(H * W,) int64: the flat place each pixel comes from, H * W for one outside; in fixed point, exact anywhere."""
    a, b, c, d = (round(m * _UNIT) for m in matrix)
    # Places are in half pixels from the centre, so that an even and an odd side are both whole numbers.
    y = (2 * torch.arange(height) + 1 - height)[:, None]
    x = (2 * torch.arange(width) + 1 - width)[None, :]
    from_x = (a * x + b * y + round(shift[0] * width) * 2 * _UNIT + width * _UNIT) // (2 * _UNIT)
    from_y = (c * x + d * y + round(shift[1] * height) * 2 * _UNIT + height * _UNIT) // (2 * _UNIT)
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    return torch.where(inside, from_y * width + from_x, height * width).flatten().to(device)


def _rotation(strength: float, sign: int) -> Change:
    angle = math.radians(30 * strength * sign)
    return partial(_warped, matrix=(math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)))


def _enhancement(change: Callable[[Tensor, float], Tensor]) -> Callable[[float, int], Change]:
    return lambda strength, sign: lambda images: change(images, 1 + 0.9 * strength * sign)


def _plain(change: Change) -> Callable[[float, int], Change]:
    return lambda strength, sign: change


CHANGES: dict[str, Callable[[float, int], Change]] = {
    "identity": _plain(lambda images: images),
    "shear_x": lambda strength, sign: partial(_warped, matrix=(1.0, 0.3 * strength * sign, 0.0, 1.0)),
    "shear_y": lambda strength, sign: partial(_warped, matrix=(1.0, 0.0, 0.3 * strength * sign, 1.0)),
    "translate_x": lambda strength, sign: partial(_warped, matrix=_IDENTITY, shift=(_FARTHEST * strength * sign, 0.0)),
    "translate_y": lambda strength, sign: partial(_warped, matrix=_IDENTITY, shift=(0.0, _FARTHEST * strength * sign)),
    "rotate": _rotation,
    "brightness": _enhancement(pixels.brightness),
    "color": _enhancement(pixels.color),
    "contrast": _enhancement(pixels.contrast),
    "sharpness": _enhancement(pixels.sharpness),
    "posterize": lambda strength, sign: lambda images: pixels.posterize(images, 8 - round(4 * strength)),
    "solarize": lambda strength, sign: lambda images: pixels.solarize(images, 255 * (1 - strength)),
    "autocontrast": _plain(pixels.autocontrast),
    "equalize": _plain(pixels.equalize),
    "invert": _plain(pixels.invert),
}
"""name -> (strength 0..1, sign) -> change of a block of images."""
