"""Small modules and the initialisation that the model families share."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn


class Add(nn.Module):
    """The sum of a branch and its shortcut, as a module, so that it can be tapped (and quantised) by name."""

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        return branch + shortcut


def conv(channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias whose output has 1/stride of the input's height and width."""
    return nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)


def head(channels: int, num_classes: int) -> OrderedDict[str, nn.Module]:
    """What all our classifiers end in: `pool` (N, C, 1, 1), `flatten` (N, C: the embedding) and `fc` (the logits)."""
    return OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(channels, num_classes))


def initialise(net: nn.Module, linear_std: float | None = None) -> None:
    """He's normal initialisation (fan-out) of all convolutions; linear layers normal with `linear_std` where given.

    Source: He et al., Delving Deep into Rectifiers, ICCV 2015; batch norms start as the identity, which is PyTorch's.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
            nn.init.zeros_(module.bias)
