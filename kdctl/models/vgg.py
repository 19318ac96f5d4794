"""VGG networks with batch norm for small images: five stages and one linear layer.

Taps, for convolution j of stage i:
    layer1 .. layer5                 stage outputs, after the ReLU, before the max-pool
    layer<i>.relu:in                 a stage's output before its last ReLU (pre-activation), at every depth
    layer<i>.bn<j>                   each convolution after batch norm, before its ReLU
    pool1 .. pool3 (pool4)           after the max-pools
    pool, flatten                    the embedding, (N, 512, 1, 1) and (N, 512)
    fc                               the logits
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import nn

from kdctl.models.layers import head, initialise

CHANNELS = (64, 128, 256, 512, 512)
LENGTHS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""Convolutions a stage, by depth."""


def _stage(channels: int, width: int, length: int) -> nn.Sequential:
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for number in range(1, length + 1):
        parts[f"conv{number}"] = nn.Conv2d(channels, width, 3, padding=1)
        parts[f"bn{number}"] = nn.BatchNorm2d(width)
        parts["relu" if number == length else f"relu{number}"] = nn.ReLU(inplace=True)
        channels = width
    return nn.Sequential(parts)


class VGG(nn.Sequential):
    """VGG with batch norm in its CIFAR form.

    pools: max-pools between the five stages; 3 for 32x32 images (the last two stages both see 4x4), 4 for 64x64.
    Source: Simonyan & Zisserman, Very Deep Convolutional Networks for Large-Scale Image Recognition, ICLR 2015; depth 8
    is the distillation literature's own.
    """

    def __init__(
        self,
        *,
        depth: Literal[8, 11, 13, 16, 19],
        pools: Literal[3, 4] = 3,
        num_classes: int,
        in_channels: int = 3,
    ) -> None:
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        channels = in_channels
        for number, (width, length) in enumerate(zip(CHANNELS, LENGTHS[depth], strict=True), start=1):
            parts[f"layer{number}"] = _stage(channels, width, length)
            if number <= pools:
                parts[f"pool{number}"] = nn.MaxPool2d(2)
            channels = width
        super().__init__(parts | head(channels, num_classes))
        initialise(self, linear_std=0.01)
