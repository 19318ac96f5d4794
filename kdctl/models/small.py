"""Small nets for small images: a convolutional net for digits and a multilayer perceptron.

Taps of digits_cnn:
    relu                             the stem, after its ReLU
    layer1, layer2, layer3           stage outputs, after the ReLU
    layer<i>.bn, layer<i>.relu:in    stage outputs before the ReLU (pre-activation)
    pool, flatten                    the embedding, (N, C, 1, 1) and (N, C)
    fc                               the logits
Taps of mlp:
    flatten                          the image as a vector
    layer1, layer2, ...              hidden layers, after the ReLU
    layer<i>.linear, layer<i>.relu:in    hidden layers before the ReLU (pre-activation); the last layer is the embedding
    fc                               the logits
"""

from __future__ import annotations

from collections import OrderedDict
from math import prod

from torch import nn

from kdctl.config.types import PositiveInt
from kdctl.models.layers import conv, head, initialise


class DigitsCNN(nn.Sequential):
    """A stem and three 3x3 convolutions with batch norm, the second of stride 2, for digits of 8x8 or 28x28 pixels.

    width: channels of the first half; the second half has twice as many. With one input channel and ten classes
    width 4 has 1,182 parameters, width 8 has 4,370, width 32 has 65,834.
    """

    def __init__(self, *, width: PositiveInt = 16, num_classes: int, in_channels: int = 1) -> None:
        def stage(channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(
                OrderedDict(
                    conv=conv(channels, out_channels, 3, stride),
                    bn=nn.BatchNorm2d(out_channels),
                    relu=nn.ReLU(inplace=True),
                )
            )

        parts: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=conv(in_channels, width, 3),
            bn1=nn.BatchNorm2d(width),
            relu=nn.ReLU(inplace=True),
            layer1=stage(width, width),
            layer2=stage(width, 2 * width, stride=2),
            layer3=stage(2 * width, 2 * width),
        )
        super().__init__(parts | head(2 * width, num_classes))
        initialise(self)


class MLP(nn.Sequential):
    """A multilayer perceptron over the flattened image.

    hidden: units of each hidden layer; none makes a linear classifier. image_shape: (C, H, W) of the images.
    """

    def __init__(self, *, hidden: list[PositiveInt], num_classes: int, image_shape: list[int]) -> None:
        parts: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        units = prod(image_shape)
        for number, width in enumerate(hidden, start=1):
            parts[f"layer{number}"] = nn.Sequential(
                OrderedDict(linear=nn.Linear(units, width), relu=nn.ReLU(inplace=True))
            )
            units = width
        parts["fc"] = nn.Linear(units, num_classes)
        super().__init__(parts)
