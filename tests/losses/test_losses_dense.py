"""cwd and pearson_feature against formulas written out in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdctl.errors import ConfigError
from kdctl.losses.base import DryRun
from kdctl.losses.cwd import CWD
from kdctl.signals import Batch, Signals
from kdctl.tasks.classification import Classification


def features(given: Any) -> tuple[Any, Any]:
    return given[0].features["f"].detach().numpy(), given[1].features["f"].numpy()


def channel_kl(s: Any, t: Any, temperature: float) -> Any:
    """The sum over samples of the formula of maps (B, C, H, W)."""
    s, t = (f.reshape(*f.shape[:2], -1) / temperature for f in (s, t))
    p_s, p_t = (np.exp(f) / np.exp(f).sum(2, keepdims=True) for f in (s, t))
    return temperature**2 * (p_t * np.log(p_t / p_s)).sum() / s.shape[1]


class TestCWD:
    @staticmethod
    def maps(student: tuple[int, ...], teacher: tuple[int, ...]) -> tuple[Signals, Signals, Batch]:
        generator = torch.Generator().manual_seed(0)
        s, t = (torch.randn(3, *shape, generator=generator, dtype=torch.float64) for shape in (student, teacher))
        index = torch.arange(3)
        return Signals(s.requires_grad_(True)), Signals(t), Batch(torch.zeros(3, 1), index, index, index)

    @staticmethod
    def without_taps(given: tuple[Signals, Signals, Batch]) -> CWD:
        loss = CWD()
        loss.setup(DryRun(Classification(), given[2], given[0], given[1], 3))
        return loss

    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_tapped_maps(self, temperature: float, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        given = example(size=3, student=(6, 4, 5), teacher=(6, 4, 5))
        loss = build("cwd", given, temperature=temperature)
        assert not list(loss.parameters()) and int(loss.count(given[2])) == 3
        assert loss(*given).item() == pytest.approx(channel_kl(*features(given), temperature), rel=1e-12)

    def test_maps_of_logits_without_taps(self) -> None:
        given = self.maps((5, 4, 6), (5, 4, 6))
        loss = self.without_taps(given)
        s, t = (signals.logits.detach().numpy() for signals in given[:2])
        assert int(loss.count(given[2])) == 3
        assert loss(*given).item() == pytest.approx(channel_kl(s, t, 4.0), rel=1e-12)

    def test_logits_of_half_precision_are_compared_in_full(self) -> None:
        student, teacher, batch = self.maps((5, 4, 6), (5, 4, 6))
        halves = [Signals(s.logits.detach().bfloat16()) for s in (student, teacher)]
        value = self.without_taps((*halves, batch))(*halves, batch)
        s, t = (half.logits.double().numpy() for half in halves)
        assert value.dtype == torch.float32 and value.item() == pytest.approx(channel_kl(s, t, 4.0), rel=1e-5)

    def test_logits_of_another_size_are_resized(self) -> None:
        student, teacher, batch = self.maps((5, 2, 3), (5, 4, 6))
        loss = self.without_taps((student, teacher, batch))
        resized = F.interpolate(student.logits.detach(), (4, 6), mode="bilinear")
        value = loss(student, teacher, batch)
        assert value.item() == pytest.approx(channel_kl(resized.numpy(), teacher.logits.numpy(), 4.0), rel=1e-12)
        value.backward()
        assert student.logits.grad.any()

    @pytest.mark.parametrize(
        ("student", "teacher", "message"),
        [((5,), (5,), "are none"), ((5, 1, 1), (5, 1, 1), "are none"), ((5, 4, 4), (6, 4, 4), "different classes")],
    )
    def test_logits_that_are_no_map_are_refused(self, student: Any, teacher: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            self.without_taps(self.maps(student, teacher))

    @pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5)])
    def test_logits_with_the_classes_last_are_refused(self, shape: Any) -> None:
        student, teacher, batch = self.maps(shape, shape)
        student.class_dim = teacher.class_dim = len(shape)
        with pytest.raises(ConfigError, match="are none"):
            self.without_taps((student, teacher, batch))

    @pytest.mark.parametrize(("student", "teacher"), [((6,), (6,)), ((3, 1, 1), (3, 1, 1)), ((1, 4), (1, 4))])
    def test_a_single_position_is_refused(
        self, student: Any, teacher: Any, example: Callable[..., Any], build: Callable[..., Any]
    ) -> None:
        with pytest.raises(ConfigError, match="a single position"):
            build("cwd", example(student=student, teacher=teacher))

    def test_a_convolution_adapts_channels(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        given = example(student=(2, 4, 4), teacher=(6, 4, 4))
        adapter = build("cwd", given).adapters[0]
        assert isinstance(adapter, nn.Conv2d) and adapter.kernel_size == (1, 1)

    def test_tokens_are_positions(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        given = example(size=3, student=(6, 4), teacher=(6, 4))
        s, t = (f.transpose(0, 2, 1) for f in features(given))
        assert build("cwd", given)(*given).item() == pytest.approx(channel_kl(s, t, 4.0), rel=1e-12)

    def test_blind_to_a_channels_offset(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        student, teacher, batch = example()
        loss = build("cwd", (student, teacher, batch))
        shifted = Signals(teacher.logits, features={"f": teacher.features["f"] + torch.arange(3.0)[:, None, None]})
        assert loss(shifted, teacher, batch).item() == pytest.approx(0, abs=1e-12)


class TestPearsonFeature:
    @staticmethod
    def z(feature_BCHW: Any) -> Any:
        mean = feature_BCHW.mean((0, 2, 3), keepdims=True)
        return (feature_BCHW - mean) / (feature_BCHW.std((0, 2, 3), ddof=1, keepdims=True) + 1e-6)

    def test_formula(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        given = example(size=3, student=(6, 4, 5), teacher=(6, 4, 5))
        s, t = (self.z(f) for f in features(given))
        loss = build("pearson_feature", given)
        value = loss(*given) / loss.count(given[2])
        assert loss.batchwise and not list(loss.parameters())
        assert value.item() == pytest.approx(((s - t) ** 2).mean() / 2, rel=1e-12)

    def test_is_one_minus_the_correlation(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        given = example(size=8, student=(1, 16, 16), teacher=(1, 16, 16))
        loss = build("pearson_feature", given)
        correlation = np.corrcoef(*(f.ravel() for f in features(given)))[0, 1]
        assert (loss(*given) / 8).item() == pytest.approx(1 - correlation, rel=1e-3)

    def test_blind_to_scale_and_offset(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        student, teacher, batch = example()
        loss = build("pearson_feature", (student, teacher, batch))
        teacher.features["f"] = 1e3 * student.features["f"].detach() + 5
        assert loss(student, teacher, batch).item() == pytest.approx(0, abs=1e-9)

    @pytest.mark.parametrize(("student", "teacher"), [((6, 2, 3), (6, 4, 6)), ((6, 9, 8), (6, 4, 6))])
    def test_other_sizes_are_resized(
        self, student: Any, teacher: Any, example: Callable[..., Any], build: Callable[..., Any]
    ) -> None:
        given = example(size=3, student=student, teacher=teacher)
        resized = F.interpolate(given[0].features["f"].detach(), (4, 6), mode="bilinear").numpy()
        s, t = self.z(resized), self.z(features(given)[1])
        loss = build("pearson_feature", given)
        assert not list(loss.parameters())
        assert (loss(*given) / 3).item() == pytest.approx(((s - t) ** 2).mean() / 2, rel=1e-12)

    def test_a_convolution_adapts_channels(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        given = example(student=(2, 8, 8), teacher=(6, 4, 4))
        loss = build("pearson_feature", given)
        assert isinstance(loss.adapters[0], nn.Conv2d) and loss.adapters[0].kernel_size == (1, 1)
        loss(*given).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters())

    @pytest.mark.parametrize("shape", [(3, 1, 1), (3,), (1, 3)])
    def test_one_sample_of_one_position(
        self, shape: Any, example: Callable[..., Any], build: Callable[..., Any]
    ) -> None:
        given = example(size=1, student=shape, teacher=shape)
        value = build("pearson_feature", given)(*given)
        value.backward()
        assert value.item() == 0 and given[0].features["f"].grad.isfinite().all()

    def test_a_dead_channel(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        student, teacher, batch = example()
        student.features["f"] = torch.zeros(4, 3, 4, 4, dtype=torch.float64, requires_grad=True)
        value = build("pearson_feature", (student, teacher, batch))(student, teacher, batch)
        value.backward()
        assert value.isfinite() and student.features["f"].grad.isfinite().all()

    @pytest.mark.parametrize("shape", [(5,), (6, 5)])
    def test_vectors_and_tokens_are_standardised_over_samples_and_positions(
        self, shape: Any, example: Callable[..., Any], build: Callable[..., Any]
    ) -> None:
        given = example(size=7, student=shape, teacher=shape)
        s, t = (f.reshape(-1, 5) for f in features(given))
        s, t = ((f - f.mean(0)) / (f.std(0, ddof=1) + 1e-6) for f in (s, t))
        value = build("pearson_feature", given)(*given) / 7
        assert value.item() == pytest.approx(((s - t) ** 2).mean() / 2, rel=1e-12)
