"""What the losses share that compare hidden states token by token.

Layouts: tokens (B, L, D); a map is one token a position, a vector is one token.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from kdctl.errors import ConfigError, Problem
from kdctl.losses.adapters import FeatureLoss, align, linear_adapter, token_mask
from kdctl.losses.base import DryRun, Loss
from kdctl.signals import Batch, Signals

_NORM_EPS = 1e-12


class TokenLoss(FeatureLoss):
    """A term on the tokens of a pair that leaves padding out.

    Where the batch says which tokens are padding, the sum runs over the tokens of all samples and `count` is their
    number, so that neither padding nor the split into micro-batches changes the loss. Where it says nothing, each
    sample's tokens are averaged and the count is of samples. A subclass gives the distance of a pair from tokens
    that are zero in both models where they are padding, so that padding adds nothing.
    """

    leaves_padding_out: ClassVar[bool] = True
    masked: bool = False
    """Whether the batch says which tokens are padding."""
    rank: ClassVar[int] = 3
    token_axes: ClassVar[tuple[int, ...]] = (1,)
    """How many dimensions a feature has whose tokens may be padding, and which of them are of tokens."""

    def setup(self, dry_run: DryRun) -> None:
        self.masked = self._is_masked(dry_run)
        super().setup(dry_run)

    def adapter(self, student: Tensor, teacher: Tensor) -> nn.Module:
        return linear_adapter(student, teacher)

    def count(self, batch: Batch) -> int | Tensor:
        return lengths(batch).sum() if self.masked else batch.size

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        pairs = self.token_pairs(student, teacher, batch)
        return torch.stack([self.distance(mine, target) for mine, target in pairs]).sum(0)

    def token_pairs(self, student: Signals, teacher: Signals | None, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """The tokens of both models, pair by pair: adapted, and zero where they are padding."""
        pairs = []
        for adapter, pair in zip(self.adapters, self.feature_pairs(student, teacher), strict=True):
            mine, target = align(*pair)
            both = to_tokens(adapter(mine).to(target.dtype)), to_tokens(target)
            pairs.append((self.unpadded(both[0], batch), self.unpadded(both[1], batch)))
        return pairs

    def unpadded(self, feature: Tensor, batch: Batch) -> Tensor:
        """Tokens with zeros for padding, whatever stands there."""
        if not self.masked:
            return feature
        return feature.masked_fill(token_mask(batch, feature).unsqueeze(2) == 0, 0)

    def over_tokens(self, values: Tensor) -> Tensor:
        """For each sample (N,) the sum of its tokens' values (N, ...), or their mean where none can be padding."""
        return values.flatten(1).sum(1) if self.masked else values.flatten(1).mean(1)

    def _is_masked(self, dry_run: DryRun) -> bool:
        """Whether there is padding to leave out. Raises ConfigError where a tap's positions are not the tokens."""
        mask = _padding_mask(dry_run.batch)
        features = [f for pair in self.feature_pairs(dry_run.student, dry_run.teacher) for f in pair]
        if mask is None or all(feature.ndim != self.rank for feature in features):
            return False
        num_tokens = mask.shape[1]
        for feature in features:
            if feature.ndim != self.rank or any(feature.shape[axis] != num_tokens for axis in self.token_axes):
                shape = tuple(feature.shape)
                message = f"the batch says which of its {num_tokens} tokens are padding, and a tap gives {shape}"
                hint = "tap places with one state a token in both models; other places in a term of their own"
                raise ConfigError(Problem(message, key="taps", hint=hint))
        return True


def check_padding(loss: Loss, dry_run: DryRun) -> None:
    """Raises ConfigError where a loss would compare padding: it is given states of tokens, and knows no mask."""
    mask = _padding_mask(dry_run.batch)
    if mask is None or loss.leaves_padding_out or not loss.taps:
        return
    pairs = loss.feature_pairs(dry_run.student, dry_run.teacher) if dry_run.teacher is not None else []
    for pair in pairs:
        for feature in pair:
            if feature.ndim > 2 and mask.shape[1] in (feature.shape[1], feature.shape[-1]):
                message = f"a tap gives {tuple(feature.shape)}, and the padding among these tokens would count"
                hint = (
                    "hidden_mse, cosine, token_relations and attention_mse leave it out; or tap vectors (bert.pooler)"
                )
                raise ConfigError(Problem(message, key="taps", hint=hint))


def lengths(batch: Batch) -> Tensor:
    """How many tokens each sample has without padding (N,), of a batch that says so."""
    mask = _padding_mask(batch)
    assert mask is not None
    return (mask != 0).sum(1)


def to_tokens(feature: Tensor) -> Tensor:
    """A map, tokens or vectors as tokens (B, L, D)."""
    if feature.ndim == 4:
        return feature.flatten(2).transpose(1, 2)
    return feature.unsqueeze(1) if feature.ndim == 2 else feature


def unit(feature: Tensor) -> Tensor:
    """Vectors along the last axis scaled to length one; one that is zero stays so, with a finite gradient."""
    return feature * (feature.square().sum(-1, keepdim=True) + _NORM_EPS).rsqrt()


def _padding_mask(batch: Batch) -> Tensor | None:
    """(B, L), nothing or 0 for padding; None where the batch has no sequences."""
    mask = batch.extra.get("attention_mask", batch.keep)
    return mask if mask is not None and mask.ndim == 2 else None
