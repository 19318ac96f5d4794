"""ofd, hierarchical_context and reviewkd: their formulas in numpy, margins from real teachers, fusion of stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

from kdctl import registry
from kdctl.errors import ConfigError
from kdctl.losses.base import DryRun, Loss
from kdctl.losses.ofd import expected_negative, norm_before, teacher_margin
from kdctl.models.mobilenet import MobileNetV2
from kdctl.models.resnet_cifar import CifarResNet
from kdctl.models.vgg import VGG
from kdctl.models.wide_resnet import WideResNet
from kdctl.signals import Batch, Signals
from kdctl.taps import Taps
from kdctl.tasks.classification import Classification

Make = Callable[..., Any]
LEVELS: Any = [(3, 4, 4), (4, 2, 2), (5, 2, 2)]


def arrays(signals: Any) -> list[Any]:
    return [f.detach().numpy() for f in signals.features.values()]


def partial(s: Any, t: Any, margin: Any) -> Any:
    """The three cases of the published formula, apart."""
    blocked, between, passed = t <= margin, (t > margin) & (t <= 0), t > 0
    cases = (s - margin) ** 2 * (blocked & (s > margin)) + (s - t) ** 2 * (between & (s > t)) + (s - t) ** 2 * passed
    return cases.reshape(len(s), -1).sum(1)


class TestOFD:
    def test_formula_of_several_layers(self, example: Make, build: Make) -> None:
        given = example(size=3, student=LEVELS, teacher=LEVELS)
        expected: Any = 0
        for s, t, weight in zip(arrays(given[0]), arrays(given[1]), [0.25, 0.5, 1], strict=True):
            negative = np.where(t < 0, t, np.nan)
            margin = np.nanmean(negative, (0, 2, 3))[None, :, None, None]
            expected = expected + weight * partial(s, t, margin)
        loss = build("ofd", given, connector="none")
        assert not list(loss.parameters())
        assert loss.values(*given).tolist() == pytest.approx(expected.tolist(), rel=1e-12)

    def test_a_margin_that_is_given(self, example: Make, build: Make) -> None:
        student, teacher, batch = example(size=3)
        margin = -torch.rand(1, 3, 1, 1, dtype=torch.float64)
        batch.extra["margin"] = margin.expand(3, -1, 1, 1)[:1]
        s, t = arrays(student)[0], arrays(teacher)[0]
        value = build("ofd", (student, teacher, batch), connector="none").values(student, teacher, batch)
        assert value.tolist() == pytest.approx(partial(s, t, margin.numpy()).tolist(), rel=1e-12)

    def test_zero_at_the_teacher_without_a_connector(self, example: Make, build: Make) -> None:
        student, _, batch = example()
        assert build("ofd", (student, student, batch), connector="none")(student, student, batch).item() == 0

    @pytest.mark.parametrize(
        ("student", "teacher"), [((3, 4, 4), (3, 4, 4)), ((2, 8, 8), (3, 4, 4)), ((5,), (7,)), ((6, 3), (4, 5))]
    )
    def test_connectors(self, student: Any, teacher: Any, example: Make, build: Make) -> None:
        given = example(student=student, teacher=teacher)
        loss = build("ofd", given).train()
        loss(*given).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters())
        assert len(list(loss.parameters())) >= 2
        assert loss.get_buffer("margin_0").shape == (teacher[1 if len(teacher) == 2 else 0],)

    def test_none_refuses_other_shapes(self, example: Make, build: Make) -> None:
        with pytest.raises(ConfigError, match="the shapes differ"):
            build("ofd", example(teacher=(6, 4, 4)), connector="none")

    def test_margins_are_kept_with_the_connectors(self, example: Make, build: Make) -> None:
        given, other = example(seed=0), example(seed=1)
        first, second = (build("ofd", g, connector="none") for g in (given, other))
        assert first(*given).item() != second(*given).item()
        second.load_state_dict(first.state_dict())
        assert first(*given).item() == second(*given).item()


class TestMargin:
    def test_mean_of_a_normal_below_zero(self) -> None:
        mean = torch.tensor([0.0, 0.7, -2.0, 3.2, 1.0, -1.0, 0.0])
        deviation = torch.tensor([1.0, -0.5, 0.3, 1.0, 1e-30, 0.0, 0.0])  # a sign of the weight does not matter
        expected = []
        for m, s in zip(mean.tolist()[:3], deviation.abs().tolist()[:3], strict=True):
            expected.append(stats.norm(m, s).expect(lambda x: x, ub=0, conditional=True))
        found = expected_negative(mean, deviation)
        assert found[:3].tolist() == pytest.approx(expected, rel=1e-4)
        assert found[3].item() == pytest.approx(-3.0)  # 0.07 % are negative
        assert found[4:].tolist() == pytest.approx([0, -1, 0], abs=1e-9)

    @pytest.mark.parametrize(
        ("net", "tap", "norm"),
        [
            ("resnet", "layer2.1.add", "layer2.1.bn2"),
            ("resnet", "layer2.1.relu:in", "layer2.1.bn2"),
            ("resnet", "relu:in", "bn1"),
            ("resnet", "layer2.1.bn1", "layer2.1.bn1"),
            ("resnet", "layer2.1", None),
            ("wide", "layer2.0.bn1", "layer2.0.bn1"),
            ("wide", "relu:in", "bn1"),
            ("vgg", "layer3.relu:in", "layer3.bn2"),
            ("mobilenet", "conv2.relu:in", "conv2.bn"),
        ],
    )
    def test_the_norm_before_a_tap(self, net: str, tap: str, norm: str | None) -> None:
        made = {
            "resnet": lambda: CifarResNet(depth=14, num_classes=4),
            "wide": lambda: WideResNet(depth=10, num_classes=4),
            "vgg": lambda: VGG(depth=11, num_classes=4),
            "mobilenet": lambda: MobileNetV2(num_classes=4),
        }[net]().eval()
        with Taps(made, [tap]) as taps, taps.recording() as features, torch.no_grad():
            made(torch.rand(2, 3, 32, 32))
        found = norm_before(made, tap, features[tap].shape[1])
        assert found is (None if norm is None else made.get_submodule(norm))

    @pytest.mark.parametrize(
        ("tap", "norm"), [("relu:in", "bn1"), ("relu:in#2", "bn2"), ("relu:in#1", "bn1"), ("bn2:in", None)]
    )
    def test_a_module_that_is_used_twice(self, tap: str, norm: str | None) -> None:
        net = nn.ModuleDict({"bn1": nn.BatchNorm2d(3), "relu": nn.ReLU(), "bn2": nn.BatchNorm2d(3)})
        assert norm_before(net, tap, 3) is (None if norm is None else net[norm])
        assert norm_before(net, tap, 4) is None

    def test_measured_where_the_modules_do_not_show_it(self) -> None:
        teacher = torch.tensor([[[[-1.0, 2.0]], [[3.0, 4.0]]], [[[-3.0, 0.0]], [[5.0, 6.0]]]])
        assert teacher_margin("f", teacher, [nn.Identity()]).tolist() == [-2, 0]
        assert teacher_margin("f", teacher.squeeze(2).transpose(1, 2), []).tolist() == [-2, 0]

    def test_of_a_teacher_by_its_weights(self) -> None:
        net: Any = CifarResNet(depth=8, num_classes=4)
        nn.init.normal_(net.layer1[0].bn2.weight)
        nn.init.normal_(net.layer1[0].bn2.bias)
        expected = expected_negative(net.layer1[0].bn2.bias.detach(), net.layer1[0].bn2.weight.detach())
        found = teacher_margin("layer1.0.add", torch.randn(2, 16, 4, 4), [net])
        torch.testing.assert_close(found, expected.float())


@pytest.mark.parametrize(
    "kind",
    ["nst", "mmd", "vid", "ab", "factor_transfer", "fsp", "kdsvd", "ofd", "hierarchical_context", "reviewkd"],
)
def test_the_teacher_is_left_alone(kind: str) -> None:
    """Published code ran teachers in train mode, for shapes or for good: their batch statistics drifted."""
    torch.manual_seed(0)
    teacher, student = (CifarResNet(depth=8, width=width, num_classes=4).eval() for width in (32, 16))
    teacher.requires_grad_(False)
    paths = ["layer1.0.add", "layer2.0.add"]
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    images, index = torch.rand(4, 3, 8, 8), torch.arange(4)
    batch = Batch(images, index % 4, index, torch.zeros_like(index))

    def signals(net: nn.Module) -> Signals:
        with Taps(net, paths) as taps, taps.recording() as features:
            logits = net(images)
        return Signals(logits, features=features)

    loss: Loss = registry.create("losses", kind, {})
    loss.taps = tuple((path, path) for path in paths)
    seen = signals(teacher)
    loss.setup(DryRun(Classification(), batch, signals(student), seen, 4, student, [teacher]))
    loss.train()(signals(student), seen, batch).backward()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not teacher.training and not {*loss.modules()} & {*teacher.modules()}
    kept = {p.data_ptr() for p in teacher.parameters()} | {b.data_ptr() for b in teacher.buffers()}
    assert not kept & {value.data_ptr() for value in loss.state_dict().values()}


class TestHierarchicalContext:
    def pyramid(self, s: Any, t: Any) -> Any:
        total, weight, weights = ((s - t) ** 2).mean((1, 2, 3)), 1.0, 1.0
        for side in (4, 2, 1):
            if side < s.shape[2]:
                cell = s.shape[2] // side
                pooled = [f.reshape(*f.shape[:2], side, cell, side, cell).mean((3, 5)) for f in (s, t)]
                weight, weights = weight / 2, weights + weight / 2
                total = total + weight * ((pooled[0] - pooled[1]) ** 2).mean((1, 2, 3))
        return total / weights

    @pytest.mark.parametrize("side", [1, 2, 4, 8, 16])
    def test_formula(self, side: int, example: Make, build: Make) -> None:
        given = example(size=3, student=(3, side, side), teacher=(3, side, side))
        loss = build("hierarchical_context", given)
        expected = self.pyramid(arrays(given[0])[0], arrays(given[1])[0])
        assert loss.values(*given).tolist() == pytest.approx(expected.tolist(), rel=1e-12)

    def test_tokens_are_a_column(self, example: Make, build: Make) -> None:
        given = example(size=2, student=(8, 3), teacher=(8, 3))
        gap = arrays(given[0])[0] - arrays(given[1])[0]
        parts = [
            (gap.reshape(2, n, 8 // n, 3).mean(2) ** 2).mean((1, 2)) / w for n, w in ((8, 1), (4, 2), (2, 4), (1, 8))
        ]
        expected = sum(parts) / 1.875
        assert build("hierarchical_context", given).values(*given).tolist() == pytest.approx(expected.tolist())

    def test_vectors_have_one_level(self, example: Make, build: Make) -> None:
        given = example(size=2, student=(6,), teacher=(6,))
        gap = arrays(given[0])[0] - arrays(given[1])[0]
        values = build("hierarchical_context", given).values(*given)
        assert values.tolist() == pytest.approx((gap**2).mean(1).tolist())


class TestReviewKD:
    SHAPES: Any = {"student": [(2, 8, 8), (3, 4, 4), (6,)], "teacher": [(4, 8, 8), (5, 2, 2), (7,)]}

    def test_formula(self, example: Make, build: Make) -> None:
        given = example(size=3, **self.SHAPES)
        loss = build("reviewkd", given, mid_channels=4)
        f, g, h = loss.adapters
        levels = [*given[0].features.values()]
        targets = [t if t.ndim == 4 else t[:, :, None, None] for t in given[1].features.values()]
        deep = h.project(levels[2][:, :, None, None])
        x = g.project(levels[1])
        z = torch.sigmoid(g.attention(torch.cat([x, deep.expand(-1, -1, 4, 4)], 1)))
        middle = (z[:, :1] * x + z[:, 1:] * deep)[:, :, ::2, ::2]
        x, up = f.project(levels[0]), middle.repeat_interleave(4, 2).repeat_interleave(4, 3)
        z = torch.sigmoid(f.attention(torch.cat([x, up], 1)))
        made = [f.predict(z[:, :1] * x + z[:, 1:] * up), g.predict(middle), h.predict(deep)]
        assert [m.shape for m in made] == [t.shape for t in targets] and deep.shape[1] == 4
        pyramid = TestHierarchicalContext().pyramid
        expected = sum(pyramid(m.detach().numpy(), t.numpy()) for m, t in zip(made, targets, strict=True))
        assert loss.values(*given).tolist() == pytest.approx(expected.tolist(), rel=1e-10)

    def test_shallow_stages_learn_from_deep_ones(self, example: Make, build: Make) -> None:
        student, teacher, batch = example(size=3, **self.SHAPES)
        loss = build("reviewkd", (student, teacher, batch))
        f = student.features["f"]
        predicted, _ = loss.adapters[0](f, loss.adapters[1](student.features["g"], torch.zeros(3, 6, 1, 1).double())[1])
        reached = torch.autograd.grad(predicted.sum(), [f, student.features["g"]])
        assert all(bool(gradient.any()) for gradient in reached)

    def test_as_wide_as_the_deepest_stage_at_most(self, example: Make, build: Make) -> None:
        given = example(**self.SHAPES)
        for asked, width in ((512, 6), (5, 5)):
            fusions = build("reviewkd", given, mid_channels=asked).adapters
            assert [fusion.attention and fusion.attention.in_channels for fusion in fusions] == [2 * width] * 2 + [None]

    @pytest.mark.parametrize(("epoch", "share"), [(0.0, 0.0), (5.0, 0.25), (20.0, 1.0), (99.0, 1.0)])
    def test_warmup(self, epoch: float, share: float, example: Make, build: Make) -> None:
        given = example(**self.SHAPES)
        full, loss = build("reviewkd", given), build("reviewkd", given, warmup_epochs=20.0)
        loss.epoch = epoch
        assert loss(*given).item() == pytest.approx(share * full(*given).item())

    def test_every_parameter_trains_also_on_one_sample(self, example: Make, build: Make) -> None:
        given = example(size=1, **self.SHAPES)
        loss = build("reviewkd", given).train()
        loss(*given).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters())

    def test_tokens_beside_maps(self, example: Make, build: Make) -> None:
        given = example(student=[(17, 6), (17, 6)], teacher=[(4, 8, 8), (5, 4, 4)])
        build("reviewkd", given)(*given).backward()
        assert all(f.grad.any() for f in given[0].features.values())

    def test_learns_to_predict_a_teacher(self, example: Make, build: Make) -> None:
        student, teacher, batch = example(size=4, student=[(8, 4, 4), (8, 2, 2)], teacher=[(2, 4, 4), (2, 2, 2)])
        teacher.features["f"] = F.interpolate(student.features["f"][:, :2].detach(), (4, 4))
        loss = build("reviewkd", (student, teacher, batch)).train()
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.02)
        before = loss(student, teacher, batch).item()
        for _ in range(150):
            optimizer.zero_grad()
            value = loss(student, teacher, batch)
            value.backward()
            optimizer.step()
        assert value.item() < 0.3 * before
