"""fitnet, attention_transfer and normalized_l1 against formulas written out in numpy, and the adapters they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdctl.errors import ConfigError
from kdctl.losses.adapters import FeatureLoss, align, linear_adapter, to_map
from kdctl.losses.base import DryRun
from kdctl.losses.fitnet import FitNet
from kdctl.tasks.classification import Classification


def features(given: Any) -> tuple[Any, Any]:
    return given[0].features["f"].detach().numpy(), given[1].features["f"].numpy()


def normalized(rows: Any) -> Any:
    return rows / np.sqrt((rows**2).sum(1, keepdims=True))


class TestFitNet:
    def test_formula(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        given = example(size=3)
        s, t = features(given)
        value = build("fitnet", given, regressor="none")(*given)
        assert value.item() == pytest.approx(3 * ((s - t) ** 2).mean(), rel=1e-12)

    def test_regressor_none_refuses_other_shapes(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        with pytest.raises(ConfigError, match=r"taps f \(4, 3, 4, 4\) and f \(4, 6, 4, 4\): the shapes differ"):
            build("fitnet", example(teacher=(6, 4, 4)), regressor="none")

    @pytest.mark.parametrize("sign", [-1.0, 1.0])
    def test_relu_only_for_teachers_that_are_never_negative(
        self, sign: float, example: Callable[..., Any], build: Callable[..., Any]
    ) -> None:
        student, teacher, batch = example(teacher=(6, 2, 2))
        teacher.features["f"] = sign * teacher.features["f"].abs()
        regressor = build("fitnet", (student, teacher, batch)).adapters[0]
        kinds = [type(layer) for layer in regressor]
        assert kinds == [nn.Conv2d, nn.BatchNorm2d] + ([nn.ReLU] if sign > 0 else [])

    def test_no_batch_norm_where_one_sample_has_one_position(
        self, example: Callable[..., Any], build: Callable[..., Any]
    ) -> None:
        given = example(size=1, teacher=(6, 1, 1))
        assert build("fitnet", given).train()(*given).isfinite()

    def test_learns_to_predict_a_teacher(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        given = example(size=4, student=(8, 4, 4), teacher=(2, 2, 2))
        loss = build("fitnet", given).train()
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.02)
        before = loss(*given).item()
        for _ in range(300):
            optimizer.zero_grad()
            value = loss(*given)
            value.backward()
            optimizer.step()
        assert value.item() < 0.2 * before

    def test_several_pairs_add_up(self, example: Callable[..., Any]) -> None:
        student, teacher, batch = example()
        student.features["g"], teacher.features["g"] = (torch.randn(4, 7).double() for _ in range(2))
        loss, parts = FitNet(regressor="none"), []
        for taps in ((("f", "f"),), (("g", "g"),), (("f", "f"), ("g", "g"))):
            loss.taps = taps
            loss.setup(DryRun(Classification(), batch, student, teacher, 4))
            parts.append(loss(student, teacher, batch).item())
        assert parts[2] == pytest.approx(parts[0] + parts[1])


class TestAttentionTransfer:
    @pytest.mark.parametrize("p", [2, 4])
    def test_formula(self, p: int, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        given = example(size=3, teacher=(6, 4, 4))
        s, t = (normalized((f**p).mean(1).reshape(3, -1)) for f in features(given))
        value = build("attention_transfer", given, p=p)(*given)
        assert value.item() == pytest.approx(((s - t) ** 2).mean(1).sum(), rel=1e-12)

    def test_formula_of_the_paper(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        given = example(size=3, teacher=(6, 4, 4))
        s, t = (normalized((np.abs(f) ** 3).mean(1).reshape(3, -1)) for f in features(given))
        value = build("attention_transfer", given, p=3, variant="paper")(*given)
        assert value.item() == pytest.approx(np.sqrt(((s - t) ** 2).sum(1)).sum(), rel=1e-12)

    @pytest.mark.parametrize("larger", ["student", "teacher"])
    def test_the_larger_map_is_pooled(
        self, larger: str, example: Callable[..., Any], build: Callable[..., Any]
    ) -> None:
        given = example(size=2, **{larger: (3, 4, 8)}, **{"teacher" if larger == "student" else "student": (3, 2, 4)})
        maps = [f.reshape(2, 3, 2, -1, 4, f.shape[3] // 4).mean((3, 5)) for f in features(given)]
        s, t = (normalized((f**2).mean(1).reshape(2, -1)) for f in maps)
        value = build("attention_transfer", given)(*given)
        assert value.item() == pytest.approx(((s - t) ** 2).mean(1).sum(), rel=1e-12)

    def test_tokens(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        given = example(size=2, student=(6, 3), teacher=(6, 8))
        s, t = (normalized((f**2).mean(2)) for f in features(given))
        value = build("attention_transfer", given)(*given)
        assert value.item() == pytest.approx(((s - t) ** 2).mean(1).sum(), rel=1e-12)

    def test_vectors_are_refused(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        with pytest.raises(ConfigError, match="no attention map"):
            build("attention_transfer", example(student=(7,), teacher=(7,)))


class TestNormalizedL1:
    def test_formula(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        given = example(size=3)
        s, t = (normalized(f.reshape(3, -1)) for f in features(given))
        loss = build("normalized_l1", given)
        assert not list(loss.parameters())
        assert loss(*given).item() == pytest.approx(np.abs(s - t).sum(), rel=1e-12)

    def test_blind_to_length(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        student, teacher, batch = example()
        loss = build("normalized_l1", (student, teacher, batch))
        before = loss(student, teacher, batch).item()
        teacher.features["f"] = 1e3 * teacher.features["f"]
        assert loss(student, teacher, batch).item() == pytest.approx(before)

    def test_a_dead_feature_gives_finite_gradients(
        self, example: Callable[..., Any], build: Callable[..., Any]
    ) -> None:
        student, teacher, batch = example()
        student.features["f"] = torch.zeros(4, 3, 4, 4, dtype=torch.float64, requires_grad=True)
        build("normalized_l1", (student, teacher, batch))(student, teacher, batch).backward()
        assert student.features["f"].grad.isfinite().all()


class TestAdapters:
    @pytest.mark.parametrize(
        ("student", "teacher"),
        [
            ((3, 4, 4), (6, 4, 4)), ((3, 8, 8), (6, 4, 4)), ((3, 9, 6), (6, 3, 6)), ((3, 4, 4), (6, 8, 8)),
            ((3, 4, 4), (6, 12, 20)), ((3, 7, 7), (6, 4, 4)), ((3, 4, 4), (6, 7, 9)), ((3, 8, 2), (6, 4, 4)),
            ((3, 4, 4), (6, 1, 1)), ((5,), (8,)), ((6, 5), (6, 8)), ((6, 5), (9, 8)), ((6, 5), (4, 5)),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("kind", ["fitnet", "normalized_l1"])
    def test_any_pair_of_one_layout(
        self, kind: str, student: Any, teacher: Any, example: Callable[..., Any], build: Callable[..., Any]
    ) -> None:
        given = example(student=student, teacher=teacher)
        loss = build(kind, given).train()
        assert loss.adapters[0](given[0].features["f"]).shape == given[1].features["f"].shape
        loss(*given).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters())
        assert given[0].features["f"].grad.any()

    @pytest.mark.parametrize(
        ("student", "teacher"), [((16, 5), (8, 4, 4)), ((8, 4, 4), (17, 5)), ((8, 4, 4), (5,)), ((16, 5), (8,))]
    )
    def test_unlike_layouts(
        self, student: Any, teacher: Any, example: Callable[..., Any], build: Callable[..., Any]
    ) -> None:
        given = example(student=student, teacher=teacher)
        value = build("normalized_l1", given)(*given)
        value.backward()
        assert given[0].features["f"].grad.isfinite().all()

    def test_equal_shapes_need_no_adapter(self) -> None:
        assert isinstance(linear_adapter(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)), nn.Identity)

    def test_tokens_become_a_map_row_by_row_without_the_class_token(self) -> None:
        tokens = torch.arange(7.0).reshape(1, 7, 1)
        assert to_map(tokens[:, 1:], 2, 3).tolist() == [[[[1, 2, 3], [4, 5, 6]]]]
        assert to_map(tokens, 4, 6).tolist() == [[[[1, 2, 3], [4, 5, 6]]]]

    def test_tokens_that_fill_no_grid_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="7 tokens fill no grid"):
            to_map(torch.zeros(1, 7, 3), 4, 4)

    def test_averages_where_one_side_is_a_vector(self) -> None:
        feature = torch.randn(2, 3, 4, 5)
        mine, target = align(feature, torch.zeros(2, 7))
        torch.testing.assert_close(mine, feature.mean((2, 3)))
        assert target.shape == (2, 7)

    @pytest.mark.parametrize("shape", [(), (2, 2, 2, 2)])
    def test_other_ranks_are_refused(self, shape: Any, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        with pytest.raises(ConfigError, match="a feature must be a map"):
            build("normalized_l1", example(student=shape))

    def test_distances_are_in_full_precision_under_autocast(
        self, example: Callable[..., Any], build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given = example(teacher=(6, 4, 4), dtype=torch.bfloat16)
        loss, seen = build("normalized_l1", given), []
        monkeypatch.setattr(loss, "distance", lambda s, t: seen.extend([s.dtype, t.dtype]) or s.sum())
        with torch.autocast("cpu", torch.bfloat16):
            loss(*given)
        assert seen == [torch.float32, torch.float32]

    def test_adapters_are_the_terms_parameters(self, example: Callable[..., Any], build: Callable[..., Any]) -> None:
        loss = build("fitnet", example(teacher=(6, 2, 2)))
        assert isinstance(loss, FeatureLoss)
        assert {name.split(".")[0] for name in loss.state_dict()} == {"adapters"}
