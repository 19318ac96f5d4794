"""Tasks on tokens: what losses see, and what is measured."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kdctl import registry
from kdctl.errors import ConfigError
from kdctl.losses.kd import KD
from kdctl.signals import IGNORE, Batch
from kdctl.tasks.tokens import CausalLM, MaskedLM, TokenClassification


def batch() -> Batch:
    targets = torch.tensor([[3, 1, IGNORE], [2, IGNORE, IGNORE]])
    index = torch.arange(2)
    return Batch(torch.ones(2, 3, dtype=torch.int64), targets, index, index, keep=targets != IGNORE)


LOGITS = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4).sin() * 3


@pytest.mark.parametrize("task", [CausalLM(), MaskedLM(), TokenClassification()])
def test_losses_see_the_rows_of_the_tokens_that_are_asked_about(task: CausalLM) -> None:
    signals = task.signals(LOGITS, batch())
    rows = LOGITS[batch().targets != IGNORE]
    assert signals.rows().equal(rows)
    value, count = task.supervised(signals, batch())["ce"]
    expected = torch.nn.functional.cross_entropy(rows, torch.tensor([3, 1, 2]), reduction="sum")
    torch.testing.assert_close(value, expected)
    assert int(count) == 3 and int(task.num_labelled(batch())) == 3
    loss = KD(temperature=2)
    assert loss.values(signals, task.signals(LOGITS.flip(2), batch()), batch()).shape == (3,)
    assert int(loss.count(batch())) == 3


def test_tokens_without_an_answer_teach_and_are_not_learnt() -> None:
    given = batch()
    given.targets = torch.tensor([[3, IGNORE, IGNORE], [IGNORE, IGNORE, IGNORE]])
    task = CausalLM()
    signals = task.signals(LOGITS, given)
    value, count = task.supervised(signals, given)["ce"]
    assert int(count) == 1 and float(value) == pytest.approx(-float(LOGITS[0, 0].log_softmax(0)[3]), rel=1e-5)
    assert int(KD().count(given)) == 3


def test_perplexity_by_hand() -> None:
    task = CausalLM()
    kept, targets = task.outcome(LOGITS, batch())
    log_p = LOGITS.log_softmax(2)
    nll = -float(log_p[0, 0, 3] + log_p[0, 1, 1] + log_p[1, 0, 2]) / 3
    found = {name: metric(kept, targets) for name, metric in task.metrics().items()}
    assert found["nll"] == pytest.approx(nll, rel=1e-6) and found["perplexity"] == pytest.approx(
        math.exp(nll), rel=1e-6
    )
    right = [int(LOGITS[0, 0].argmax()) == 3, int(LOGITS[0, 1].argmax()) == 1, int(LOGITS[1, 0].argmax()) == 2]
    assert found["top1"] == pytest.approx(100 * sum(right) / 3)
    assert task.rows_of(batch()).tolist() == [2, 1] and targets.tolist() == [3, 1, 2]
    assert task.score(found) == -found["nll"]
    assert task.agreement(kept, kept) == 100 and task.chance(np.array([1, 1, 2, 5])) == 50


def test_perplexity_that_no_float_holds_is_infinite() -> None:
    metrics = CausalLM().metrics()
    assert metrics["perplexity"](np.array([[-1e5, 0.0]]), np.array([1])) == math.inf
    assert math.isnan(metrics["perplexity"](np.zeros((0, 2)), np.zeros(0)))


def test_words_are_measured_as_samples_are() -> None:
    task = TokenClassification()
    kept, targets = task.outcome(LOGITS, batch())
    assert kept.equal(LOGITS[batch().targets != IGNORE]) and targets.tolist() == [3, 1, 2]
    assert task.metrics()["top1"](kept, targets) == pytest.approx(
        100 * float((kept.argmax(1) == targets).float().mean()), rel=1e-6
    )


def test_a_model_that_answers_for_the_text_as_a_whole_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(2, tokens, classes\); the model gave shape \(2, 4\)"):
        CausalLM().signals(torch.zeros(2, 4), batch())


def test_the_tasks_are_in_the_table() -> None:
    for kind in ("causal_lm", "masked_lm", "token_classification"):
        assert registry.create("tasks", kind, {}).target in ("next", "hidden", "tags")
