"""What is learnt of the tokens of texts: a class of each word, the token that comes next, or one that is hidden."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from kdctl.signals import IGNORE, Batch, Signals
from kdctl.tasks.base import Metric, Task, found_logits
from kdctl.tasks.classification import Classification, as_array, cross_entropy, percent


class TokenClassification(Classification):
    """One of C classes a word, on its first token: cross entropy, top-1 over words."""

    target: ClassVar[str] = "tags"

    def signals(self, outputs: Any, batch: Batch, features: Mapping[str, Tensor] | None = None) -> Signals:
        """Logits (N, L, C), of which the rows count that `batch.keep` names."""
        return _token_signals(outputs, batch, features)

    def outcome(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The logits of each word that has a label (R, C), and its class."""
        labelled = batch.targets != IGNORE
        return logits[labelled].float(), batch.targets[labelled]

    def rows_of(self, batch: Batch) -> Tensor:
        return (batch.targets != IGNORE).sum(1)


class CausalLM(Task):
    """The token after each token: cross entropy, perplexity.

    Of the logits at each place, (log probability of what came, token chosen) is kept for measuring.
    """

    primary: ClassVar[str] = "top1"
    target: ClassVar[str] = "next"

    def signals(self, outputs: Any, batch: Batch, features: Mapping[str, Tensor] | None = None) -> Signals:
        """Logits (N, L, V), of which the rows count that `batch.keep` names."""
        return _token_signals(outputs, batch, features)

    def supervised(
        self, student: Signals, batch: Batch, *, label_smoothing: float = 0.0, **_: Any
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Cross entropy of each token that is asked about, as in classification."""
        return {"ce": cross_entropy(student, batch, label_smoothing)}

    def outcome(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Of each token that is known: its log probability and the token chosen (R, 2), and which it is."""
        known = batch.targets != IGNORE
        rows, targets = logits[known].float(), batch.targets[known]
        log_p = rows.gather(1, targets[:, None]) - rows.logsumexp(1, keepdim=True)
        return torch.cat([log_p, rows.argmax(1, keepdim=True).float()], 1), targets

    def rows_of(self, batch: Batch) -> Tensor:
        return (batch.targets != IGNORE).sum(1)

    def score(self, metrics: Mapping[str, float]) -> float:
        """The lowest perplexity picks the best checkpoint."""
        return -metrics["nll"]

    def metrics(self) -> dict[str, Metric]:
        return {"top1": _chosen_right, "perplexity": perplexity, "nll": _nll}

    def agreement(self, logits_a: ArrayLike, logits_b: ArrayLike) -> float:
        """Percent of places at which two models choose the same token."""
        return percent(_chosen(logits_a) == _chosen(logits_b))

    def chance(self, targets: ArrayLike) -> float:
        """Top-1 of always answering the most frequent token, in percent."""
        truth = as_array(targets).astype(np.int64)
        return 100 * float(np.bincount(truth).max()) / truth.size if truth.size else float("nan")


class MaskedLM(CausalLM):
    """Tokens that are hidden behind the tokenizer's mask, 15 % of them: cross entropy, perplexity.

    Every token that is asked about is hidden; BERT left a tenth of them and put another in the place of a tenth. Which
    ones they are is a function of the text and its view, and in measuring always the same.
    Source: Devlin et al., BERT, NAACL 2019, section 3.1.
    """

    target: ClassVar[str] = "hidden"


def perplexity(outcomes: ArrayLike, targets: ArrayLike) -> float:
    """exp of the mean negative log probability of the tokens; infinite where that has no float."""
    nll = _nll(outcomes, targets)
    return math.exp(nll) if nll < 700 else math.inf if nll >= 700 else nll


def _nll(outcomes: ArrayLike, targets: ArrayLike) -> float:
    log_p = as_array(outcomes)[:, 0]
    return -float(log_p.mean()) if log_p.size else float("nan")


def _chosen_right(outcomes: ArrayLike, targets: ArrayLike) -> float:
    return percent(_chosen(outcomes) == as_array(targets).astype(np.int64))


def _chosen(outcomes: ArrayLike) -> NDArray[np.int64]:
    return as_array(outcomes)[:, 1].astype(np.int64)


def _token_signals(outputs: Any, batch: Batch, features: Mapping[str, Tensor] | None) -> Signals:
    logits = found_logits(outputs, 3, batch, "a model for it answers for each token")
    return Signals(logits, "softmax", dict(features or {}), keep=batch.keep, class_dim=2)
