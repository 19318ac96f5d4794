"""Wide residual networks: batch norm and ReLU come before each convolution.

Taps:
    conv1                            the stem
    layer1, layer2, layer3           stage outputs: sums that no batch norm or ReLU has seen yet
    layer2.0.bn1, layer3.0.bn1, bn1  the three stage outputs after batch norm, before the ReLU (pre-activation)
    layer2.0.relu1, layer3.0.relu1, relu   the same after the ReLU
    layer<i>.<j>.add                 a block's output (the same tensor as layer<i>.<j>)
    pool, flatten                    the embedding, (N, C, 1, 1) and (N, C)
    fc                               the logits
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from kdctl.config.types import Fraction, PositiveInt
from kdctl.errors import ConfigError, Problem
from kdctl.models.layers import Add, conv, head, initialise


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU; where the width changes, the shortcut is a convolution."""

    def __init__(self, channels: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = conv(channels, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = conv(width, width, 3)
        self.shortcut = conv(channels, width, 1, stride) if channels != width else None
        self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu1(self.bn1(x))
        branch = self.relu2(self.bn2(self.conv1(activated)))
        branch = self.conv2(self.dropout(branch))
        return self.add(branch, x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Sequential):
    """Wide residual network WRN-depth-width for 32x32 images: three stages of (depth - 4) / 6 blocks.

    depth: 6n + 4. width: the widening factor k; stages have 16k, 32k and 64k channels. dropout: between the two
    convolutions of a block.
    Source: Zagoruyko & Komodakis, Wide Residual Networks, BMVC 2016.
    """

    def __init__(
        self,
        *,
        depth: PositiveInt,
        width: PositiveInt = 1,
        dropout: Fraction = 0.0,
        num_classes: int,
        in_channels: int = 3,
    ) -> None:
        if depth < 10 or (depth - 4) % 6:
            raise ConfigError(Problem(f"depth {depth} is not 6n + 4", key="depth", hint="10, 16, 22, 28, 40"))
        parts: OrderedDict[str, nn.Module] = OrderedDict(conv1=conv(in_channels, 16, 3))
        channels = 16
        for stage in range(3):
            blocks: list[nn.Module] = []
            for position in range((depth - 4) // 6):
                stride = 2 if stage > 0 and position == 0 else 1
                blocks.append(PreActivationBlock(channels, (16 * width) << stage, stride, dropout))
                channels = (16 * width) << stage
            parts[f"layer{stage + 1}"] = nn.Sequential(*blocks)
        parts |= OrderedDict(bn1=nn.BatchNorm2d(channels), relu=nn.ReLU(inplace=True))
        super().__init__(parts | head(channels, num_classes))
        initialise(self)
        nn.init.zeros_(self.get_parameter("fc.bias"))
