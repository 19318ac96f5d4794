"""Losses of hidden states and attention against formulas written out in numpy, and what padding may not do to them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdctl.errors import ConfigError
from kdctl.signals import Batch, Signals

Given = tuple[Signals, Signals, Batch]
LENGTHS = [4, 1, 3]
TOKENWISE = ["hidden_mse", "cosine", "text_nst", "text_fsp", "attention_mse", "attention_kl", "token_relations"]
MAPS = ("attention_mse", "attention_kl")
ARGUMENTS: dict[str, dict[str, Any]] = {"token_relations": {"heads": 5}}


def cut(given: Given, rows: slice) -> Given:
    """The samples at these rows."""
    student, teacher = (
        Signals(s.logits[rows], features={tap: f[rows] for tap, f in s.features.items()}) for s in given[:2]
    )
    return student, teacher, given[2].take(rows)


def padded(kind: str, lengths: list[int], padded_to: int, padding: float, key: str = "attention_mask") -> Given:
    """Sequences of the same random states, whatever the padding; the mask as `extra` or as `keep`."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(padded_to) < torch.tensor(lengths)[:, None]
    sides = []
    for learns in (True, False):
        features = {}
        for tap in ("f", "g")[: 1 if kind in MAPS else 2]:
            width = (2, padded_to, padded_to) if kind in MAPS else (padded_to, 5)
            feature = torch.full((len(lengths), *width), padding, dtype=torch.float64)
            for row, n in enumerate(lengths):
                if kind in MAPS:
                    feature[row, :, :n, :n] = torch.randn(2, n, n, generator=generator, dtype=torch.float64)
                else:
                    feature[row, :n] = torch.randn(n, 5, generator=generator, dtype=torch.float64)
            features[tap] = feature.requires_grad_(learns)
        sides.append(Signals(torch.zeros(len(lengths), 2, dtype=torch.float64), features=features))
    index = torch.arange(len(lengths))
    keep, extra = (None, {key: mask.long()}) if key == "attention_mask" else (mask, {})
    return sides[0], sides[1], Batch(torch.zeros(len(lengths), 1), index, index, index, keep, extra)


def arrays(given: Given, tap: str = "f") -> tuple[Any, Any]:
    return given[0].features[tap].detach().numpy(), given[1].features[tap].numpy()


def unit(rows: Any) -> Any:
    return rows / np.sqrt((rows**2).sum(-1, keepdims=True))


@pytest.mark.parametrize("kind", TOKENWISE)
class TestPadding:
    @pytest.mark.parametrize("padding", [7.0, float("nan"), float("inf")])
    @pytest.mark.parametrize("key", ["attention_mask", "keep"])
    def test_changes_nothing(self, kind: str, padding: float, key: str, build: Callable[..., Any]) -> None:
        short, long = padded(kind, LENGTHS, 4, 0.0, key), padded(kind, LENGTHS, 9, padding, key)
        loss = build(kind, short, **ARGUMENTS.get(kind, {}))
        value = loss(*long)
        assert int(loss.count(long[2])) == int(loss.count(short[2]))
        assert value.item() == pytest.approx(loss(*short).item(), rel=1e-12)
        value.backward()
        gradient = long[0].features["f"].grad
        assert gradient.isfinite().all() and gradient[0].any()
        outside = gradient[1, :, 1:] if kind in MAPS else gradient[1, 1:]
        assert not outside.any()

    def test_split_changes_nothing(self, kind: str, build: Callable[..., Any]) -> None:
        given = padded(kind, LENGTHS, 6, 7.0)
        loss = build(kind, given, **ARGUMENTS.get(kind, {}))
        parts = [cut(given, slice(0, 1)), cut(given, slice(1, 3))]
        assert sum(loss(*part).item() for part in parts) == pytest.approx(loss(*given).item(), rel=1e-12)
        assert sum(int(loss.count(part[2])) for part in parts) == int(loss.count(given[2]))

    def test_a_sample_without_a_token_adds_nothing(self, kind: str, build: Callable[..., Any]) -> None:
        given, without = padded(kind, [4, 0, 3], 4, float("nan")), padded(kind, [4, 3], 4, 0.0)
        loss = build(kind, given, **ARGUMENTS.get(kind, {}))
        value = loss(*given)
        value.backward()
        assert value.item() == pytest.approx(loss(*without).item(), rel=1e-12)
        assert given[0].features["f"].grad.isfinite().all() and not given[0].features["f"].grad[1].any()

    def test_adapters_do_not_fill_it(self, kind: str, build: Callable[..., Any]) -> None:
        if kind in (*MAPS, "token_relations"):
            pytest.skip("has no adapters")
        short, long = padded(kind, LENGTHS, 4, 0.0), padded(kind, LENGTHS, 7, 3.0)
        for given in (short, long):
            for tap, feature in given[0].features.items():
                given[0].features[tap] = feature.detach()[..., :3].requires_grad_(True)
        loss = build(kind, short, **ARGUMENTS.get(kind, {}))
        assert [type(adapter) for adapter in loss.adapters] == 2 * [nn.Identity if kind == "text_nst" else nn.Linear]
        assert loss(*long).item() == pytest.approx(loss(*short).item(), rel=1e-12)

    def test_a_tap_of_other_positions_is_refused(self, kind: str, build: Callable[..., Any]) -> None:
        given = padded(kind, LENGTHS, 6, 0.0)
        given[2].extra["attention_mask"] = given[2].extra["attention_mask"][:, :5]
        with pytest.raises(ConfigError, match="which of its 5 tokens are padding"):
            build(kind, given, **ARGUMENTS.get(kind, {}))


class TestHiddenMSE:
    def test_sums_over_tokens_that_are_not_padding(self, build: Callable[..., Any]) -> None:
        given = padded("hidden_mse", LENGTHS, 6, 7.0)
        expected = 0.0
        for tap in "fg":
            s, t = arrays(given, tap)
            expected += sum(((s[i, :n] - t[i, :n]) ** 2).mean(1).sum() for i, n in enumerate(LENGTHS))
        loss = build("hidden_mse", given)
        assert loss(*given).item() == pytest.approx(expected, rel=1e-12)
        assert int(loss.count(given[2])) == 8

    @pytest.mark.parametrize("shape", [(5,), (6, 5), (5, 3, 2)])
    def test_any_layout_without_a_mask(
        self, shape: Any, example: Callable[..., Any], build: Callable[..., Any]
    ) -> None:
        given = example(student=shape, teacher=shape)
        s, t = arrays(given)
        loss = build("hidden_mse", given)
        assert (loss(*given) / loss.count(given[2])).item() == pytest.approx(((s - t) ** 2).mean(), rel=1e-12)

    def test_vectors_beside_an_attention_mask(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        student, teacher, batch = example(student=(5,), teacher=(5,))
        batch.extra["attention_mask"] = torch.ones(4, 9)
        loss = build("hidden_mse", (student, teacher, batch))
        s, t = arrays((student, teacher, batch))
        assert int(loss.count(batch)) == 4
        assert loss(student, teacher, batch).item() == pytest.approx(4 * ((s - t) ** 2).mean(), rel=1e-12)

    def test_tokens_beside_vectors_are_refused_where_there_is_padding(self, build: Callable[..., Any]) -> None:
        """Their mean over positions would take padding in."""
        student, teacher, batch = padded("hidden_mse", LENGTHS, 6, 0.0)
        teacher.features["f"] = teacher.features["f"][:, 0]
        with pytest.raises(ConfigError, match="are padding, and a tap gives"):
            build("hidden_mse", (student, teacher, batch))

    def test_a_linear_layer_adapts_widths(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        given = example(student=(6, 3), teacher=(6, 5))
        adapter = build("hidden_mse", given).adapters[0]
        assert isinstance(adapter, nn.Linear) and adapter.weight.shape == (5, 3)


class TestCosine:
    def test_sums_over_tokens_that_are_not_padding(self, build: Callable[..., Any]) -> None:
        given = padded("cosine", LENGTHS, 6, 7.0)
        expected = 0.0
        for tap in "fg":
            s, t = (unit(f) for f in arrays(given, tap))
            expected += sum((1 - (s * t).sum(2))[i, :n].sum() for i, n in enumerate(LENGTHS))
        loss = build("cosine", given)
        assert loss(*given).item() == pytest.approx(expected, rel=1e-9)
        assert int(loss.count(given[2])) == 8

    @pytest.mark.parametrize(("shape", "axis"), [((5,), 1), ((6, 5), 2), ((5, 3, 2), 1)])
    def test_any_layout_without_a_mask(
        self, shape: Any, axis: int, example: Callable[..., Any], build: Callable[..., Any]
    ) -> None:
        given = example(student=shape, teacher=shape)
        s, t = (np.moveaxis(f, axis, -1) for f in arrays(given))
        loss = build("cosine", given)
        expected = (1 - (unit(s) * unit(t)).sum(-1)).mean()
        assert (loss(*given) / loss.count(given[2])).item() == pytest.approx(expected, rel=1e-9)

    def test_states_that_nearly_agree_in_single_precision(
        self, example: Callable[..., Any], build: Callable[..., Any]
    ) -> None:
        """1 - cos of angle 1e-4 is 5e-9, which 1 - (nearly 1) cannot tell from 0 in float32."""
        student, teacher, batch = example(size=1, student=(2,), teacher=(2,), dtype=torch.float32)
        student.features["f"] = torch.tensor([[1.0, 1e-4]])
        teacher.features["f"] = torch.tensor([[3.0, 0.0]])
        value = build("cosine", (student, teacher, batch))(student, teacher, batch)
        assert value.item() == pytest.approx(5e-9, rel=1e-3)

    @pytest.mark.parametrize("kind", ["cosine", "pkd"])
    def test_a_dead_state_gives_finite_gradients(
        self, kind: str, example: Callable[..., Any], build: Callable[..., Any]
    ) -> None:
        student, teacher, batch = example(student=(4, 5), teacher=(4, 5))
        student.features["f"] = torch.zeros(4, 4, 5, dtype=torch.float64, requires_grad=True)
        value = build(kind, (student, teacher, batch))(student, teacher, batch)
        value.backward()
        assert value.isfinite() and student.features["f"].grad.isfinite().all()


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


def softmax(scores: Any) -> Any:
    raised = np.exp(scores - scores.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def kl(p: Any, q: Any) -> Any:
    return (p * np.log(p / q)).sum(-1)


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


class TestPKD:
    @pytest.mark.parametrize("shape", [(5,), (4, 5), (5, 3, 2)])
    def test_formula(self, shape: Any, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        given = example(size=3, student=shape, teacher=shape)
        s, t = arrays(given)
        states = [f[:, 0] if f.ndim == 3 else f.reshape(3, 5, -1).mean(2) for f in (s, t)]
        expected = ((unit(states[0]) - unit(states[1])) ** 2).sum()
        loss = build("pkd", given)
        assert loss(*given).item() == pytest.approx(expected, rel=1e-9)
        assert int(loss.count(given[2])) == 3

    def test_first_token_beside_a_vector(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        given = example(size=3, student=(4, 5), teacher=(5,))
        s, t = arrays(given)
        assert build("pkd", given)(*given).item() == pytest.approx(((unit(s[:, 0]) - unit(t)) ** 2).sum(), rel=1e-9)

    def test_a_linear_layer_adapts_widths(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        given = example(student=(4, 3), teacher=(6, 5))
        adapter = build("pkd", given).adapters[0]
        assert isinstance(adapter, nn.Linear) and adapter.weight.shape == (5, 3)

    def test_only_the_first_token_learns(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        given = example(student=(4, 5), teacher=(4, 5))
        build("pkd", given)(*given).backward()
        gradient = given[0].features["f"].grad
        assert gradient[:, 0].any() and not gradient[:, 1:].any()


class TestTextNST:
    @staticmethod
    def gram(first: Any, second: Any) -> Any:
        return first @ second.T / second.shape[1]

    @pytest.mark.parametrize("layers", ["consecutive", "same"])
    def test_sums_over_pairs_of_tokens_that_are_not_padding(self, layers: str, build: Callable[..., Any]) -> None:
        given = padded("text_nst", LENGTHS, 6, 7.0)
        (s1, t1), (s2, t2) = arrays(given, "f"), arrays(given, "g")
        pairs = [(s1, s2, t1, t2)] if layers == "consecutive" else [(s1, s1, t1, t1), (s2, s2, t2, t2)]
        expected = 0.0
        for a, b, c, d in pairs:
            for i, n in enumerate(LENGTHS):
                expected += ((self.gram(a[i, :n], b[i, :n]) - self.gram(c[i, :n], d[i, :n])) ** 2).sum()
        loss = build("text_nst", given, layers=layers)
        assert loss(*given).item() == pytest.approx(expected, rel=1e-12)
        assert int(loss.count(given[2])) == 4**2 + 1**2 + 3**2

    def test_widths_differ_and_a_single_tap(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        given = example(size=2, student=(4, 3), teacher=(4, 5))
        s, t = arrays(given)
        expected = sum(((self.gram(s[i], s[i]) - self.gram(t[i], t[i])) ** 2).mean() for i in range(2))
        loss = build("text_nst", given)
        assert not list(loss.parameters())
        assert loss(*given).item() == pytest.approx(expected, rel=1e-12)

    def test_three_taps_make_two_pairs(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        given = example(size=2, student=[(4, 3)] * 3, teacher=[(4, 5)] * 3)
        taps = [arrays(given, tap) for tap in "fgh"]
        expected = 0.0
        for (s1, t1), (s2, t2) in pairwise(taps):
            expected += sum(((self.gram(s1[i], s2[i]) - self.gram(t1[i], t2[i])) ** 2).mean() for i in range(2))
        assert build("text_nst", given)(*given).item() == pytest.approx(expected, rel=1e-12)

    def test_maps_are_one_token_a_position(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        given = example(size=2, student=(3, 2, 4), teacher=(5, 2, 4))
        s, t = (f.reshape(2, f.shape[1], 8).transpose(0, 2, 1) for f in arrays(given))
        expected = sum(((self.gram(s[i], s[i]) - self.gram(t[i], t[i])) ** 2).mean() for i in range(2))
        assert build("text_nst", given)(*given).item() == pytest.approx(expected, rel=1e-12)

    def test_consecutive_layers_of_other_widths_are_refused(
        self, example: Callable[..., Any], build: Callable[..., Any]
    ) -> None:
        given = example(size=2, student=[(4, 3), (4, 3)], teacher=[(4, 5), (4, 7)])
        with pytest.raises(ConfigError, match="the teacher's taps are 5, 7 wide"):
            build("text_nst", given)
        build("text_nst", given, layers="same")

    def test_other_tokens_are_refused(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        with pytest.raises(ConfigError, match="the numbers of tokens differ"):
            build("text_nst", example(student=(4, 3), teacher=(5, 3)))


class TestTextFSP:
    def test_averages_over_tokens_that_are_not_padding(self, build: Callable[..., Any]) -> None:
        given = padded("text_fsp", LENGTHS, 6, 7.0)
        (s1, t1), (s2, t2) = arrays(given, "f"), arrays(given, "g")
        expected = 0.0
        for i, n in enumerate(LENGTHS):
            flow = (s1[i, :n].T @ s2[i, :n] - t1[i, :n].T @ t2[i, :n]) / n
            expected += (flow**2).mean()
        loss = build("text_fsp", given)
        assert loss(*given).item() == pytest.approx(expected, rel=1e-12)
        assert int(loss.count(given[2])) == 3

    def test_three_taps_make_two_flows(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        given = example(size=2, student=[(4, 3)] * 3, teacher=[(4, 3)] * 3)
        expected = 0.0
        for (s1, t1), (s2, t2) in pairwise([arrays(given, tap) for tap in "fgh"]):
            expected += sum((((s1[i].T @ s2[i] - t1[i].T @ t2[i]) / 4) ** 2).mean() for i in range(2))
        assert build("text_fsp", given)(*given).item() == pytest.approx(expected, rel=1e-12)

    def test_a_linear_layer_for_each_tap(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        given = example(student=[(4, 3), (4, 2)], teacher=[(4, 5), (4, 6)])
        shapes = [tuple(adapter.weight.shape) for adapter in build("text_fsp", given).adapters]
        assert shapes == [(5, 3), (6, 2)]

    def test_one_tap_is_refused(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        with pytest.raises(ConfigError, match="the flow between taps"):
            build("text_fsp", example(student=(4, 3), teacher=(4, 3)))

    def test_taps_of_other_sizes_are_refused(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        shapes = [(3, 4, 4), (3, 2, 2)]
        with pytest.raises(ConfigError, match="different numbers of tokens: 16, 4"):
            build("text_fsp", example(student=shapes, teacher=shapes))


@pytest.mark.parametrize("kind", TOKENWISE)
def test_distances_are_in_full_precision_under_autocast(kind: str, build: Callable[..., Any]) -> None:
    student, teacher, batch = padded(kind, LENGTHS, 4, 0.0)
    given = student.map(lambda x: x.detach().float()), teacher.map(lambda x: x.detach().float()), batch
    loss = build(kind, given, **ARGUMENTS.get(kind, {}))
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*given)
    torch.testing.assert_close(value, loss(*given), rtol=1e-6, atol=0)
