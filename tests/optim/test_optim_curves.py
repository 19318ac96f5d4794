"""Numbers that change over the training: moments in epochs and steps, and a temperature that follows them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kdctl import registry
from kdctl.config.expand import load_experiment
from kdctl.errors import ConfigError
from kdctl.losses.base import Loss
from kdctl.optim.schedules import WeightSchedule, curve_at
from kdctl.signals import Batch, Signals


@pytest.mark.parametrize(
    ("curve", "steps", "points"),
    [
        (2.5, 10, {0: 2.5, 99: 2.5}),
        ({0: 1, 4: 4}, 10, {0: 1, 1: 1.75, 2: 2.5, 4: 4, 40: 4}),
        ({4: 4, 2: 1}, 10, {0: 1, 2: 1, 3: 2.5, 9: 4}),
        ({"0 steps": 0, "500 steps": 10}, 100, {0: 0, 0.5: 1, 2.5: 5, 5: 10, 6: 10}),
        ({"50 steps": 0, 1: 8, "150 steps": 2}, 100, {0: 0, 0.5: 0, 0.75: 4, 1: 8, 1.25: 5, 1.5: 2, 2: 2}),
        ({3: 7}, 10, {0: 7, 3: 7, 5: 7}),
        ({1: 2, "10 steps": 5}, 10, {0: 2, 1: 5, 2: 5}),  # a jump, at the same moment
    ],
)
def test_curves(curve: object, steps: int, points: dict[float, float]) -> None:
    for epoch, expected in points.items():
        assert curve_at(curve, epoch, steps) == pytest.approx(expected, abs=1e-12)  # type: ignore[arg-type]
        assert WeightSchedule(curve, steps).at(epoch) == pytest.approx(expected, abs=1e-12)  # type: ignore[arg-type]


def test_a_scheduled_temperature_reaches_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (Signals(3 * torch.randn(4, 5, generator=generator, dtype=torch.float64)) for _ in range(2))
    index = torch.arange(4)
    batch = Batch(torch.zeros(4, 1), index, index, index * 0)

    def by_hand(temperature: float) -> float:
        s, t = student.logits.numpy() / temperature, teacher.logits.numpy() / temperature
        p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (t, s))
        return float(temperature**2 * (p * np.log(p / q)).sum())

    loss: Loss = registry.create("losses", "kd", {"temperature": {0: 1, 4: 4, "60 steps": 2}})
    loss.steps_per_epoch = 10
    for epoch, temperature in {0.0: 1, 2.0: 2.5, 4.0: 4, 5.0: 3, 7.0: 2}.items():
        loss.epoch = epoch
        assert float(loss(student, teacher, batch)) == pytest.approx(by_hand(temperature), rel=1e-10)


BASE = "data: {kind: digits}\nstudent: {kind: digits_cnn, width: 4}\nteacher: {kind: digits_cnn, control: true}\n"


@pytest.mark.parametrize("moment", ["-1", "0.5", "soon", "5 step", "'-5 steps'", "1.5 steps", "true"])
@pytest.mark.parametrize("key", ["weight", "temperature"])
def test_what_is_no_moment_is_refused_with_its_line(tmp_path: Path, moment: str, key: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(BASE + f"losses:\n  - kind: kd\n    {key}:\n      0: 1\n      {moment}: 2\n")
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    (problem,) = caught.value.problems
    assert problem.line == 8
    if moment in ("0.5", "true"):  # no key of any map
        assert "a key is text or a whole number" in problem.message
    else:
        assert "allowed as a key" in problem.message and str(problem.key).startswith(f"losses.0.{key}.")


def test_moments_pass_through_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(BASE + "losses: [{kind: kd, weight: {0: 0, 500 steps: 1}, temperature: {0: 1, 4: 4}}]\n")
    (loss,) = load_experiment(path).experiment.student_stage.losses
    assert loss.weight == {0: 0, "500 steps": 1} and loss.arguments["temperature"] == {0: 1, 4: 4}


def test_a_temperature_of_0_is_refused_at_its_moment(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(BASE + "losses: [{kind: kd, temperature: {0: 1,\n  4: 0}}]\n")
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    assert [(p.line, p.key) for p in caught.value.problems] == [(5, "losses.0.temperature.4")]
