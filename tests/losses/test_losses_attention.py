"""Losses of attention against formulas written out in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from padded_texts import LENGTHS, arrays, padded

from kdctl.errors import ConfigError
from kdctl.signals import Signals


def softmax(scores: Any) -> Any:
    raised = np.exp(scores - scores.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def kl(p: Any, q: Any) -> Any:
    return (p * np.log(p / q)).sum(-1)


class TestAttentionMSE:
    def test_sums_over_pairs_of_tokens_that_are_not_padding(self, build: Callable[..., Any]) -> None:
        given = padded("attention_mse", LENGTHS, 6, 7.0)
        s, t = arrays(given)
        expected = sum(((s - t) ** 2)[i, :, :n, :n].mean(0).sum() for i, n in enumerate(LENGTHS))
        loss = build("attention_mse", given)
        assert loss(*given).item() == pytest.approx(expected, rel=1e-12)
        assert int(loss.count(given[2])) == 4**2 + 1**2 + 3**2

    def test_without_a_mask(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        given = example(student=(3, 5, 5), teacher=(3, 5, 5))
        s, t = arrays(given)
        loss = build("attention_mse", given)
        assert (loss(*given) / loss.count(given[2])).item() == pytest.approx(((s - t) ** 2).mean(), rel=1e-12)

    def test_mean_over_heads(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        given = example(student=(2, 5, 5), teacher=(3, 5, 5))
        s, t = (f.mean(1) for f in arrays(given))
        value = build("attention_mse", given, heads="mean")(*given) / 4
        assert value.item() == pytest.approx(((s - t) ** 2).mean(), rel=1e-12)

    @pytest.mark.parametrize("out", [-1e4, torch.finfo(torch.float32).min, -float("inf")])
    @pytest.mark.parametrize("heads", ["each", "mean"])
    def test_masked_out_scores_are_0(
        self, out: float, heads: str, example: Callable[..., Any], build: Callable[..., Any]
    ) -> None:
        student, teacher, batch = example(student=(2, 5, 5), teacher=(2, 5, 5))
        loss, values = build("attention_mse", (student, teacher, batch), heads=heads), []
        for masked in (False, True):
            sides = []
            for signals in (student, teacher):
                scores = signals.features["f"].detach().clone()
                scores[:, :, :, 3:] = scores[:, :, :, 3:] + out if masked else 0
                sides.append(Signals(signals.logits, features={"f": scores.requires_grad_(signals is student)}))
            values.append(loss(*sides, batch))
        values[1].backward()
        assert values[1].item() == pytest.approx(values[0].item(), rel=1e-12)
        assert sides[0].features["f"].grad.isfinite().all()

    def test_scores_that_are_negative_count(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        student, teacher, batch = example(student=(2, 5, 5), teacher=(2, 5, 5))
        student.features["f"] = torch.full((4, 2, 5, 5), -9.0, dtype=torch.float64)
        teacher.features["f"] = torch.full((4, 2, 5, 5), -1.0, dtype=torch.float64)
        assert build("attention_mse", (student, teacher, batch))(student, teacher, batch).item() == 4 * 64

    @pytest.mark.parametrize(
        ("student", "teacher", "message"),
        [
            ((2, 5, 5), (3, 5, 5), "the numbers of heads differ"),
            ((2, 5, 5), (2, 6, 6), "the numbers of tokens differ"),
            ((5, 8), (5, 8), "attention maps"),
        ],
    )
    def test_what_cannot_be_compared_is_refused(
        self, student: Any, teacher: Any, message: str, example: Callable[..., Any], build: Callable[..., Any]
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            build("attention_mse", example(student=student, teacher=teacher))


class TestAttentionKL:
    @pytest.mark.parametrize("of", ["scores", "probabilities"])
    def test_sums_over_tokens_that_are_not_padding(self, of: str, build: Callable[..., Any]) -> None:
        given = padded("attention_kl", LENGTHS, 6, 7.0)
        s, t = arrays(given)
        inside = [(softmax(t[i, :, :n, :n]), softmax(s[i, :, :n, :n])) for i, n in enumerate(LENGTHS)]
        expected = sum(kl(target, mine).mean(0).sum() for target, mine in inside)
        if of == "probabilities":
            for side, values in zip(given[:2], (s, t), strict=True):
                maps = np.full_like(values, 7.0)
                for i, n in enumerate(LENGTHS):
                    maps[i, :, :n, :n] = softmax(values[i, :, :n, :n])
                side.features["f"] = torch.from_numpy(maps)
        loss = build("attention_kl", given, of=of)
        assert loss(*given).item() == pytest.approx(expected, rel=1e-9)
        assert int(loss.count(given[2])) == sum(LENGTHS)

    def test_without_a_mask(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        given = example(student=(3, 5, 5), teacher=(3, 5, 5))
        s, t = arrays(given)
        loss = build("attention_kl", given)
        value = (loss(*given) / loss.count(given[2])).item()
        assert value == pytest.approx(kl(softmax(t), softmax(s)).mean(), rel=1e-9)

    def test_other_numbers_of_heads_are_refused(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        with pytest.raises(ConfigError, match="heads differ: 2 and 3") as caught:
            build("attention_kl", example(student=(2, 5, 5), teacher=(3, 5, 5)))
        assert "token_relations" in str(caught.value)


class TestTokenRelations:
    @staticmethod
    def relation(states: Any, heads: int) -> Any:
        length, width = states.shape
        parts = states.reshape(length, heads, width // heads).transpose(1, 0, 2)
        return softmax(parts @ parts.transpose(0, 2, 1) / np.sqrt(width // heads))

    def test_sums_over_tokens_that_are_not_padding(self, build: Callable[..., Any]) -> None:
        given = padded("token_relations", LENGTHS, 6, 7.0)
        for tap in "fg":  # a student of another width than the teacher
            given[0].features[tap] = torch.cat([given[0].features[tap], given[0].features[tap].flip(2)], 2)
        expected = 0.0
        for tap in "fg":
            s, t = arrays(given, tap)
            for i, n in enumerate(LENGTHS):
                mine, target = (self.relation(side[i, :n], 5) for side in (s, t))
                expected += kl(target, mine).mean(0).sum()
        loss = build("token_relations", given, heads=5)
        assert loss(*given).item() == pytest.approx(expected, rel=1e-9)
        assert int(loss.count(given[2])) == sum(LENGTHS)

    @pytest.mark.parametrize(
        ("student", "teacher", "message"),
        [
            ((5, 8), (5, 12), "a width of 12 cannot be divided among 8 relation heads"),
            ((5, 8), (6, 8), "the numbers of tokens differ"),
            ((2, 5, 5), (2, 5, 5), "states of tokens"),
        ],
    )
    def test_what_cannot_be_compared_is_refused(
        self, student: Any, teacher: Any, message: str, example: Callable[..., Any], build: Callable[..., Any]
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            build("token_relations", example(student=student, teacher=teacher), heads=8)
