"""dot: two momenta, against a simulation in numpy, and what it does not go with."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdctl import build, runs
from kdctl.clock import Clock
from kdctl.config.expand import load_experiment
from kdctl.config.schema import Experiment
from kdctl.device import settle_by_rule
from kdctl.errors import ConfigError, Interrupted
from kdctl.experiment import Plan, resume, train
from kdctl.optim.two_momenta import TwoMomenta
from kdctl.step import Step
from kdctl.watch import Reporter

FILE = """
name: dot
data: {kind: digits, limit: 200, batch_size: 32}
teacher: {kind: digits_cnn, width: 6, control: true}
student: {kind: mlp, hidden: [8]}
method: {kind: dot, difference: 0.075}
losses: [{kind: ce, weight: 0.5}, {kind: kd, weight: 0.5}]
optimizer: {kind: sgd, lr: 0.1, momentum: 0.9, weight_decay: 0.01}
schedule: {kind: constant}
train: {epochs: 2, device: cpu, threads: 1}
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Experiment]:
    monkeypatch.chdir(tmp_path)

    def go(*overrides: str) -> Experiment:
        (tmp_path / "dot.yaml").write_text(FILE)
        found = load_experiment(tmp_path / "dot.yaml", overrides).experiment
        return found.model_copy(update={"train": settle_by_rule(found.train)})

    return go


def built(experiment: Experiment) -> build.Built:
    return build.build_stage(experiment, experiment.student_stage, build.build_data(experiment), Path)


def test_the_optimizer_is_what_its_formula_says() -> None:
    """Ten steps; some without a gradient of the teacher, some without the task's; decay on the weights alone."""
    generator = np.random.default_rng(0)
    weights = [generator.normal(size=(3, 2)), generator.normal(size=3)]
    parameters = [nn.Parameter(torch.tensor(w)) for w in weights]
    optimizer = TwoMomenta(
        parameters, lr=0.1, momentum=0.9, difference=0.075, weight_decay=0.01, decay_norm_and_bias=False
    )
    task, teacher = ([np.zeros_like(w) for w in weights] for _ in range(2))
    for step in range(10):
        pairs = [(generator.normal(size=w.shape), generator.normal(size=w.shape)) for w in weights]
        for part, use in ((1, step % 3 != 0), (0, step % 4 != 0)):
            if not use:
                continue
            if part:
                optimizer.exchange()
            sum((p * torch.tensor(g[part])).sum() for p, g in zip(parameters, pairs, strict=True)).backward()  # type: ignore[union-attr]
            if part:
                optimizer.exchange()
        for i, w in enumerate(weights):
            g_task = pairs[i][0] if step % 4 != 0 else 0
            g_teacher = pairs[i][1] if step % 3 != 0 else 0
            if step % 12 == 0:  # neither: it stays
                continue
            task[i] = 0.825 * task[i] + g_task + (0.01 * w if w.ndim > 1 else 0)
            teacher[i] = 0.975 * teacher[i] + g_teacher
            weights[i] = w - 0.1 * (task[i] + teacher[i])
        optimizer.step()
        optimizer.zero_grad()
        for p, w in zip(parameters, weights, strict=True):
            assert p.detach().numpy() == pytest.approx(w, rel=1e-10)


def gradients(stage: build.Built, batch: Any) -> list[np.ndarray[Any, Any]]:
    """The gradients of ce and of kd by hand: two graphs, two backward passes."""
    found = []
    for name in ("supervised", "kd"):
        losses = stage.method.step(batch, 0.0)
        own = torch.autograd.grad(0.5 * losses[name] / batch.size, list(stage.method.parameters()))
        found.append(np.concatenate([g.double().numpy().ravel() for g in own]))
    return found


@pytest.mark.parametrize("parts", [1, 3])
def test_training_is_the_simulation(load: Callable[..., Experiment], parts: int) -> None:
    loaded = load()
    stage, mirror = built(loaded), built(loaded)
    step = Step(stage, loaded.student_stage, Clock(), Reporter(), parts)

    def weights(of: build.Built) -> np.ndarray[Any, Any]:
        return np.concatenate([p.detach().double().numpy().ravel() for p in of.method.parameters()])

    w = weights(stage)
    task, teacher = np.zeros_like(w), np.zeros_like(w)
    for batch in stage.loader.epoch(0):
        mirror.method.trained.load_state_dict(stage.method.trained.state_dict())
        g_task, g_teacher = gradients(mirror, batch)
        step(batch, 0.0)
        task = 0.825 * task + g_task + 0.01 * w
        teacher = 0.975 * teacher + g_teacher
        w = w - 0.1 * (task + teacher)
        assert weights(stage) == pytest.approx(w, rel=1e-4, abs=1e-5)
        w = weights(stage)
    assert np.abs(teacher).max() > 1e-3 and np.abs(task).max() > 1e-3


def run(experiment: Experiment) -> dict[str, torch.Tensor]:
    document = train(Plan(experiment, ""), Reporter())
    return runs_weights(runs.Run(Path(document["run"])))


def runs_weights(run: runs.Run) -> dict[str, torch.Tensor]:
    return load_file(run / "student.safetensors")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_without_a_difference_it_is_sgd(load: Callable[..., Experiment], accumulate: int) -> None:
    more = (f"train.accumulate={accumulate}", "train.keep=last")
    split = run(load("method.difference=0", *more))
    plain = run(load("method=null", *more))
    other = run(load(*more))
    for name, value in plain.items():
        torch.testing.assert_close(split[name], value, rtol=1e-4, atol=1e-6)
    assert any((other[name] - value).abs().max() > 1e-3 for name, value in plain.items())


def test_sgd_with_nesterov_is_refused(load: Callable[..., Experiment]) -> None:
    for override in ("optimizer.nesterov=true", "optimizer={kind: adam, lr: 0.1}", "optimizer={kind: RMSprop}"):
        with pytest.raises(ConfigError, match="splits the momentum of sgd without nesterov"):
            built(load(override))


@pytest.mark.parametrize("momentum", [0.0, 0.05, 0.95, 0.925])
def test_momenta_out_of_range_are_refused(load: Callable[..., Experiment], momentum: float) -> None:
    """At 1 the teacher's momentum would forget nothing."""
    with pytest.raises(ConfigError, match="leaves the range"):
        built(load(f"optimizer.momentum={momentum}"))


def test_what_needs_one_gradient_is_refused(load: Callable[..., Experiment]) -> None:
    with pytest.raises(ConfigError, match="two gradients"):
        built(load("train.clip_norm=1"))
    plain = load()
    half = plain.model_copy(update={"train": plain.train.model_copy(update={"precision": "fp16"})})
    with pytest.raises(ConfigError, match="two gradients"):
        built(half)


def test_the_teachers_own_training_is_not_dot(load: Callable[..., Experiment]) -> None:
    loaded = load("teacher={kind: digits_cnn, width: 6, train: {epochs: 1}}")
    assert [stage.method.kind for stage in loaded.train_stages] == ["distill", "dot"]


class StopAt(Reporter):
    """Sends this process a signal at the n-th step."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("at", [1, 4, 6, 8])
def test_it_resumes_bit_identically(load: Callable[..., Experiment], at: int, tmp_path: Path) -> None:
    whole = run(load("name=whole"))
    with pytest.raises(Interrupted):
        train(Plan(load("name=cut"), ""), StopAt(at))
    cut = runs.find("cut", tmp_path / "runs")
    resume(cut, Reporter())
    again = runs_weights(cut)
    assert all(torch.equal(again[name], value) for name, value in whole.items())
