"""A generator of images from noise, in the form of DCGAN's as the data-free literature uses it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_STD = 0.02
_SLOPE = 0.2


class Generator(nn.Sequential):
    """Noise (N, latent) -> images (N, C, H, W) in [0, 1], which are what a Model takes.

    A linear layer to maps of a quarter of the side, two convolutions after doubling the side, batch normalisation
    between, a sigmoid at the end. The image before the sigmoid is batch-normalised, so that it starts neither black nor
    white. width: channels of the last hidden maps; the first ones have twice as many.
    Source: Radford, Metz & Chintala, ICLR 2016, as in Chen et al., Data-Free Learning of Student Networks, ICCV 2019.
    """

    def __init__(self, *, latent: int, width: int, image_shape: Sequence[int]) -> None:
        channels, height, side = image_shape
        self.latent = latent
        small = (-(-height // 4), -(-side // 4))
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            fc=nn.Linear(latent, 2 * width * small[0] * small[1]),
            maps=nn.Unflatten(1, (2 * width, *small)),
            bn0=nn.BatchNorm2d(2 * width),
            up1=Resize((-(-height // 2), -(-side // 2))),
            conv1=nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            bn1=nn.BatchNorm2d(2 * width),
            relu1=nn.LeakyReLU(_SLOPE, inplace=True),
            up2=Resize((height, side)),
            conv2=nn.Conv2d(2 * width, width, 3, padding=1),
            bn2=nn.BatchNorm2d(width),
            relu2=nn.LeakyReLU(_SLOPE, inplace=True),
            conv3=nn.Conv2d(width, channels, 3, padding=1),
            bn3=nn.BatchNorm2d(channels),
            sigmoid=nn.Sigmoid(),
        )
        super().__init__(parts)
        reset(self)

    def noise(self, count: int, device: torch.device) -> Tensor:
        """(count, latent) standard normal numbers."""
        return torch.randn(count, self.latent, device=device)


class Resize(nn.Module):
    """Images at another size, each pixel that of the nearest one."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, self.size, mode="nearest")


@torch.no_grad()
def reset(generator: nn.Module) -> None:
    """Fresh weights: normal with deviation 0.02 around 0 (around 1 for the scales of batch normalisation)."""
    for module in generator.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.BatchNorm2d):
            scale = isinstance(module, nn.BatchNorm2d)
            module.weight.normal_(1.0 if scale else 0.0, _STD)
            if module.bias is not None:
                module.bias.zero_()
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
