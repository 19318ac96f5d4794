"""Random brightness, contrast and saturation."""

from __future__ import annotations

from torch import Tensor

from kdctl.config.types import Fraction
from kdctl.data import pixels
from kdctl.data.augment import Augmentation
from kdctl.data.base import Shape
from kdctl.data.counter import Draws


class ColorJitter(Augmentation):
    """Brightness, contrast and saturation changed by random factors, in this order (Howard, arXiv:1312.5402).

    Each number x draws its factor evenly from 1 - x .. 1 + x; 0 leaves that property alone.
    """

    def __init__(self, *, brightness: Fraction = 0.4, contrast: Fraction = 0.4, saturation: Fraction = 0.4) -> None:
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation

    def draw(self, draws: Draws, shape: Shape) -> list[Tensor]:
        """The three factors of each sample, (N, 1, 1, 1) float32."""
        ranges = (self.brightness, self.contrast, self.saturation)
        return [(draws.uniform() * (2 * x) + (1 - x))[:, None, None, None] for x in ranges]

    def apply(self, images: Tensor, parameters: list[Tensor]) -> Tensor:
        changes = (
            (pixels.brightness, self.brightness),
            (pixels.contrast, self.contrast),
            (pixels.color, self.saturation),
        )
        for (change, strength), factor in zip(changes, parameters, strict=True):
            if strength:
                images = change(images, factor)
        return images
