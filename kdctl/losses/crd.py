"""Contrastive representation distillation: a sample's embedding is told from those of other samples."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdctl.config.types import Fraction, NonNegativeInt, Positive, PositiveInt
from kdctl.errors import ConfigError
from kdctl.losses.adapters import to_vectors
from kdctl.losses.base import DryRun
from kdctl.losses.relations import RelationLoss, full_precision
from kdctl.signals import Batch, Signals

_EPS = 1e-7


class CRD(RelationLoss):
    """Contrast: the student's embedding of a sample is nearer to the teacher's of it than to those of other samples.

    Formula: with v = linear(f) of length 1 on both sides, K negatives drawn from the N samples, c = K / N and
        P = exp(v . m / T) / Z of a vector m in memory: -log(P+ / (P+ + c)) - sum over negatives of log(c / (P- + c)) of
        each sample, once with student's v and the memory of the teacher, once the other way; the mean over the batch.
        Z is N times the mean of exp(v . m / T) on the first batch. After each step a sample's rows of both memories
        move to the new v: momentum * m + (1 - momentum) * v, of length 1. `batch` needs no memory: InfoNCE, the mean of
        the cross entropies of v_s v_t^T / T by rows and by columns, added, in which sample i is to find sample i.
    Paper: Tian, Krishnan & Isola, Contrastive Representation Distillation, ICLR 2020, eq. 18.
    Published: CIFAR-100: weight 0.8 beside ce 1, K 16384, T 0.07 (RepDistiller).
    Taps: the embedding before the classifier, one pair; maps and tokens are averaged over their positions.

    temperature: T.
    feature_dim: the length of v.
    negatives: K, with replacement; only for a memory. A sample's negatives take (K + 1) * feature_dim numbers, twice.
    momentum: how much of a memory's row stays.
    dataset_size: N, the rows of each memory; 0 takes the number of training samples.
    bank: `memory` keeps two vectors of every sample (2 * N * feature_dim numbers: 49 MiB for CIFAR, 1.2 GiB for
        ImageNet); `batch` contrasts the samples of the batch, for large sets.
    """

    ALIASES: ClassVar[dict[str, str]] = {"T": "temperature"}
    embed_s: nn.Module
    embed_t: nn.Module
    memory_v1: Tensor
    memory_v2: Tensor
    log_z: Tensor
    """Logarithms of Z of the student's and of the teacher's v, -inf until the first batch."""

    def __init__(
        self,
        *,
        temperature: Positive = 0.07,
        feature_dim: PositiveInt = 128,
        negatives: PositiveInt = 16384,
        momentum: Fraction = 0.5,
        dataset_size: NonNegativeInt = 0,
        bank: Literal["memory", "batch"] = "memory",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.feature_dim = feature_dim
        self.negatives = negatives
        self.momentum = momentum
        self.dataset_size = dataset_size
        self.bank = bank

    def setup(self, dry_run: DryRun) -> None:
        super().setup(dry_run)
        pairs = self.feature_pairs(dry_run.student, dry_run.teacher)
        if len(pairs) != 1:
            raise ConfigError(f"one pair of taps is contrasted, not {len(pairs)}", hint="give each pair its own term")
        device = pairs[0][0].device
        self.embed_s, self.embed_t = (_Embed(to_vectors(f).shape[1], self.feature_dim).to(device) for f in pairs[0])
        if self.bank == "batch":
            return
        size = self.dataset_size or dry_run.num_samples
        if size < dry_run.num_samples:
            message = f"dataset_size is {size}, and the samples are {dry_run.num_samples}"
            raise ConfigError(message, hint="leave dataset_size out")
        for name in ("memory_v1", "memory_v2"):
            self.register_buffer(name, _random_rows(size, self.feature_dim).to(device))
        self.register_buffer("log_z", torch.full((2,), -math.inf, device=device))

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        ((mine, target),) = self.feature_pairs(student, teacher)
        with full_precision(mine):
            v1_BD, v2_BD = self.embed_s(to_vectors(mine)), self.embed_t(to_vectors(target))
            if self.bank == "batch":
                return self._info_nce(v1_BD, v2_BD)
            return self._noise_contrast(v1_BD, v2_BD, batch)

    def _info_nce(self, v1_BD: Tensor, v2_BD: Tensor) -> Tensor:
        scores_BB = v1_BD @ v2_BD.T / self.temperature
        own = torch.arange(len(scores_BB), device=scores_BB.device)
        both = F.cross_entropy(scores_BB, own, reduction="none") + F.cross_entropy(scores_BB.T, own, reduction="none")
        return both.sum()

    def _noise_contrast(self, v1_BD: Tensor, v2_BD: Tensor, batch: Batch) -> Tensor:
        rows_BK = self._drawn(batch)
        sides = ((v1_BD, self.memory_v2), (v2_BD, self.memory_v1))
        scores = [(memory[rows_BK] @ v_BD.unsqueeze(2)).squeeze(2) / self.temperature for v_BD, memory in sides]
        log_n = math.log(len(self.memory_v1))
        first = torch.stack([s.detach().logsumexp((0, 1)) - math.log(s.numel()) + log_n for s in scores])
        log_z = self.log_z.where(self.log_z.isfinite(), first)
        if self.training:
            self.log_z.copy_(log_z)
            if batch.stream == 0:  # another version of the same samples is no new step
                self._remember(self.memory_v1, v1_BD, batch.index)
                self._remember(self.memory_v2, v2_BD, batch.index)
        return torch.stack([_contrast(s - z, log_n) for s, z in zip(scores, log_z, strict=True)]).sum()

    def _drawn(self, batch: Batch) -> Tensor:
        """Rows of the memory for each sample (B, 1 + K): its own, then its negatives. In eval mode always the same."""
        if (given := batch.extra.get("contrast_indices")) is not None:
            return given
        device = self.memory_v1.device
        generator = None if self.training else torch.Generator(device).manual_seed(0)
        shape = (batch.size, 1 + self.negatives)
        rows_BK = torch.randint(len(self.memory_v1), shape, device=device, generator=generator)
        rows_BK[:, 0] = batch.index
        return rows_BK

    @torch.no_grad()
    def _remember(self, memory: Tensor, v_BD: Tensor, index: Tensor) -> None:
        moved = self.momentum * memory[index] + (1 - self.momentum) * v_BD
        memory[index] = F.normalize(moved, dim=1).to(memory.dtype)


class _Embed(nn.Module):
    """A linear layer, then length 1."""

    def __init__(self, channels: int, feature_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, feature_dim)

    def forward(self, vectors_BD: Tensor) -> Tensor:
        return F.normalize(self.linear(vectors_BD), dim=1)


def _contrast(log_p_BK: Tensor, log_n: float) -> Tensor:
    """The sum over samples of one side; the first column is the positive, the others are negatives."""
    log_c = math.log(log_p_BK.shape[1] - 1) - log_n
    noise = log_p_BK.new_tensor(math.log(math.exp(log_c) + _EPS))
    log_total_BK = torch.logaddexp(log_p_BK, noise)
    return (log_total_BK[:, 0] - log_p_BK[:, 0]).sum() + (log_total_BK[:, 1:] - log_c).sum()


def _random_rows(size: int, feature_dim: int) -> Tensor:
    """Uniform, of length 1 on average."""
    bound = math.sqrt(3 / feature_dim)
    return torch.empty(size, feature_dim).uniform_(-bound, bound)
