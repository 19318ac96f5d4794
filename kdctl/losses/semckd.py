"""Semantic calibration: attention chooses which of the teacher's layers teaches which of the student's."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdctl.config.types import Positive, PositiveInt
from kdctl.losses.adapters import align, linear_adapter, to_vectors
from kdctl.losses.base import DryRun, Loss
from kdctl.losses.relations import BatchNorm, full_precision
from kdctl.signals import Batch, Signals


class SemCKD(Loss):
    """Squared distance of every layer of the student to every layer of the teacher, weighted by attention.

    Formula: (1/S) sum_i sum_j a_ij mean (r_ij(f_s,i) - f_t,j)^2 of each sample, over S student taps i and all teacher
        taps j, where r_ij is a learnt regressor and the larger map is first averaged down to the smaller. a_ij is the
        softmax over j of q_i . k_j / temperature; q_i and k_j are small networks, of length 1, on the features of the
        sample averaged over positions. (The published code makes q and k from the B x B similarities of the batch, so
        that its layers fit one batch size alone and a sample's loss depends on its neighbours.)
    Paper: Chen et al., Cross-Layer Distillation with Semantic Calibration, AAAI 2021.
    Published: CIFAR-100: weight 400 beside ce 1 and kd 1 at lr 0.05 (SimKD's code). The regressors end without
        normalisation: at this weight a learning rate of 0.05 can make them diverge, 0.02 does not (measured).
    Taps: every stage output of both; pairs need not be like, only which places are named counts.

    embed_dim: the length of q and k.
    temperature: divides q . k; small ones choose one layer.
    """

    needs_taps: ClassVar[bool] = True
    needs_logits: ClassVar[bool] = False
    ALIASES: ClassVar[dict[str, str]] = {"soft": "temperature"}

    def __init__(self, *, embed_dim: PositiveInt = 16, temperature: Positive = 1.0) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.temperature = temperature
        self.queries = nn.ModuleList()
        self.keys = nn.ModuleList()
        self.regressors = nn.ModuleList()

    def setup(self, dry_run: DryRun) -> None:
        students, teachers = self._layers(dry_run.student, dry_run.teacher)
        self.queries = nn.ModuleList(self._embed(feature) for feature in students)
        self.keys = nn.ModuleList(self._embed(feature) for feature in teachers)
        pairs = (_alike(s, t) for s in students for t in teachers)
        self.regressors = nn.ModuleList(_regressor(*pair) for pair in pairs)
        self.to(students[0].device)

    def count(self, batch: Batch) -> int | Tensor:
        return batch.size

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        students, teachers = self._layers(student, teacher)
        queries_NSE = self._embedded(self.queries, students)
        keys_NTE = self._embedded(self.keys, teachers)
        distances = []
        pairs = ((s, t) for s in students for t in teachers)
        for regressor, pair in zip(self.regressors, pairs, strict=True):
            mine, target = _alike(*pair)
            distances.append((regressor(mine).to(target.dtype) - target).square().flatten(1).mean(1))
        distances_NST = torch.stack(distances, 1).unflatten(1, (len(students), len(teachers)))
        with full_precision(distances_NST):
            attention_NST = (queries_NSE @ keys_NTE.transpose(1, 2) / self.temperature).softmax(2)
        return (attention_NST * distances_NST).sum((1, 2)) / len(students)

    def _layers(self, student: Signals, teacher: Signals | None) -> tuple[list[Tensor], list[Tensor]]:
        """The features at the named places of each side, each once."""
        assert teacher is not None
        students, teachers = (dict.fromkeys(side) for side in zip(*self.taps, strict=True))
        return [student.feature(tap) for tap in students], [teacher.feature(tap).detach() for tap in teachers]

    def _embed(self, feature: Tensor) -> nn.Module:
        hidden = 2 * self.embed_dim
        first = nn.Linear(to_vectors(feature).shape[1], hidden)
        return nn.Sequential(first, nn.ReLU(), nn.Linear(hidden, self.embed_dim))

    def _embedded(self, embeds: nn.ModuleList, features: list[Tensor]) -> Tensor:
        vectors = [embed(to_vectors(f)).to(f.dtype) for embed, f in zip(embeds, features, strict=True)]
        return F.normalize(torch.stack(vectors, 1), dim=2)


def _alike(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one layout, and maps of one size: each side averaged down to the smaller."""
    student, teacher = align(student, teacher)
    if student.ndim < 4 or student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    height, width = (min(student.shape[d], teacher.shape[d]) for d in (2, 3))
    return F.adaptive_avg_pool2d(student, (height, width)), F.adaptive_avg_pool2d(teacher, (height, width))


def _regressor(student: Tensor, teacher: Tensor) -> nn.Module:
    """For maps convolutions 1x1, 3x3, 1x1 through twice the teacher's channels, else a linear layer."""
    if student.ndim < 4:
        return linear_adapter(student, teacher)
    channels = teacher.shape[1]
    return nn.Sequential(
        nn.Conv2d(student.shape[1], 2 * channels, 1, bias=False),
        BatchNorm(2 * channels),
        nn.ReLU(),
        nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, bias=False),
        BatchNorm(2 * channels),
        nn.ReLU(),
        nn.Conv2d(2 * channels, channels, 1, bias=False),
    )
