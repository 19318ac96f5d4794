"""How top-1 falls when images are corrupted: Gaussian noise, Gaussian blur, less contrast, at five severities.

Levels are those of CIFAR-10-C (Hendrycks and Dietterich, "Benchmarking neural network robustness to common corruptions
and perturbations", ICLR 2019), made for images of 32 x 32 pixels with values in [0, 1]. Noise and contrast do not hang
on the size of an image. The blur, in pixels, grows with the shorter side above 32 pixels; on smaller images it stays
what it is in pixels, for less than half a pixel blurs nothing. Noise is keyed by the sample's number, the same for each
model, and stronger noise is the same noise times a factor. Images are not rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdctl.data import counter
from kdctl.data.base import Split
from kdctl.data.loader import clean_batches
from kdctl.evaluate import TorchPredictor, quick
from kdctl.models.record import Model
from kdctl.signals import Batch
from kdctl.tasks.base import Task

LEVELS = {
    "noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
}
"""Of the severities 1..5: standard deviation, standard deviation in pixels, factor."""
SIDE = 32
_TRUNCATE = 4.0
"""A blur reaches so many standard deviations far."""


def measure_robustness(
    student: Model, teachers: Sequence[Model], samples: Split, task: Task, batch_size: int
) -> list[dict[str, Any]]:
    """A row for clean images (severity 0), then one for each corruption and severity.

    Of each: `corruption`, `severity`, `level`, and the primary metric of `student` and `teacher` (of the mean logits of
    several; None without any), in fp32 on the CPU.
    """
    asked = {"student": [TorchPredictor(quick(student))], "teacher": [TorchPredictor(quick(t)) for t in teachers]}
    metric = task.metrics()[task.primary]
    targets = samples.targets.numpy()
    rows: list[dict[str, Any]] = []
    for corruption, severity, level in corruptions(min(samples.input_shape[1:])):
        logits: dict[str, list[Any]] = {who: [] for who in asked}
        for batch in clean_batches(samples, batch_size=batch_size, device=torch.device("cpu")):
            images = corrupt(batch, corruption, level).numpy()
            for who, predictors in asked.items():
                if predictors:
                    logits[who].append(np.mean([predictor(images) for predictor in predictors], axis=0))
        tops = {who: float(metric(np.concatenate(said), targets)) if said else None for who, said in logits.items()}
        rows.append({"corruption": corruption, "severity": severity, "level": level, **tops})
    return rows


def corruptions(side: int) -> list[tuple[str, int, float]]:
    """Name, severity and level of all corruptions of images whose shorter side has so many pixels; `none` first."""
    found = [("none", 0, 0.0)]
    for name, levels in LEVELS.items():
        scale = max(1.0, side / SIDE) if name == "blur" else 1.0
        found += [(name, severity, level * scale) for severity, level in enumerate(levels, 1)]
    return found


def corrupt(batch: Batch, corruption: str, level: float) -> Tensor:
    """The images (N, C, H, W) of a batch, in [0, 1], corrupted."""
    return _CORRUPTIONS[corruption](batch, level).clamp(0, 1)


def _noise(batch: Batch, level: float) -> Tensor:
    """Adds Gaussian noise of this standard deviation, keyed by the samples' numbers (Box and Muller, 1958)."""
    keys = counter.fold(counter.key(counter.CORRUPTION), batch.index.cpu())[:, None]
    pixels = batch.inputs[0].numel()
    radius, angle = (_uniform(counter.fold(keys, torch.arange(pixels) + first)) for first in (0, pixels))
    normal = (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * torch.pi * angle)
    return batch.inputs + level * normal.to(batch.inputs).view_as(batch.inputs)


def _uniform(bits: Tensor) -> Tensor:
    """Numbers in [0, 1) of the upper half of 64 bits."""
    return ((bits >> 32) & 0xFFFFFFFF).double() * 2.0**-32


def _blur(batch: Batch, level: float) -> Tensor:
    """Convolves with a Gaussian of this many pixels; the border's pixels go on beyond it."""
    images = batch.inputs
    reach = int(_TRUNCATE * level + 0.5)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=images.dtype) / level) ** 2)
    kernel = kernel / kernel.sum()
    channels = images.shape[1]
    across = kernel.expand(channels, 1, 1, -1)
    images = F.conv2d(F.pad(images, (reach, reach, 0, 0), mode="replicate"), across, groups=channels)
    down = kernel[:, None].expand(channels, 1, -1, 1)
    return F.conv2d(F.pad(images, (0, 0, reach, reach), mode="replicate"), down, groups=channels)


def _contrast(batch: Batch, level: float) -> Tensor:
    """Draws every channel of an image towards its mean by this factor."""
    mean = batch.inputs.mean((2, 3), keepdim=True)
    return (batch.inputs - mean) * level + mean


_CORRUPTIONS: dict[str, Callable[[Batch, float], Tensor]] = {
    "none": lambda batch, level: batch.inputs,
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
}
