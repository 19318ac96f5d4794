"""Wasserstein distillation of logits: mass that goes to a similar class has a short way."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kdctl.config.types import NonNegative, Positive, PositiveInt, Scheduled
from kdctl.errors import ConfigError, Problem
from kdctl.losses.base import DryRun, Loss
from kdctl.losses.nkd import target_cross_entropy
from kdctl.losses.relations import full_precision, linear_head
from kdctl.signals import Batch, Signals

_MAX_EXPONENT = 80.0
"""exp(-80) is still a number of float32."""


class WKDLogit(Loss):
    """Cross entropy of the target, and the cost of moving the other classes' probabilities from student to teacher.

    Formula: -p_t,y log p_s,y + gamma sum_jk F_jk D_jk of each labelled row. p = softmax(z) at T = 1, y is the label.
        D_jk = max(1 - cos(w_j, w_k), 0), with the rows w of the teacher's classifier. F moves the student's softmax of
        z / T over the classes but y to the teacher's: `iterations` of Sinkhorn's algorithm for the kernel
        exp(-D / entropy), each ending with the student's side.
    Paper: Lv, Yang & Li, Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation, NeurIPS
        2024.
    Published: ImageNet: beside ce 1, entropy 0.05, 10 iterations, gamma falling along a cosine late in training. The
        authors' code adds 1e-8 to what it divides by, and so loses mass between distant classes; here none is lost.

    head: where the teacher's classifier, a linear layer, stands in its net.
    temperature: T, softens the other classes; a map {epoch: T} changes it, linearly in between.
    gamma: weight of the other classes; a map {epoch: gamma} changes it, linearly in between.
    entropy: how blurred F is; small values need more iterations.
    iterations: of Sinkhorn's algorithm.
    sharpen: above 0, 1 - exp(-sharpen D) stands in place of D, which tells similar classes better apart.
    """

    needs_targets: ClassVar[bool] = True
    links: ClassVar[tuple[str, ...]] = ("softmax",)
    reads_classifier: ClassVar[bool] = True
    ALIASES: ClassVar[dict[str, str]] = {"T": "temperature", "lambda": "entropy", "kappa": "sharpen"}
    cost_CC: Tensor

    def __init__(
        self,
        *,
        head: str = "fc",
        temperature: Scheduled = 2.0,
        gamma: Scheduled = 1.0,
        entropy: Positive = 0.05,
        iterations: PositiveInt = 10,
        sharpen: NonNegative = 0.0,
    ) -> None:
        super().__init__()
        self.head = head
        self.temperature = temperature
        self.gamma = gamma
        self.entropy = entropy
        self.iterations = iterations
        self.sharpen = sharpen

    def setup(self, dry_run: DryRun) -> None:
        weight_CD = linear_head(dry_run.teacher_nets[0], self.head).weight.detach()
        classes = dry_run.student.rows().shape[1]
        if len(weight_CD) != classes:
            message = f"the teacher's '{self.head}' has {len(weight_CD)} outputs, the student {classes} classes"
            raise ConfigError(message, hint="head names the layer whose outputs are the logits")
        cost_CC = class_distance(weight_CD, self.sharpen)
        least = float(cost_CC.max()) / _MAX_EXPONENT
        if self.entropy < least:
            message = f"{self.entropy} is too small for float32: the kernel vanishes for the most distant classes"
            raise ConfigError(Problem(message, key="entropy", hint=f"use {least:.2g} or more"))
        self.register_buffer("cost_CC", cost_CC, persistent=False)

    def count(self, batch: Batch) -> int | Tensor:
        return self.labels(batch)[1].sum()

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        labels, labelled = self.labels(batch)
        student_RC, teacher_RC = self.logit_pair(student, teacher)
        temperature = self.now(self.temperature)
        # The label stays in its place with no mass, so that all rows share one kernel: no R x C x C anywhere.
        log_s, log_t = (
            (z / temperature).scatter(1, labels[:, None], -torch.inf).log_softmax(1) for z in (student_RC, teacher_RC)
        )
        with full_precision(student_RC):
            moved = transport_cost(log_s, log_t, self.cost_CC.to(log_s), self.entropy, self.iterations)
        value = target_cross_entropy(student_RC, teacher_RC, labels) + self.now(self.gamma) * moved
        return value.masked_fill(~labelled, 0)


def class_distance(weight_CD: Tensor, sharpen: float = 0.0) -> Tensor:
    """1 - cosine of the rows of a classifier: (C, C), in float32 or better."""
    weight_CD = weight_CD if weight_CD.dtype == torch.float64 else weight_CD.float()
    unit_CD = F.normalize(weight_CD, dim=1)
    distance_CC = (1 - unit_CD @ unit_CD.T).clamp_min(0).fill_diagonal_(0)
    return -torch.expm1(-sharpen * distance_CC) if sharpen else distance_CC


def transport_cost(log_s_RC: Tensor, log_t_RC: Tensor, cost_CC: Tensor, entropy: float, iterations: int) -> Tensor:
    """What it costs to move each row's distribution s to t (R,), by Sinkhorn's algorithm on logarithms.

    The cost is symmetric. A class without mass (-inf) takes no part.
    """
    kernel_CC = (-cost_CC / entropy).exp()
    log_u = torch.zeros_like(log_s_RC).masked_fill(log_s_RC == -torch.inf, -torch.inf)
    for _ in range(iterations):
        log_v = log_t_RC - _log_matmul(log_u, kernel_CC)
        log_u = log_s_RC - _log_matmul(log_v, kernel_CC)
    return (log_u + _log_matmul(log_v, kernel_CC * cost_CC)).exp().sum(1)


def _log_matmul(log_RC: Tensor, kernel_CC: Tensor) -> Tensor:
    """log(exp(log_RC) @ kernel_CC), each row scaled by its largest entry so that nothing overflows."""
    largest_R1 = log_RC.detach().amax(1, keepdim=True)
    product_RC = (log_RC - largest_R1).exp() @ kernel_CC
    return product_RC.clamp_min(torch.finfo(product_RC.dtype).tiny).log() + largest_R1
