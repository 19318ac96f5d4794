"""Folding batch normalisation: the same outputs, and nothing folded that something else looks at."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from kdctl import registry
from kdctl.models.fold import folded


def trained(net: nn.Module) -> nn.Module:
    """The net with statistics and scales as training leaves them."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, generator=generator)
    return net.eval()


def norms(net: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


@pytest.mark.parametrize("kind, left", [("resnet20", 0), ("wrn_16_2", 6), ("vgg8", 0), ("mobilenet_v2", 0)])
def test_a_folded_net_says_the_same(kind: str, left: int) -> None:
    net = trained(registry.create("models", kind, {}, num_classes=10))
    before = copy.deepcopy(net.state_dict())
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    result = folded(net)
    with torch.no_grad():
        expected, got = net(images), result(images)
    assert norms(result) == left < norms(net)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Shared(nn.Module):
    """A norm after a layer whose output something else sees too, and one after a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.twice, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.second(self.twice(self.twice(self.norm(y) + y)))


class Reading(nn.Module):
    """A layer whose weights the forward looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.conv.weight.mean()


class Branching(nn.Module):
    """A forward that looks at values, which no tracing follows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if x.sum() > 0 else x


@pytest.mark.parametrize("net", [Shared(), Reading(), Branching()])
def test_what_cannot_be_folded_stays_as_it_is(net: nn.Module) -> None:
    assert folded(trained(net)) is net


def test_kept_modules_and_nets_in_training_are_not_folded() -> None:
    net = trained(registry.create("models", "resnet20", {}, num_classes=10))
    assert isinstance(folded(net, {"bn1"}).get_submodule("bn1"), nn.BatchNorm2d)
    assert isinstance(folded(net, {"conv1"}).get_submodule("bn1"), nn.BatchNorm2d)
    assert folded(net.train()) is net
