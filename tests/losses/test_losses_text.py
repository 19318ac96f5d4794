"""Losses of hidden states against formulas written out in numpy, and what padding may not do to any loss of texts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from padded_texts import LENGTHS, MAPS, arrays, cut, padded, unit
from torch import nn

from kdctl.errors import ConfigError

TOKENWISE = ["hidden_mse", "cosine", "text_nst", "text_fsp", "attention_mse", "attention_kl", "token_relations"]
ARGUMENTS: dict[str, dict[str, Any]] = {"token_relations": {"heads": 5}}


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
