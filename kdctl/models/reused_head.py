"""A net under another net's classifier: what SimKD trains and ships.

Taps: those of the base up to where it was cut, then
    resize                 its feature at the size that the teacher's has, where that is smaller
    projector              the feature in the place of the teacher's, after the ReLU
    pool, flatten          the embedding, (N, C, 1, 1) and (N, C)
    fc                     the logits
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from kdctl.config.types import PositiveInt, Tap
from kdctl.errors import ConfigError, Problem
from kdctl.models.layers import conv, initialise
from kdctl.models.record import ModelRecord, build_model


class ReusedHead(nn.Sequential):
    """The first part of a net, a projector to other channels, and a linear classifier of these.

    base: the net that is cut: its kind and arguments. cut: the last of its top-level modules that stays; width: the
    channels that it gives. channels: of the feature that the classifier was made for. factor: the projector works on
    channels / factor. resize: height and width of its input, none for those of the feature. bias: whether the
    classifier has one.
    Source: Chen et al., Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022.
    """

    def __init__(
        self,
        *,
        base: dict[str, Any],
        cut: Tap = "layer3",
        width: PositiveInt,
        channels: PositiveInt,
        factor: PositiveInt = 2,
        resize: list[PositiveInt] | None = None,
        bias: bool = True,
        num_classes: int,
        image_shape: list[int],
    ) -> None:
        if channels < factor:
            message = f"{channels} channels divided by {factor} leave none"
            raise ConfigError(Problem(message, key="factor", hint="a smaller factor"))
        first = _first_part(base, cut, num_classes, image_shape)
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        if resize is not None:
            parts["resize"] = nn.AdaptiveAvgPool2d(tuple(resize))
        parts["projector"] = projector(width, channels, channels // factor)
        parts |= OrderedDict(
            pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(channels, num_classes, bias=bias)
        )
        if clash := sorted(set(first) & set(parts)):
            message = f"the base has a module '{clash[0]}' before the cut"
            raise ConfigError(Problem(message, key="cut", hint="cut it earlier"))
        super().__init__(first | parts)


def projector(channels: int, out_channels: int, inner: int) -> nn.Sequential:
    """1x1, 3x3 and 1x1 convolutions, each with batch normalisation and ReLU."""
    layers: list[nn.Module] = []
    for before, after, kernel in ((channels, inner, 1), (inner, inner, 3), (inner, out_channels, 1)):
        layers += [conv(before, after, kernel), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    made = nn.Sequential(*layers)
    initialise(made)
    return made


def _first_part(
    base: dict[str, Any], cut: str, num_classes: int, image_shape: list[int]
) -> OrderedDict[str, nn.Module]:
    """The modules of the base up to the cut."""
    arguments = {name: value for name, value in base.items() if name != "kind"}
    names = [str(number) for number in range(num_classes)]
    net = build_model(ModelRecord(str(base.get("kind")), arguments, num_classes, names, list(image_shape))).net
    children = list(net.named_children())
    places = [name for name, _ in children]
    if not isinstance(net, nn.Sequential) or cut not in places:
        message = f"the base has no part '{cut}' at its top level, or is no sequential net"
        raise ConfigError(Problem(message, key="cut", hint=f"its parts are {', '.join(places)}"))
    return OrderedDict(children[: places.index(cut) + 1])
