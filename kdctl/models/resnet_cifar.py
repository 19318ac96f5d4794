"""Residual networks for small images, as the distillation literature uses them.

Taps, for block j of stage i (both kinds of block):
    conv1, bn1, relu                 the stem
    layer1 .. layer3 (or layer4)     stage outputs, after the ReLU
    layer<i>.<j>                     a block's output, after the ReLU (the same tensor as layer<i>.<j>.relu)
    layer<i>.<j>.add                 a block's sum before its ReLU; the stage's last j is its pre-activation output
    layer<i>.<j>.bn2 (bn3)           the branch before the sum (bn3 in bottleneck blocks)
    pool, flatten                    the embedding, (N, C, 1, 1) and (N, C)
    fc                               the logits
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from kdctl.config.types import PositiveInt
from kdctl.errors import ConfigError, Problem
from kdctl.models.layers import Add, conv, head, initialise

Shortcut = Literal["conv", "pad"]


class PadShortcut(nn.Module):
    """Takes every stride-th pixel and pads the new channels with zeros, half on each side: no parameters."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        before = (out_channels - channels) // 2
        self.padding = (0, 0, 0, 0, before, out_channels - channels - before)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


def _shortcut(kind: Shortcut, channels: int, out_channels: int, stride: int) -> nn.Module:
    if stride == 1 and channels == out_channels:
        return nn.Identity()
    if kind == "pad":
        return PadShortcut(channels, out_channels, stride)
    return nn.Sequential(conv(channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = conv(channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(shortcut, channels, width, stride)
        self.add = Add()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.relu1(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        return self.relu(self.add(branch, self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; four times as many channels come out as are inside."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = conv(channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = conv(width, width * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.downsample = _shortcut(shortcut, channels, width * self.expansion, stride)
        self.add = Add()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.relu1(self.bn1(self.conv1(x)))
        branch = self.relu2(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        return self.relu(self.add(branch, self.downsample(x)))


class _ResNet(nn.Sequential):
    """A 3x3 stem, stages that each double the width and (but for the first) halve the side, and a classifier."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        lengths: list[int],
        stem: int,
        width: int,
        shortcut: Shortcut,
        num_classes: int,
        in_channels: int,
    ) -> None:
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=conv(in_channels, stem, 3), bn1=nn.BatchNorm2d(stem), relu=nn.ReLU(inplace=True)
        )
        channels = stem
        for stage, length in enumerate(lengths):
            blocks: list[nn.Module] = []
            for position in range(length):
                stride = 2 if stage > 0 and position == 0 else 1
                blocks.append(block(channels, width << stage, stride, shortcut))
                channels = (width << stage) * block.expansion
            parts[f"layer{stage + 1}"] = nn.Sequential(*blocks)
        super().__init__(parts | head(channels, num_classes))
        initialise(self)


class CifarResNet(_ResNet):
    """Residual network for 32x32 images: three stages of (depth - 2) / 6 basic blocks.

    depth: 6n + 2. stem, width: channels of the stem and of the first stage (the x4 nets: 32 and 64).
    shortcut: where the shape changes, `conv` is a 1x1 convolution with batch norm (option B; most of the distillation
    literature), `pad` drops pixels and adds zero channels (option A; the original CIFAR experiments).
    Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2.
    """

    def __init__(
        self,
        *,
        depth: PositiveInt,
        stem: PositiveInt = 16,
        width: PositiveInt = 16,
        shortcut: Literal["conv", "pad"] = "conv",
        num_classes: int,
        in_channels: int = 3,
    ) -> None:
        if depth < 8 or (depth - 2) % 6:
            raise ConfigError(Problem(f"depth {depth} is not 6n + 2", key="depth", hint="8, 14, 20, 32, 44, 56, 110"))
        if shortcut == "pad" and stem > width:
            message = f"shortcut 'pad' cannot narrow a stem of {stem} channels to {width}"
            raise ConfigError(Problem(message, key="stem", hint="shortcut: conv"))
        super().__init__(BasicBlock, [(depth - 2) // 6] * 3, stem, width, shortcut, num_classes, in_channels)


class FourStageResNet(_ResNet):
    """ImageNet's ResNet with a 3x3 stem of stride 1 and no max-pool, as used for CIFAR (23.7 M parameters at depth 50).

    depth: 18 and 34 are made of basic blocks, 50 of bottlenecks. width: channels of the stem and the first stage.
    Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016.
    """

    def __init__(
        self,
        *,
        depth: Literal[18, 34, 50],
        width: PositiveInt = 64,
        shortcut: Literal["conv", "pad"] = "conv",
        num_classes: int,
        in_channels: int = 3,
    ) -> None:
        lengths = [2, 2, 2, 2] if depth == 18 else [3, 4, 6, 3]
        block = Bottleneck if depth == 50 else BasicBlock
        super().__init__(block, lengths, width, width, shortcut, num_classes, in_channels)
