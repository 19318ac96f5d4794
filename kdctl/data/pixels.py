"""Operations on the values of pixels: uint8 images (N, C, H, W) -> uint8, each image by itself.

Each computes what the Pillow function of RandAugment's published code computes; brightness, contrast, colour and
sharpness round where Pillow cuts off, and so differ by one grey level at most. Arithmetic is on integers or
single float32 steps, so that results do not depend on the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def brightness(images: Tensor, factor: float | Tensor) -> Tensor:
    """Every value times the factor: 0 is black, 1 the image itself."""
    return _to_bytes(images.float().mul_(factor))


def contrast(images: Tensor, factor: float | Tensor) -> Tensor:
    """Distance from the image's mean grey times the factor."""
    pixels = images.shape[2] * images.shape[3]
    total = grey(images).sum(3, keepdim=True).long().sum((1, 2), keepdim=True)
    return _blended(((2 * total + pixels) // (2 * pixels)).float(), images, factor)


def color(images: Tensor, factor: float | Tensor) -> Tensor:
    """Distance from each pixel's own grey times the factor: 0 is a grey image."""
    return images if images.shape[1] != 3 else _blended(grey(images), images, factor)


def sharpness(images: Tensor, factor: float | Tensor) -> Tensor:
    """Distance from the smoothed image times the factor; the outermost pixels stay."""
    if min(images.shape[2:]) < 3:
        return images
    wide = images.to(torch.int16)
    rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    sums = wide[:, :, 1:-1, 1:-1] * 4 + rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = images.float()
    smooth[:, :, 1:-1, 1:-1] = sums.float().mul_(1 / 13).round_()  # ones with 5 in the middle; no sum is midway
    return _blended(smooth, images, factor)


def posterize(images: Tensor, bits: int) -> Tensor:
    """Only the highest bits of each value."""
    return images & (0xFF << (8 - bits) & 0xFF)


def solarize(images: Tensor, threshold: float) -> Tensor:
    """Values from the threshold on inverted."""
    return images ^ ((images >= math.ceil(threshold)).to(torch.uint8) * 255)


def invert(images: Tensor) -> Tensor:
    """The negative."""
    return 255 - images


def autocontrast(images: Tensor) -> Tensor:
    """Each channel stretched so that its darkest pixel is 0 and its brightest 255; a flat channel stays."""
    low = images.amin((2, 3), keepdim=True).float()
    span = images.amax((2, 3), keepdim=True).float() - low
    flat = span == 0
    low, scale = low.masked_fill(flat, 0), (255 / span).masked_fill(flat, 1)
    return _to_bytes(images.float().sub_(low).mul_(scale))


def equalize(images: Tensor) -> Tensor:
    """Each channel's values replaced so that they are spread as evenly as possible: its cumulative histogram."""
    num, channels = images.shape[:2]
    values = images.reshape(num * channels, -1).long()
    histogram = values.new_zeros(num * channels, 256).scatter_add_(1, values, torch.ones_like(values))
    levels = torch.arange(256, device=images.device)
    brightest = values.amax(1, keepdim=True)
    step = (values.shape[1] - histogram.gather(1, brightest)) // 255
    below = histogram.cumsum(1) - histogram
    table = ((below + step // 2) // step.clamp_min(1)).clamp_max(255)
    table = torch.where(step > 0, table, levels)
    return table.gather(1, values).to(torch.uint8).view_as(images)


def grey(images: Tensor) -> Tensor:
    """Luma of ITU-R 601, rounded: float32 (N, 1, H, W). Images that have not three channels give the channels' mean."""
    if images.shape[1] != 3:
        return (images.sum(1, keepdim=True, dtype=torch.int32) // images.shape[1]).float()
    # Weights in 2^-16ths: whole numbers below 2^24, so float32 holds every step exactly.
    weights = torch.tensor([19595.0, 38470.0, 7471.0], device=images.device)[:, None, None]
    red, green, blue = (images * weights).split(1, 1)
    return (red + green).add_(blue).add_(32768).mul_(2.0**-16).floor_()


def _blended(base: Tensor, images: Tensor, factor: float | Tensor) -> Tensor:
    """base + (images - base) x factor."""
    return _to_bytes(images.float().sub_(base).mul_(factor).add_(base))


def _to_bytes(values: Tensor) -> Tensor:
    return values.round_().clamp_(0, 255).to(torch.uint8)
