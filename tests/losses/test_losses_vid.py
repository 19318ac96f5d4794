"""vid against its formula written out in numpy, and that its variances train and are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kdctl.errors import ConfigError
from kdctl.losses.vid import VID

Make = Callable[..., Any]


def by_hand(loss: VID, s: Any, t: Any) -> Any:
    """The value of each sample from the weights of the loss."""
    weights = {name: value.numpy() for name, value in loss.adapters[0].state_dict().items()}
    mean = s
    for position in (0, 2, 4):
        kernel = weights[f"regressor.{position}.weight"][:, :, 0, 0]
        mean = np.einsum("oc,bchw->bohw", kernel, mean if position == 0 else np.maximum(mean, 0))
    variance = (np.logaddexp(0, weights["log_scale"]) + loss.eps)[None, :, None, None]
    return (((mean - t) ** 2 / variance + np.log(variance)) / 2).mean((1, 2, 3))


class TestVID:
    @pytest.mark.parametrize("variance", [0.5, 5.0, 800.0])
    def test_formula(self, variance: float, example: Make, build: Make) -> None:
        given = example(size=3, student=(2, 4, 4), teacher=(5, 4, 4))
        loss = build("vid", given, init_pred_var=variance)
        s, t = given[0].features["f"].detach().numpy(), given[1].features["f"].numpy()
        assert loss.values(*given).tolist() == pytest.approx(by_hand(loss, s, t).tolist(), rel=1e-10)
        assert loss.adapters[0].variance().flatten().tolist() == pytest.approx([variance] * 5, rel=1e-5)

    @pytest.mark.parametrize("larger", ["student", "teacher"])
    def test_the_larger_map_is_averaged_down(self, larger: str, example: Make, build: Make) -> None:
        given = example(size=2, **{"student": (3, 2, 2), "teacher": (3, 2, 2), larger: (3, 4, 4)})
        loss = build("vid", given)
        maps = [given[0].features["f"].detach().numpy(), given[1].features["f"].numpy()]
        s, t = (f.reshape(2, 3, 2, f.shape[2] // 2, 2, f.shape[3] // 2).mean((3, 5)) for f in maps)
        assert loss.values(*given).tolist() == pytest.approx(by_hand(loss, s, t).tolist(), rel=1e-10)

    @pytest.mark.parametrize(
        ("student", "teacher"),
        [((5,), (7,)), ((6, 3), (6, 4)), ((6, 3), (4, 5)), ((16, 3), (2, 4, 4)), ((2, 4, 4), (5,))],
    )
    def test_other_layouts(self, student: Any, teacher: Any, example: Make, build: Make) -> None:
        given = example(student=student, teacher=teacher)
        build("vid", given)(*given).backward()
        assert given[0].features["f"].grad.any()

    def test_variances_are_parameters_that_train_and_are_kept(self, example: Make, build: Make) -> None:
        """mdistiller kept them in a plain list: they were neither optimised nor saved."""
        given = example(student=(2, 4, 4), teacher=(3, 4, 4))
        loss = build("vid", given)
        names = {"adapters.0.log_scale", *(f"adapters.0.regressor.{i}.weight" for i in (0, 2, 4))}
        assert set(loss.state_dict()) == {name for name, _ in loss.named_parameters()} == names
        optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
        before = loss.adapters[0].log_scale.detach().clone()
        loss(*given).backward()
        optimizer.step()
        assert (loss.adapters[0].log_scale != before).all()
        other = build("vid", given)
        other.load_state_dict(loss.state_dict())
        assert other(*given).item() == loss(*given).item()

    def test_the_best_variance_is_the_mean_squared_error(self, example: Make, build: Make) -> None:
        given = example(size=4, student=(2, 4, 4), teacher=(3, 4, 4))
        loss = build("vid", given)
        optimizer = torch.optim.Adam([loss.adapters[0].log_scale], lr=0.1)
        for _ in range(300):
            optimizer.zero_grad()
            loss(*given).backward()
            optimizer.step()
        error = (loss.adapters[0](given[0].features["f"]) - given[1].features["f"]).square().mean((0, 2, 3))
        assert loss.adapters[0].variance().flatten().tolist() == pytest.approx(error.tolist(), rel=1e-3)

    def test_refuses_a_variance_below_the_smallest(self) -> None:
        with pytest.raises(ConfigError, match="not above eps"):
            VID(init_pred_var=1e-5, eps=1e-5)
