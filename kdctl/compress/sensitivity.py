"""Which layers suffer from quantisation: each one alone computes with few bits, and the logits are compared."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdctl.models import structure
from kdctl.models.fold import folded
from kdctl.models.record import Model
from kdctl.quant import fake
from kdctl.quant.ranges import Calibration
from kdctl.signals import find_logits

Floats = NDArray[np.float32]
_BATCH = 64


@dataclass(frozen=True)
class Sensitivity:
    """What quantising one layer alone costs.

    sqnr_db: signal-to-quantisation-noise ratio of the logits, 10 log10(sum y^2 / sum (y - y')^2), in decibels; lower is
    worse. weights: how many the layer has. bits: of its weights. activations: whether its input is rounded too.
    """

    path: str
    sqnr_db: float
    weights: int
    bits: int
    activations: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def sensitivities(
    model: Model,
    images: NDArray[Any],
    *,
    bits: int = 8,
    activation_bits: int | None = 8,
    per_channel: bool = True,
    calibration: Calibration = "minmax",
    skip: Collection[str] = (),
) -> list[Sensitivity]:
    """Every convolution and linear of the net, the most sensitive first; the model is left as it is.

    The net runs once in float on images (N, C, H, W) or texts (N, L), and once for each layer with this one rounded:
    its weights to `bits` and its input to `activation_bits` (None: in float) with the range that `calibration` takes
    from the same images. Batch normalisation is folded first, as it is in the file.
    """
    net = folded(copy.deepcopy(model.net).cpu().float().eval())
    chosen = [path for path, layer in net.named_modules() if path and fake.can_wrap(layer) and path not in skip]
    wrapped = {}
    for path in chosen:
        layer = net.get_submodule(path)
        arguments = {"activation_bits": activation_bits, "per_channel": per_channel, "quantizer": "plain"}
        made = fake.wrap(layer, weight_bits=bits, **arguments)  # type: ignore[arg-type]
        structure.put(net, path, made)
        wrapped[path] = made
    whole = Model(net, model.record, model.base).eval()
    batches = [torch.from_numpy(images[i : i + _BATCH]) for i in range(0, len(images), _BATCH)]

    def logits() -> Tensor:
        return torch.cat([find_logits(whole(batch)).double() for batch in batches])

    def run() -> None:
        logits()

    fake.calibrate(net, run, calibration)
    for layer in wrapped.values():
        layer.quantizing = False  # type: ignore[assignment]
    reference = logits()
    found = []
    for path, layer in wrapped.items():
        layer.quantizing = True  # type: ignore[assignment]
        noise = float(((logits() - reference) ** 2).sum())
        layer.quantizing = False  # type: ignore[assignment]
        ratio = math.inf if noise == 0 else 10 * math.log10(max(float((reference**2).sum()), 1e-300) / noise)
        size = sum(p.numel() for name, p in layer.named_parameters() if name == "weight")
        found.append(Sensitivity(path, round(min(ratio, 300.0), 2), size, bits, activation_bits is not None))
    return sorted(found, key=lambda layer: layer.sqnr_db)
