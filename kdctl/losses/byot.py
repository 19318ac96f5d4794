"""Be your own teacher: early exits learn from the last layer of the same net."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdctl.config.types import NonNegative, Scheduled
from kdctl.errors import ConfigError
from kdctl.losses.adapters import to_vectors
from kdctl.losses.base import DryRun, Loss
from kdctl.losses.kd import kl_divergence
from kdctl.losses.relations import BatchNorm
from kdctl.signals import Batch, Signals

_SMALLEST = 1e-12


class BYOT(Loss):
    """Early exits: shallow layers of the student learn what its own last layer knows.

    Formula: ce_weight * CE(z_k, y) + kd_weight * T^2 KL(softmax(z / T) || softmax(z_k / T)) + feature_weight *
        ||e_k - e|| of each sample, summed over exits k, where z are the student's logits and e its last tap averaged
        over positions, both constants here; e_k is an exit's bottleneck on its tap, averaged, and z_k a linear layer on
        it. Samples without a label count nothing.
    Paper: Zhang et al., Be Your Own Teacher, ICCV 2019.
    Published: CIFAR-100: weight 1 beside ce 1, inside 0.7, 0.3 and 0.03, T 3 (mmrazor). The published 0.03 is of the
        distance of the whole batch as one vector; here it is of each sample's.
    Taps: places of the student in order, each early one an exit, the last the feature to learn from. The exits train
        beside the student and are not shipped.

    temperature: T, softens both distributions; a map {epoch: T} changes it, linearly in between.
    ce_weight: of the cross entropy of an exit.
    kd_weight: of its divergence from the last layer's probabilities.
    feature_weight: of the distance to the last tap.
    """

    needs_teacher: ClassVar[bool] = False
    needs_targets: ClassVar[bool] = True
    needs_taps: ClassVar[bool] = True
    links: ClassVar[tuple[str, ...]] = ("softmax",)
    ALIASES: ClassVar[dict[str, str]] = {"T": "temperature"}

    def __init__(
        self,
        *,
        temperature: Scheduled = 3.0,
        ce_weight: NonNegative = 0.7,
        kd_weight: NonNegative = 0.3,
        feature_weight: NonNegative = 0.03,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight
        self.feature_weight = feature_weight
        self.exits = nn.ModuleList()

    def setup(self, dry_run: DryRun) -> None:
        require_one_row_a_sample(dry_run)
        *early, last = self._features(dry_run.student)
        if not early:
            raise ConfigError("one tap is no exit", hint="tap early places, then the one that they learn from")
        classes = dry_run.student.rows().shape[1]
        self.exits = nn.ModuleList(_Exit(feature, last, classes) for feature in early).to(last.device)

    def count(self, batch: Batch) -> int | Tensor:
        return self.labels(batch)[1].sum()

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        *early, last = self._features(student)
        deepest_ND, deepest_NC = to_vectors(last).detach(), student.rows().detach()
        labels, labelled = self.labels(batch)
        temperature, values = self.now(self.temperature), torch.zeros_like(deepest_NC[:, 0])
        for leave, feature in zip(self.exits, early, strict=True):
            embedding_ND, logits_NC = (part.to(feature.dtype) for part in leave(feature))
            ce = F.cross_entropy(logits_NC, labels, reduction="none")
            kd = temperature**2 * kl_divergence(logits_NC, deepest_NC, temperature)
            distance = (embedding_ND - deepest_ND).square().sum(1).clamp_min(_SMALLEST).sqrt()
            values = values + self.ce_weight * ce + self.kd_weight * kd + self.feature_weight * distance
        return values.masked_fill(~labelled, 0)

    def _features(self, student: Signals) -> list[Tensor]:
        return [student.feature(tap) for tap, _ in self.taps]


class _Exit(nn.Module):
    """From an early feature to an embedding like the last one, and from there to logits."""

    def __init__(self, feature: Tensor, last: Tensor, classes: int) -> None:
        super().__init__()
        dim = to_vectors(last).shape[1]
        layers: list[nn.Module] = []
        if feature.ndim == 4:
            layers += [nn.Conv2d(feature.shape[1], dim, 3, 2, 1, bias=False), BatchNorm(dim)]
        else:
            layers.append(nn.Linear(feature.shape[-1], dim))
        if bool((last >= 0).all()):
            layers.append(nn.ReLU())
        self.bottleneck = nn.Sequential(*layers)
        self.classifier = nn.Linear(dim, classes)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        embedding = to_vectors(self.bottleneck(feature))
        return embedding, self.classifier(embedding)


def require_one_row_a_sample(dry_run: DryRun) -> None:
    """Raises ConfigError where the task has several rows of logits a sample."""
    if len(dry_run.student.rows()) != dry_run.batch.size:
        raise ConfigError("the term needs one row of logits a sample", hint="it is for classifying whole samples")
