"""How several teachers teach together: weights of their answers, unit by unit (samples, or rows of logits).

K teachers, R rows of logits, N samples, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdctl.config.types import NonNegativeInt, Positive
from kdctl.errors import ConfigError, Problem, counted
from kdctl.signals import Batch, Signals


class Combination:
    """Weighs what each of K teachers says. The weights of a row add up to 1 but for a `variant` that says otherwise."""

    needs_logits: ClassVar[bool] = False
    """Whether the weights hang on what the teachers say."""
    batchwise: ClassVar[bool] = False
    """Whether the weights hang on the batch as a whole, so that micro-batches would change them."""
    links: ClassVar[tuple[str, ...]] = ("softmax", "sigmoid", "identity", "embedding")
    """The kinds of logits (Task.link) that it can weigh teachers by."""

    def weights(self, members: Sequence[Signals], batch: Batch) -> Tensor:
        """(K, R): what each teacher weighs in each row of logits. No gradient flows through it."""
        raise NotImplementedError

    def combine(self, values: Sequence[Tensor], student: Signals, members: Sequence[Signals], batch: Batch) -> Tensor:
        """The sum of a term over the units of a batch, from the term's values against each teacher.

        values: (R,) or (N,) each, or scalars where the term is defined on the batch as a whole: the mean weights of a
        sample's rows, or of all rows, hold there.
        """
        return sum_weighted(values, self.weights(members, batch), batch)


def sum_weighted(values: Sequence[Tensor], weights_KR: Tensor, batch: Batch) -> Tensor:
    """sum over teachers and units of weight x value; weights are averaged where a unit has several rows."""
    stacked = torch.stack(list(values))
    if stacked.ndim == 1:
        return (weights_KR.mean(1) * stacked).sum()
    if stacked.shape != weights_KR.shape:
        weights_KR = _by_sample(weights_KR, batch)
    return (weights_KR * stacked).sum()


def _by_sample(weights_KR: Tensor, batch: Batch) -> Tensor:
    """(K, N): the mean weights of each sample's rows; 1 / K where a sample has none that counts."""
    if batch.keep is None:
        return weights_KR.unflatten(1, (batch.size, -1)).mean(2)
    kept_NL = batch.keep.flatten(1)
    owner_R = torch.nonzero(kept_NL)[:, 0]
    sums_KN = weights_KR.new_zeros(len(weights_KR), batch.size).index_add_(1, owner_R, weights_KR)
    rows_N = kept_NL.sum(1)
    return torch.where(rows_N > 0, sums_KN / rows_N.clamp_min(1), 1 / len(weights_KR))


def uniform(members: Sequence[Signals]) -> Tensor:
    """(K, R) of 1 / K."""
    rows = members[0].rows()
    return rows.new_full((len(members), len(rows)), 1 / len(members))


class MeanLogits(Combination):
    """The teachers speak with one voice: terms see the mean of their logits.

    Formula: z_t = sum over k of z_k / K. A term with taps compares with each teacher's features and averages.
    Paper: Hinton, Vinyals & Dean, Distilling the Knowledge in a Neural Network, NeurIPS workshop 2014 (ensembles).
    """

    def weights(self, members: Sequence[Signals], batch: Batch) -> Tensor:
        return uniform(members)


class Mean(Combination):
    """Each term against each teacher, averaged.

    Formula: sum over k of L(student, teacher k) / K.
    Paper: You et al., Learning from Multiple Teacher Networks, KDD 2017; AVER in the literature after it.
    """

    def weights(self, members: Sequence[Signals], batch: Batch) -> Tensor:
        return uniform(members)


class Weighted(Combination):
    """Each term against each teacher, with weights of your choice.

    Formula: sum over k of w_k L(student, teacher k), w scaled to add up to 1.

    weights: one number above 0 a teacher, in their order.
    """

    def __init__(self, *, weights: list[Positive]) -> None:
        self._weights = weights

    def weights(self, members: Sequence[Signals], batch: Batch) -> Tensor:
        if len(self._weights) != len(members):
            message = f"{counted(len(self._weights), 'weight')} for {counted(len(members), 'teacher')}"
            raise ConfigError(Problem(message, key="ensemble.weights", hint="one a teacher, in their order"))
        rows = members[0].rows()
        return rows.new_tensor(self._weights)[:, None].expand(-1, len(rows)) / sum(self._weights)


def _told_apart(shares_KR: Tensor, variant: str) -> Tensor:
    """(1 - share) of each teacher, scaled to add up to 1 (`normalized`) or divided by K as the codes do."""
    num_teachers = len(shares_KR)
    return (1 - shares_KR) / (max(num_teachers - 1, 1) if variant == "normalized" else num_teachers)


class Entropy(Combination):
    """Teachers weighted sample by sample by their certainty.

    Formula: w_k = (1 - H_k / sum over j of H_j) / (K - 1), H the entropy of teacher k's probabilities of the sample.
    Paper: Kwon et al., Adaptive Knowledge Distillation Based on Entropy, ICASSP 2020 (EBKD).

    variant: `normalized` weights add up to 1; `code` divides by K instead of K - 1, as CA-MKD's repository does.
    """

    needs_logits: ClassVar[bool] = True
    links: ClassVar[tuple[str, ...]] = ("softmax",)

    def __init__(self, *, variant: Literal["normalized", "code"] = "normalized") -> None:
        self.variant = variant

    def weights(self, members: Sequence[Signals], batch: Batch) -> Tensor:
        entropies_KR = torch.stack([_entropy(member.rows()) for member in members])
        total = entropies_KR.sum(0)
        shares = torch.where(total > 0, entropies_KR / total.clamp_min(1e-30), 1 / len(members))
        return _told_apart(shares, self.variant)


class Confidence(Combination):
    """Teachers weighted sample by sample by how well they know the label.

    Formula: w_k = (1 - softmax over teachers of CE_k) / (K - 1), CE_k the cross entropy of teacher k with the label.
        Unlabelled samples weigh all teachers alike.
    Paper: Zhang, Chen & Wang, Confidence-Aware Multi-Teacher Knowledge Distillation, ICASSP 2022, eq. 3.

    variant: `normalized` weights add up to 1, as in the paper; `code` divides by K as well, as its repository does.
    """

    needs_logits: ClassVar[bool] = True
    links: ClassVar[tuple[str, ...]] = ("softmax",)

    def __init__(self, *, variant: Literal["normalized", "code"] = "normalized") -> None:
        self.variant = variant

    def weights(self, members: Sequence[Signals], batch: Batch) -> Tensor:
        losses_KR, labelled_R = cross_entropies(members, batch)
        shares = torch.where(labelled_R, losses_KR.softmax(0), 1 / len(members))
        weights = _told_apart(shares, "normalized")
        return weights if self.variant == "normalized" else weights / len(members)


class Best(Combination):
    """Each sample is taught by the one teacher that knows it best.

    Formula: the teacher with the least cross entropy with the label; of unlabelled samples, the least entropy.
    Paper: sample-wise teacher selection as in Yuan et al., Reinforced Multi-Teacher Selection, AAAI 2021, by rule.
    """

    needs_logits: ClassVar[bool] = True
    links: ClassVar[tuple[str, ...]] = ("softmax",)

    def weights(self, members: Sequence[Signals], batch: Batch) -> Tensor:
        losses_KR, labelled_R = cross_entropies(members, batch)
        entropies_KR = torch.stack([_entropy(member.rows()) for member in members])
        chosen_R = torch.where(labelled_R, losses_KR, entropies_KR).argmin(0)
        return F.one_hot(chosen_R, len(members)).to(losses_KR).T


class ClassGroups(Combination):
    """Each class is taught by the teacher of its group.

    Formula: w_k = 1 for samples whose label is in group k. A class in several groups shares its weight among them, and
        one in none is taught by all; so are unlabelled samples.

    groups: for each teacher, in their order, the numbers of its classes.
    """

    needs_logits: ClassVar[bool] = True  # their number of classes
    links: ClassVar[tuple[str, ...]] = ("softmax",)

    def __init__(self, *, groups: list[list[NonNegativeInt]]) -> None:
        self.groups = groups

    def weights(self, members: Sequence[Signals], batch: Batch) -> Tensor:
        if len(self.groups) != len(members):
            message = f"{counted(len(self.groups), 'group')} for {counted(len(members), 'teacher')}"
            raise ConfigError(Problem(message, key="ensemble.groups", hint="one a teacher, in their order"))
        rows = members[0].rows()
        table_KC = rows.new_zeros(len(members), rows.shape[1])
        for number, group in enumerate(self.groups):
            if any(label >= rows.shape[1] for label in group):
                message = f"there are {rows.shape[1]} classes, numbered from 0; got {max(group)}"
                raise ConfigError(Problem(message, key=f"ensemble.groups.{number}"))
            table_KC[number, group] = 1
        table_KC[:, table_KC.sum(0) == 0] = 1
        labels_R, labelled_R = batch.row_labels()
        weights = torch.where(labelled_R, table_KC[:, labels_R], 1.0)
        return weights / weights.sum(0)


def cross_entropies(members: Sequence[Signals], batch: Batch) -> tuple[Tensor, Tensor]:
    """(K, R): each teacher's cross entropy with the label, and which rows have one (R,)."""
    labels_R, labelled_R = batch.row_labels()
    losses = [F.cross_entropy(member.rows(), labels_R, reduction="none") for member in members]
    return torch.stack(losses), labelled_R


def _entropy(logits_RC: Tensor) -> Tensor:
    log_p = F.log_softmax(logits_RC, dim=1)
    return -(log_p.exp() * log_p).sum(1)
