"""MobileNetV2 for small images, in the distillation literature's form.

It differs from the ImageNet net: the stage of 24 channels keeps the resolution, the first block has an expansion
convolution too, widths are cut off and not rounded to multiples of eight, and there is no dropout. Maps of 32x32 images
end as 2x2.

Taps:
    conv1                            the stem, after its ReLU (conv1.conv, conv1.bn, conv1.relu inside)
    layer1 .. layer7                 stage outputs: linear, so they are their own pre-activations
    layer<i>.<j>.branch.relu1 / relu2    inside a block: after the expansion and after the depthwise convolution
    conv2                            the last 1x1 convolution, after its ReLU (conv2.relu:in before it)
    pool, flatten                    the embedding, (N, 1280, 1, 1) and (N, 1280)
    fc                               the logits
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from kdctl.config.types import Positive
from kdctl.errors import ConfigError, Problem
from kdctl.models.layers import Add, conv, head, initialise

STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels at width 1, blocks, stride of the first block."""


def _conv_bn_relu(channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=conv(channels, out_channels, kernel, stride),
            bn=nn.BatchNorm2d(out_channels),
            relu=nn.ReLU(inplace=True),
        )
    )


class InvertedResidual(nn.Module):
    """Expand by a 1x1 convolution, filter depthwise, project linearly; a shortcut where the shape stays."""

    def __init__(self, channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.branch = nn.Sequential(
            OrderedDict(
                conv1=conv(channels, inner, 1),
                bn1=nn.BatchNorm2d(inner),
                relu1=nn.ReLU(inplace=True),
                conv2=conv(inner, inner, 3, stride, groups=inner),
                bn2=nn.BatchNorm2d(inner),
                relu2=nn.ReLU(inplace=True),
                conv3=conv(inner, out_channels, 1),
                bn3=nn.BatchNorm2d(out_channels),
            )
        )
        self.add = Add() if stride == 1 and channels == out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) if self.add is None else self.add(self.branch(x), x)


class MobileNetV2(nn.Sequential):
    """MobileNetV2 for 32x32 images; half width (812,836 parameters with 100 classes) is the literature's "MobileNetV2".

    width: factor on all channels but the last 1,280, which only grow.
    Source: Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018.
    """

    def __init__(self, *, width: Positive = 0.5, num_classes: int, in_channels: int = 3) -> None:
        if width * 16 < 1:
            raise ConfigError(Problem(f"width {width} leaves a stage without channels", key="width", hint=">= 0.0625"))
        channels = int(32 * width)
        last = max(1280, int(1280 * width))
        parts: OrderedDict[str, nn.Module] = OrderedDict(conv1=_conv_bn_relu(in_channels, channels, 3, stride=2))
        for stage, (expansion, stage_channels, length, stage_stride) in enumerate(STAGES, start=1):
            blocks: list[nn.Module] = []
            for position in range(length):
                stride = stage_stride if position == 0 else 1
                blocks.append(InvertedResidual(channels, int(stage_channels * width), stride, expansion))
                channels = int(stage_channels * width)
            parts[f"layer{stage}"] = nn.Sequential(*blocks)
        parts["conv2"] = _conv_bn_relu(channels, last, 1)
        super().__init__(parts | head(last, num_classes))
        initialise(self, linear_std=0.01)
