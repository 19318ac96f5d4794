"""Small nets for small images: a convolutional net for digits, LeNet-5 and a multilayer perceptron.

Taps of digits_cnn:
    relu                             the stem, after its ReLU
    layer1, layer2, layer3           stage outputs, after the ReLU
    layer<i>.bn, layer<i>.relu:in    stage outputs before the ReLU (pre-activation)
    pool, flatten                    the embedding, (N, C, 1, 1) and (N, C)
    fc                               the logits
Taps of lenet5:
    layer1, layer2                   the two convolutions, after ReLU and pooling
    layer<i>.relu:in                 each before its ReLU (pre-activation)
    flatten                          the maps as a vector
    layer3, layer4                   the hidden linear layers, after the ReLU; layer4 is the embedding
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
from kdctl.errors import ConfigError, Problem
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


class LeNet5(nn.Sequential):
    """LeNet-5 with ReLU and max-pooling: two 5x5 convolutions, two hidden linear layers and a classifier.

    width: channels of the first convolution; the others follow (6: 6, 16, 120 and 84; 3: 3, 8, 60 and 42, the half).
    batch_norm: after each convolution and hidden linear layer, which the original has not. The second convolution pads
    images of fewer than 12 pixels, which would else be gone.
    Source: LeCun et al., Gradient-Based Learning Applied to Document Recognition, Proceedings of the IEEE 1998.
    """

    def __init__(
        self,
        *,
        width: PositiveInt = 6,
        batch_norm: bool = False,
        num_classes: int,
        in_channels: int = 1,
        image_shape: list[int],
    ) -> None:
        padding = 0 if min(image_shape[1:]) >= 12 else 2
        sides = [(side // 2 + 2 * padding - 4) // 2 for side in image_shape[1:]]
        if min(sides) < 1:
            message = f"images of {image_shape[1]}x{image_shape[2]} pixels are too small for LeNet-5"
            raise ConfigError(Problem(message, key="input_size", hint="4 or more; it was made for 28x28"))

        def convolution(channels: int, out_channels: int, padding: int) -> nn.Sequential:
            parts: OrderedDict[str, nn.Module] = OrderedDict()
            parts["conv"] = nn.Conv2d(channels, out_channels, 5, padding=padding, bias=not batch_norm)
            if batch_norm:
                parts["bn"] = nn.BatchNorm2d(out_channels)
            return nn.Sequential(parts | {"relu": nn.ReLU(inplace=True), "pool": nn.MaxPool2d(2)})

        def linear(units: int, out_units: int) -> nn.Sequential:
            parts: OrderedDict[str, nn.Module] = OrderedDict(linear=nn.Linear(units, out_units, bias=not batch_norm))
            if batch_norm:
                parts["bn"] = nn.BatchNorm1d(out_units)
            return nn.Sequential(parts | {"relu": nn.ReLU(inplace=True)})

        maps = 8 * width // 3
        super().__init__(
            OrderedDict(
                layer1=convolution(in_channels, width, 2),
                layer2=convolution(width, maps, padding),
                flatten=nn.Flatten(),
                layer3=linear(maps * prod(sides), 20 * width),
                layer4=linear(20 * width, 14 * width),
                fc=nn.Linear(14 * width, num_classes),
            )
        )
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
