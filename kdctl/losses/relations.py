"""What the losses share that compare how the samples of a batch lie to each other."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdctl.errors import ConfigError
from kdctl.losses.adapters import TappedLoss, to_vectors
from kdctl.losses.base import DryRun
from kdctl.signals import Batch, Signals


class RelationLoss(TappedLoss):
    """A term on the vectors of all samples of a batch, summed over pairs of taps.

    A subclass gives the published value of a pair; the sum of the loss is that times the number of samples. Maps and
    tokens are averaged over their positions. Student's and teacher's vectors may differ in length.
    """

    batchwise: ClassVar[bool] = True

    def setup(self, dry_run: DryRun) -> None:
        for pair in self.feature_pairs(dry_run.student, dry_run.teacher):
            for feature in pair:
                if not 2 <= feature.ndim <= 4:
                    message = f"a feature must be a map, tokens or vectors, not {feature.ndim}-D"
                    raise ConfigError(message, hint="tap another place")

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        with full_precision(student.logits):
            pairs = [(self.vectors(s), self.vectors(t)) for s, t in self.feature_pairs(student, teacher)]
            return batch.size * torch.stack([self.relation(i, *pair) for i, pair in enumerate(pairs)]).sum()

    def vectors(self, feature: Tensor) -> Tensor:
        """The vectors (B, D) of a feature."""
        return to_vectors(feature)

    def relation(self, pair: int, student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
        """The published value of a pair of taps, the pair-th: a scalar."""
        raise NotImplementedError


def full_precision(feature: Tensor) -> torch.autocast:
    """A context without autocast: similarities of near neighbours do not survive half precision."""
    return torch.autocast(feature.device.type, enabled=False)


class BatchNorm(_BatchNorm):
    """Batch normalisation of vectors or maps; of a single value a channel it uses the running statistics."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Takes any layout (B, C, ...)."""

    def forward(self, feature: Tensor) -> Tensor:
        if self.training and feature.numel() == feature.shape[1]:
            return F.batch_norm(feature, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(feature)


def linear_head(net: nn.Module, path: str) -> nn.Linear:
    """The classifier of a net: its linear layer at a path. Raises ConfigError where there is none."""
    try:
        head = net.get_submodule(path)
    except AttributeError:
        linears = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
        known = f"its linear layers are {', '.join(linears[-3:])}" if linears else "it has no linear layer"
        raise ConfigError(f"the net has no module '{path}'", hint=f"head names the classifier; {known}") from None
    if not isinstance(head, nn.Linear):
        raise ConfigError(f"'{path}' is no linear layer but {type(head).__name__}", hint="name the classifier in head")
    return head
