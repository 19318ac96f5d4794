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
    between, a sigmoid at the end. The image before the sigmoid is batch-normalised to start with about this mean and
    standard deviation of each channel. width: channels of the last hidden maps; the first ones have twice as many.
    Source: Radford, Metz & Chintala, ICLR 2016, as in Chen et al., Data-Free Learning of Student Networks, ICCV 2019.
    """

    def __init__(
        self, *, latent: int, width: int, image_shape: Sequence[int], mean: Tensor | float = 0.5,
        std: Tensor | float = 0.25,
    ) -> None:  # fmt: skip
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
        middle = torch.as_tensor(mean).detach().reshape(-1).expand(channels).clamp(0.02, 0.98)
        self._bias = torch.logit(middle)
        self._scale = torch.as_tensor(std).detach().reshape(-1) / (middle * (1 - middle))  # by the sigmoid's slope
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Fresh weights: normal with deviation 0.02 around 0, around 1 for the scales of batch normalisation."""
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.weight.normal_(1.0, _STD)
                module.bias.zero_()
            elif isinstance(module, nn.Linear | nn.Conv2d):
                module.weight.normal_(0.0, _STD)
                if module.bias is not None:
                    module.bias.zero_()
        self.bn3.weight.copy_(self._scale)  # type: ignore[union-attr,operator]
        self.bn3.bias.copy_(self._bias)  # type: ignore[union-attr,operator]

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
