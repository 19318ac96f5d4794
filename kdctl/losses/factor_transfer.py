"""Factor transfer: what a paraphraser makes of the teacher's feature, a translator makes of the student's."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdctl.config.types import NonNegative, Positive, PositiveInt
from kdctl.errors import ConfigError
from kdctl.losses.adapters import FeatureLoss, align
from kdctl.losses.attention_transfer import as_map, same_size
from kdctl.signals import Batch, Signals

_EPS = 1e-12


class FactorTransfer(FeatureLoss):
    """Distance of factors: a paraphraser's summary of the teacher's feature, met by a translator's of the student's.

    Formula: mean over the entries of |q_s - q_t|^p2 of each sample, summed over pairs of taps. `repdistiller`: q is the
        mean over channels of factor^p1, flattened over H x W and scaled to length 1; `paper`: q is the factor,
        flattened over C x H x W and scaled to length 1. Of two factors of different size the larger is averaged down to
        the smaller. The paraphraser (an autoencoder of 3x3 convolutions, whose code is the teacher's factor) learns
        beside the student: its reconstruction error, |g(f_t) - f_t|^2 / |f_t|^2 of each sample, is added with the
        weight `reconstruction`. The distance itself never trains the paraphraser.
    Paper: Kim, Park & Kwak, Paraphrasing Complex Network: Network Compression via Factor Transfer, NeurIPS 2018.
    Published: CIFAR-100: weight 200 beside ce 1, last stage, k 0.5, paraphraser trained alone for 30 epochs before
        (RepDistiller); the paper's weight is 500.
    Taps: the last stage output, after its ReLU.

    p1: power of the factors under the mean over channels; unused by `paper`.
    p2: power of the difference of factors.
    variant: `repdistiller` compares where factors are active, `paper` the factors themselves.
    paraphraser: false compares the features themselves as factors, and learns nothing.
    k: channels of a factor per channel of the teacher's feature.
    reconstruction: weight of the paraphraser's error within the term; 0.005 is 1 at a weight of 200. (RepDistiller
        takes the absolute error at a rate of 0.01: at the student's 0.1 that diverges.)
    paraphraser_epochs: for so many epochs the paraphraser learns alone, and the student is not compared.
    """

    def __init__(
        self,
        *,
        p1: PositiveInt = 2,
        p2: PositiveInt = 1,
        variant: Literal["repdistiller", "paper"] = "repdistiller",
        paraphraser: bool = True,
        k: Positive = 0.5,
        reconstruction: Positive = 0.005,
        paraphraser_epochs: NonNegative = 0.0,
    ) -> None:
        super().__init__()
        self.p1 = p1
        self.p2 = p2
        self.variant = variant
        self.paraphraser = paraphraser
        self.k = k
        self.reconstruction = reconstruction
        self.paraphraser_epochs = paraphraser_epochs

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        if student.ndim == 2:
            raise ConfigError("factors are of maps, not of vectors", hint="tap maps or tokens in both models")
        channels_s, channels_t = as_map(student).shape[1], as_map(teacher).shape[1]
        if self.paraphraser:
            return _Factors(channels_s, channels_t, max(1, int(self.k * channels_t)))
        if self.variant == "paper" and channels_s != channels_t:
            raise ConfigError("the channels differ", hint="use paraphraser: true, or variant: repdistiller")
        return nn.Identity()

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        values = []
        for adapter, pair in zip(self.adapters, self.feature_pairs(student, teacher), strict=True):
            mine, target = (as_map(f) for f in align(*pair))
            if not isinstance(adapter, _Factors):
                values.append(self.distance(mine, target))
                continue
            factor = adapter.encoder(target)
            error = (adapter.decoder(factor).to(target.dtype) - target).square().flatten(1).sum(1)
            error = error / target.square().flatten(1).sum(1).clamp_min(_EPS)
            distance = self.distance(adapter.translator(mine).to(target.dtype), factor.detach().to(target.dtype))
            compared = float(self.epoch >= self.paraphraser_epochs)  # times 0 keeps every parameter in the graph
            values.append(compared * distance + self.reconstruction * error)
        return torch.stack(values).sum(0)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        mine, target = (self._comparable(factor) for factor in same_size(student, teacher))
        return (mine - target).abs().pow(self.p2).mean(1)

    def _comparable(self, factor: Tensor) -> Tensor:
        if self.variant == "repdistiller":
            factor = factor.pow(self.p1).mean(1)
        return F.normalize(factor.flatten(1), dim=1)


class _Factors(nn.Module):
    """The paraphraser of the teacher's feature, an encoder and a decoder, and the translator of the student's."""

    def __init__(self, channels_s: int, channels_t: int, factors: int) -> None:
        super().__init__()
        self.encoder = _convolutions(channels_t, channels_t, factors, factors)
        self.decoder = _convolutions(factors, factors, channels_t, channels_t)
        self.translator = _convolutions(channels_s, channels_s, factors, factors)


def _convolutions(*channels: int) -> nn.Sequential:
    """3x3 convolutions from each number of channels to the next, with a leaky ReLU between."""
    layers: list[nn.Module] = []
    for channels_in, channels_out in pairwise(channels):
        layers += [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers[:-1])
