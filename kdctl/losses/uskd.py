"""Universal self distillation: soft labels that the student makes for itself."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kdctl.config.types import NonNegative
from kdctl.errors import ConfigError
from kdctl.losses.adapters import to_vectors
from kdctl.losses.base import DryRun, Loss
from kdctl.losses.byot import require_one_row_a_sample
from kdctl.signals import Batch, Signals

_EPS = 1e-6
_CERTAIN = 0.9


class USKD(Loss):
    """Soft labels without a teacher: the target by how sure the student is, the other classes by their rank.

    Formula: -alpha p log s_y - beta sum_k q_k log s^_k - mu sum_k l_k log w_k of each sample. s are the student's
        probabilities, s^ those of the classes but the label y, w those of a weak linear head on a tap in the middle.
        p = 1 + s_y^2 - mean(s_y^2) over the labelled samples of the batch; q_k = 1 / rank of class k, divided by the
        sum over k != y; l is 0.9 for y, plus 0.1 / C for every class. Ranks are by w_k / (1 - w_y) + s_k / (1 - s_y),
        largest first, the label's among them. p and q are constants.
    Paper: Yang et al., From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized
        Loss and Customized Soft Labels, ICCV 2023.
    Published: ImageNet: weight 1 beside ce 1, inside alpha 1, beta 0.1, mu 0.005 (cls_KD).
    Taps: one place in the middle of the student; it is averaged over its positions.

    alpha: of the target.
    beta: of the other classes.
    mu: of the weak head.
    variant: `code` ranks by log s in place of s in the second summand, as the published results were made; `paper`
        ranks as the formula says.
    """

    needs_teacher: ClassVar[bool] = False
    needs_targets: ClassVar[bool] = True
    needs_taps: ClassVar[bool] = True
    batchwise: ClassVar[bool] = True
    links: ClassVar[tuple[str, ...]] = ("softmax",)

    def __init__(
        self,
        *,
        alpha: NonNegative = 1.0,
        beta: NonNegative = 0.1,
        mu: NonNegative = 0.005,
        variant: Literal["code", "paper"] = "code",
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.mu = mu
        self.variant = variant

    def setup(self, dry_run: DryRun) -> None:
        require_one_row_a_sample(dry_run)
        if len(self.taps) != 1:
            raise ConfigError(f"the weak head stands on one tap, not {len(self.taps)}", hint="name one in the middle")
        feature = dry_run.student.feature(self.taps[0][0])
        classes = dry_run.student.rows().shape[1]
        self.weak_head = nn.Linear(to_vectors(feature).shape[1], classes).to(feature.device)

    def count(self, batch: Batch) -> int | Tensor:
        return self.labels(batch)[1].sum()

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        labels, labelled = self.labels(batch)
        logits_NC = student.rows()
        weak_NC = self.weak_head(to_vectors(student.feature(self.taps[0][0]))).to(logits_NC.dtype)
        log_s, log_w = logits_NC.log_softmax(1), weak_NC.log_softmax(1)
        log_s_y, log_w_y = (log.gather(1, labels[:, None]) for log in (log_s, log_w))
        with torch.no_grad():
            squared = log_s_y.squeeze(1).exp().square()
            soft = 1 + squared - squared[labelled].sum() / labelled.sum().clamp_min(1)
            score = log_s if self.variant == "code" else log_s.exp()
            score_y = log_s_y if self.variant == "code" else log_s_y.exp()
            order = score / (1 - score_y + _EPS) + log_w.exp() / (1 - log_w_y.exp() + _EPS)
            rank_NC = order.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        others = torch.ones_like(rank_NC, dtype=torch.bool).scatter_(1, labels[:, None], False)
        zipf = (1 / (1 + rank_NC[others].to(logits_NC.dtype))).unflatten(0, (-1, logits_NC.shape[1] - 1))
        zipf = zipf / zipf.sum(1, keepdim=True)
        log_others = logits_NC[others].unflatten(0, zipf.shape).log_softmax(1)
        target = -soft * log_s_y.squeeze(1)
        rest = -(zipf * log_others).sum(1)
        weak = -_CERTAIN * log_w_y.squeeze(1) - (1 - _CERTAIN) * log_w.mean(1)
        return (self.alpha * target + self.beta * rest + self.mu * weak).masked_fill(~labelled, 0)
