"""ShuffleNet V1 and V2 for small images, in the distillation literature's form: a 1x1 stem and no max-pool.

Taps:
    conv1, bn1, relu                 the stem
    layer1, layer2, layer3           stage outputs, after the ReLU (in V2 also after the shuffle)
    layer<i>.<j>.join                V1: a block's sum or concatenation before its ReLU (pre-activation)
    layer<i>.<j>.branch.bn3          V2: the transformed half of the channels before its ReLU (pre-activation)
    conv2, bn2, relu2                V2: the last 1x1 convolution
    pool, flatten                    the embedding, (N, C, 1, 1) and (N, C)
    fc                               the logits
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn

from kdctl.models.layers import Add, conv, head


class Shuffle(nn.Module):
    """Interleaves the channels of `groups` groups, so that the next grouped convolution sees them all."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        num, channels, height, width = x.shape
        grouped = x.reshape(num, self.groups, channels // self.groups, height, width)
        return grouped.transpose(1, 2).reshape(num, channels, height, width)


class Concat(nn.Module):
    """Two maps side by side, along the channels."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first, second], dim=1)


class ShuffleBlockV1(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; joined with its input by a sum, or where the side halves by
    concatenation with the pooled input."""

    def __init__(self, channels: int, out_channels: int, stride: int, groups: int, first_groups: int) -> None:
        super().__init__()
        branch_channels = out_channels - channels if stride == 2 else out_channels
        inner = branch_channels // 4
        self.branch = nn.Sequential(
            OrderedDict(
                conv1=conv(channels, inner, 1, groups=first_groups),
                bn1=nn.BatchNorm2d(inner),
                relu1=nn.ReLU(inplace=True),
                shuffle=Shuffle(first_groups) if first_groups > 1 else nn.Identity(),
                conv2=conv(inner, inner, 3, stride, groups=inner),
                bn2=nn.BatchNorm2d(inner),
                relu2=nn.ReLU(inplace=True),
                conv3=conv(inner, branch_channels, 1, groups=groups),
                bn3=nn.BatchNorm2d(branch_channels),
            )
        )
        self.shortcut = nn.AvgPool2d(3, 2, 1) if stride == 2 else nn.Identity()
        self.join = Concat() if stride == 2 else Add()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.join(self.branch(x), self.shortcut(x)))


class ShuffleNetV1(nn.Sequential):
    """ShuffleNet V1 for 32x32 images (949,258 parameters with 100 classes): 4, 8 and 4 blocks.

    groups: of the 1x1 convolutions; the paper's widths for 1, 2 and 3 groups.
    Source: Zhang et al., ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices, CVPR 2018.
    """

    def __init__(self, *, groups: Literal[1, 2, 3] = 3, num_classes: int, in_channels: int = 3) -> None:
        width = {1: 144, 2: 200, 3: 240}[groups]
        channels = 24
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=conv(in_channels, channels, 1), bn1=nn.BatchNorm2d(channels), relu=nn.ReLU(inplace=True)
        )
        for stage, length in enumerate((4, 8, 4)):
            blocks: list[nn.Module] = []
            for position in range(length):
                # The stem's 24 channels are too few to be worth grouping.
                first_groups = 1 if stage == 0 and position == 0 else groups
                stride = 2 if position == 0 else 1
                blocks.append(ShuffleBlockV1(channels, width << stage, stride, groups, first_groups))
                channels = width << stage
            parts[f"layer{stage + 1}"] = nn.Sequential(*blocks)
        super().__init__(parts | head(channels, num_classes))


def _branch_v2(channels: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv1=conv(channels, width, 1),
            bn1=nn.BatchNorm2d(width),
            relu1=nn.ReLU(inplace=True),
            conv2=conv(width, width, 3, stride, groups=width),
            bn2=nn.BatchNorm2d(width),
            conv3=conv(width, width, 1),
            bn3=nn.BatchNorm2d(width),
            relu3=nn.ReLU(inplace=True),
        )
    )


class ShuffleBlockV2(nn.Module):
    """Half of the channels pass unchanged, half through 1x1, depthwise 3x3 and 1x1 convolutions; then a shuffle."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = _branch_v2(channels // 2, channels // 2, 1)
        self.join = Concat()
        self.shuffle = Shuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        return self.shuffle(self.join(kept, self.branch(changed)))


class DownBlockV2(nn.Module):
    """Halves the side: two branches that both see all channels; then a shuffle."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        width = out_channels // 2
        self.shortcut = nn.Sequential(
            OrderedDict(
                conv1=conv(channels, channels, 3, 2, groups=channels),
                bn1=nn.BatchNorm2d(channels),
                conv2=conv(channels, width, 1),
                bn2=nn.BatchNorm2d(width),
                relu2=nn.ReLU(inplace=True),
            )
        )
        self.branch = _branch_v2(channels, width, 2)
        self.join = Concat()
        self.shuffle = Shuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(self.join(self.shortcut(x), self.branch(x)))


class ShuffleNetV2(nn.Sequential):
    """ShuffleNet V2 for 32x32 images (1,355,528 parameters with 100 classes at size 1x): 4, 8 and 4 blocks.

    size: the widths of the three stages and of the last convolution, named as in the paper.
    Source: Ma et al., ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design, ECCV 2018.
    """

    def __init__(
        self, *, size: Literal["0.5x", "1x", "1.5x", "2x"] = "1x", num_classes: int, in_channels: int = 3
    ) -> None:
        *widths, last = {
            "0.5x": (48, 96, 192, 1024),
            "1x": (116, 232, 464, 1024),
            "1.5x": (176, 352, 704, 1024),
            "2x": (224, 488, 976, 2048),
        }[size]
        channels = 24
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=conv(in_channels, channels, 1), bn1=nn.BatchNorm2d(channels), relu=nn.ReLU(inplace=True)
        )
        for stage, (width, length) in enumerate(zip(widths, (4, 8, 4), strict=True), start=1):
            unchanged = [ShuffleBlockV2(width) for _ in range(length - 1)]
            parts[f"layer{stage}"] = nn.Sequential(DownBlockV2(channels, width), *unchanged)
            channels = width
        parts |= OrderedDict(conv2=conv(channels, last, 1), bn2=nn.BatchNorm2d(last), relu2=nn.ReLU(inplace=True))
        super().__init__(parts | head(last, num_classes))
