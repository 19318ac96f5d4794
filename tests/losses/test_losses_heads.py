"""srrl, semckd, cat_kd, mgd and ca_mkd against formulas written out in numpy, and what they take of the nets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdctl import registry
from kdctl.errors import ConfigError
from kdctl.losses.base import DryRun
from kdctl.signals import Signals
from kdctl.tasks.classification import Classification

Example = Callable[..., Any]
Build = Callable[..., Any]


def features(given: Any) -> tuple[Any, Any]:
    return given[0].features["f"].detach().numpy(), given[1].features["f"].numpy()


def set_up(kind: str, given: Any, student_net: nn.Module, teacher_net: nn.Module, **arguments: Any) -> Any:
    loss = registry.create("losses", kind, arguments)
    loss.taps = tuple((tap, tap) for tap in given[0].features)
    loss.setup(DryRun(Classification(), given[2], given[0], given[1], 64, student_net, [teacher_net]))
    loss.bind(student_net)
    return loss.double().eval()


def net(channels: int, classes: int = 5, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Identity(), nn.Linear(channels, classes, bias=bias)).double()


class TestSRRL:
    @pytest.mark.parametrize("sign", [1, -1])
    def test_formula(self, sign: int, example: Example) -> None:
        given = example(size=6, student=(4, 3, 3), teacher=(3, 2, 2), positive=True)
        given[1].features["f"] *= sign
        teacher_net = net(3)
        loss = set_up("srrl", given, net(4), teacher_net, head="1", feature_weight=2.0, logit_weight=3.0).train()
        s, t = (f.mean((2, 3)) for f in features(given))
        s = s @ loss.adapters[0].linear.weight.detach().numpy().T
        s = (s - s.mean(0)) / np.sqrt(s.var(0) + 1e-5)
        s = np.maximum(s, 0) if sign > 0 else s
        weight = teacher_net[1].weight.detach().numpy()
        expected = 2 * ((s - t) ** 2).mean(1) + 3 * (((s - t) @ weight.T) ** 2).mean(1)
        assert loss(*given).item() == pytest.approx(expected.sum(), rel=1e-10)

    def test_the_teachers_classifier_neither_trains_nor_is_saved(self, example: Example) -> None:
        given = example(student=(4,), teacher=(3,))
        teacher_net = net(3)
        loss = set_up("srrl", given, net(4), teacher_net, head="1")
        before = loss(*given).item()
        with torch.no_grad():
            teacher_net[1].weight.add_(1)
        loss(*given).backward()
        assert loss(*given).item() == before and teacher_net[1].weight.grad is None
        assert all(name.startswith("adapters.") for name in loss.state_dict())

    def test_a_feature_that_is_not_the_classifiers_is_refused(self, example: Example) -> None:
        with pytest.raises(ConfigError, match=r"'1' takes 7 channels, the tapped feature has 3"):
            set_up("srrl", example(), net(3), net(7), head="1")


class TestSemCKD:
    @pytest.fixture
    def layers(self, example: Example) -> Any:
        return example(size=3, student=[(2, 4, 4), (3, 2, 2)], teacher=[(4, 2, 2), (2, 8, 8)])

    def test_formula(self, layers: Any, build: Build) -> None:
        loss = build("semckd", layers, temperature=0.5)
        student, teacher = (list(signals.features.values()) for signals in layers[:2])
        unit = nn.functional.normalize
        queries = [unit(net(f.mean((2, 3))), dim=1) for net, f in zip(loss.queries, student, strict=True)]
        keys = [unit(net(f.mean((2, 3))), dim=1) for net, f in zip(loss.keys, teacher, strict=True)]
        expected = 0.0
        for n in range(3):
            for i in range(2):
                attention = torch.stack([queries[i][n] @ keys[j][n] / 0.5 for j in range(2)]).softmax(0)
                for j in range(2):
                    size = min(student[i].shape[2], teacher[j].shape[2])
                    s, t = (nn.functional.adaptive_avg_pool2d(f[n : n + 1], size) for f in (student[i], teacher[j]))
                    distance = (loss.regressors[2 * i + j](s) - t).square().mean()
                    expected += (attention[j] * distance).item() / 2
        assert loss(*layers).item() == pytest.approx(expected, rel=1e-10)

    def test_any_batch_size(self, layers: Any, build: Build, example: Example) -> None:
        """The published layers fit the batch size they were made for."""
        loss = build("semckd", layers).train()
        for size in (1, 2, 7):
            given = example(size=size, student=[(2, 4, 4), (3, 2, 2)], teacher=[(4, 2, 2), (2, 8, 8)])
            loss(*given).backward()
            assert given[0].features["g"].grad.any()

    def test_a_place_named_twice_counts_once(self, layers: Any, build: Build) -> None:
        student, teacher, batch = layers
        loss = build("semckd", layers)
        loss.taps = (("f", "f"), ("f", "g"), ("g", "f"))
        loss.setup(DryRun(Classification(), batch, student, teacher, 64))
        assert len(loss.queries) == len(loss.keys) == 2 and len(loss.regressors) == 4

    def test_tokens_and_vectors(self, example: Example, build: Build) -> None:
        given = example(student=[(4, 3), (5,)], teacher=[(4, 6), (7,)])
        assert build("semckd", given)(*given).isfinite()


class TestCATKD:
    @pytest.mark.parametrize("resolution", [1, 2])
    def test_formula(self, resolution: int, example: Example) -> None:
        given = example(size=3, student=(3, 4, 4), teacher=(6, 8, 8))
        nets = net(3), net(6)
        loss = set_up("cat_kd", given, *nets, head="1", resolution=resolution)
        maps = []
        for feature, head in zip(features(given), nets, strict=True):
            cam = np.einsum("kc,nchw->nkhw", head[1].weight.detach().numpy(), feature)
            step = cam.shape[2] // resolution
            cam = cam.reshape(3, 5, resolution, step, resolution, step).mean((3, 5))
            maps.append(cam / np.sqrt((cam**2).sum((2, 3), keepdims=True)))
        expected = ((maps[0] - maps[1]) ** 2).mean((1, 2, 3)).sum()
        assert loss(*given).item() == pytest.approx(expected, rel=1e-10)

    def test_the_classifier_that_trains_learns_from_it_and_is_no_part_of_it(self, example: Example) -> None:
        given = example(student=(3, 4, 4), teacher=(6, 4, 4))
        trial, real, teacher_net = net(3), net(3), net(6)
        loss = set_up("cat_kd", given, trial, teacher_net, head="1")
        loss.bind(real)
        loss(*given).backward()
        assert real[1].weight.grad.any() and trial[1].weight.grad is None and teacher_net[1].weight.grad is None
        assert not list(loss.parameters()) and not loss.state_dict()

    def test_classifiers_at_different_places(self, example: Example) -> None:
        given = example()
        other = nn.ModuleDict({"classifier": nn.Linear(3, 5).double()})
        loss = set_up("cat_kd", given, net(3), other, head="1", teacher_head="classifier")
        assert loss(*given).isfinite()

    def test_what_fits_no_classifier_is_refused(self, example: Example) -> None:
        with pytest.raises(ConfigError, match="made of maps"):
            set_up("cat_kd", example(student=(3,), teacher=(3,)), net(3), net(3), head="1")
        with pytest.raises(ConfigError, match="the student's classifier takes 4 channels, its map has 3"):
            set_up("cat_kd", example(), net(4), net(3), head="1")
        with pytest.raises(ConfigError, match="different numbers of classes"):
            set_up("cat_kd", example(), net(3), net(3, classes=6), head="1")


class TestMGD:
    def test_formula_without_a_mask(self, example: Example, build: Build) -> None:
        given = example(size=3, student=(2, 4, 4), teacher=(3, 4, 4))
        loss = build("mgd", given)
        align, _, first, relu, second = loss.adapters[0]
        generated = second(relu(first(align(given[0].features["f"])))).detach().numpy()
        assert loss(*given).item() == pytest.approx(((generated - features(given)[1]) ** 2).sum(), rel=1e-12)

    @pytest.mark.parametrize(("mask", "share"), [("channels", (2, 3)), ("positions", (1,))])
    def test_the_mask(self, mask: str, share: tuple[int, ...], example: Example, build: Build) -> None:
        given = example(student=(8, 8, 8), teacher=(8, 8, 8))
        masking = build("mgd", given, mask=mask, mask_ratio=0.25).adapters[0][1].train()
        masked = masking(torch.ones(64, 8, 8, 8))
        assert set(masked.unique().tolist()) == {0, 1}
        assert masked.amin(share).equal(masked.amax(share))
        assert masked.mean().item() == pytest.approx(0.75, abs=0.06)
        assert not masking(torch.ones(64, 8, 8, 8)).equal(masked)

    def test_all_masked_leaves_what_the_generator_knows(self, example: Example, build: Build) -> None:
        given = example()
        build("mgd", given, mask_ratio=1.0).train()(*given).backward()
        assert not given[0].features["f"].grad.any()


class TestCAMKD:
    @pytest.fixture
    def three(self, example: Example) -> Any:
        """Three teachers, each with a feature at its own tap."""
        student, teacher, batch = example(size=4, student=[(3, 4, 4)] * 3, teacher=[(3, 4, 4)] * 3)
        generator = torch.Generator().manual_seed(5)
        logits = [3 * torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in range(3)]
        members = [Signals(z, features={t: teacher.features[t]}) for z, t in zip(logits, "fgh", strict=True)]
        return student, replace(teacher, members=tuple(members)), batch

    def expected(self, given: Any) -> Any:
        errors, distances = [], []
        for tap, member in zip("fgh", given[1].members, strict=True):
            z = member.logits.numpy()
            errors.append(np.log(np.exp(z).sum(1)) - z[range(4), given[2].targets.numpy()])
            difference = given[0].features[tap].detach().numpy() - member.features[tap].numpy()
            distances.append((difference**2).mean((1, 2, 3)))
        weights = (1 - np.exp(errors) / np.exp(errors).sum(0)) / 2
        return (weights * np.array(distances)).sum(0) / 3

    def test_formula(self, three: Any, build: Build) -> None:
        np.testing.assert_allclose(
            build("ca_mkd", three).values(*three).detach().numpy(), self.expected(three), rtol=1e-12
        )

    def test_unlabelled_samples_pull_nothing(self, three: Any, build: Build) -> None:
        loss, expected = build("ca_mkd", three), self.expected(three)
        three[2].targets[1] = -100
        value = loss(*three)
        value.backward()
        assert int(loss.count(three[2])) == 3
        assert value.item() == pytest.approx(expected[[0, 2, 3]].sum(), rel=1e-12)
        assert not three[0].features["g"].grad[1].any() and three[0].features["g"].grad[0].any()

    def test_a_tap_for_each_teacher(self, three: Any, build: Build) -> None:
        del three[0].features["h"]
        with pytest.raises(ConfigError, match="3 teachers and 2 pairs of taps"):
            build("ca_mkd", three)

    def test_each_teacher_has_its_own_adapter(self, three: Any, build: Build) -> None:
        three[1].members[1].features["g"] = torch.randn(4, 6, 2, 2, dtype=torch.float64)
        loss = build("ca_mkd", three)
        assert [type(adapter) for adapter in loss.adapters] == [nn.Identity, nn.Conv2d, nn.Identity]
        assert loss(*three).isfinite()

    def test_one_teacher_is_believed(self, example: Example, build: Build) -> None:
        given = example(size=3)
        s, t = features(given)
        assert build("ca_mkd", given)(*given).item() == pytest.approx(((s - t) ** 2).mean((1, 2, 3)).sum(), rel=1e-12)
