"""Shares of the gradient: measured as by hand, without a trace in training, and balanced to be the weights."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdctl import build, runs, step
from kdctl.build import Built
from kdctl.clock import Clock
from kdctl.config.schema import Experiment
from kdctl.data.prepare import Data
from kdctl.errors import Interrupted
from kdctl.experiment import Plan, resume, train
from kdctl.shares import balancing_factors, shares
from kdctl.step import Step
from kdctl.watch import Reporter

FILE = """
name: small
data: {kind: digits, limit: 300, batch_size: 48, augment: [{kind: random_crop, padding: 1}]}
teacher: {kind: digits_cnn, width: 8, control: true}
student: {kind: digits_cnn, width: 4}
losses:
  - {kind: ce, name: task, weight: 0.3}
  - {kind: kd, weight: 0.7, temperature: 2}
  - {kind: fitnet, name: hint, weight: 4, taps: [layer2]}
optimizer: {kind: sgd, lr: 0.05, momentum: 0.9}
train: {epochs: 3, device: cpu, threads: 1}
"""

WITHOUT_NORM = ("student={kind: mlp, hidden: [16]}", "losses.hint.taps=[{student: layer1, teacher: layer2}]")


@pytest.fixture
def load(experiment: Callable[..., Experiment]) -> Callable[..., Experiment]:
    def go(*overrides: str) -> Experiment:
        return experiment(*overrides, text=FILE)

    return go


def built(experiment: Experiment, data: Data | None = None) -> Built:
    return build.build_stage(experiment, experiment.student_stage, data or build.build_data(experiment), Path)


def by_hand(stage: Built, batch: Any) -> dict[str, float]:
    """The norm of each weighted term's gradient by the student, from a forward and a backward pass of its own."""
    norms = {}
    for name, weight in stage.method.weights(0.0).items():
        for parameter in stage.method.trained.parameters():
            parameter.grad = None
        (weight * stage.method.step(batch, 0.0)[name] / batch.size).backward()
        found = [p.grad for p in stage.method.student.net.parameters() if p.grad is not None]
        norms[name] = float(torch.cat([g.double().flatten() for g in found]).norm())
    return norms


@pytest.mark.parametrize("parts", [1, 4])
def test_shares_are_those_of_separate_backward_passes(load: Callable[..., Experiment], parts: int) -> None:
    """Batch normalisation sees micro-batches apart, so a student without it is taken."""
    loaded = load(*WITHOUT_NORM)
    data = build.build_data(loaded)
    stage, mirror = built(loaded, data), built(loaded, data)
    measure = Step(stage, loaded.student_stage, Clock(), Reporter(), parts)
    batch = next(iter(stage.loader.epoch(0)))
    norms = by_hand(mirror, batch)
    measure(batch, 0.0)
    assert set(norms) == {"task", "kd", "hint"} and min(norms.values()) > 0
    total = sum(norms.values())
    assert measure.shares == pytest.approx({name: norm / total for name, norm in norms.items()}, rel=1e-4)
    assert measure.factors == {}


def weights_of(run: runs.Run) -> bytes:
    return (run / "student.safetensors").read_bytes()


def run(experiment: Experiment) -> runs.Run:
    return runs.Run(Path(train(Plan(experiment, ""), Reporter())["run"]))


def test_measuring_leaves_no_trace(load: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "_SHARES_EVERY", 2)
    often = run(load("train.accumulate=2"))
    monkeypatch.setattr(Step, "_measures", lambda *_: False)
    never = run(load("train.accumulate=2"))
    assert weights_of(often) == weights_of(never)
    lines = [[(line["loss"], line["terms"], line["val"]) for line in made.metrics()] for made in (often, never)]
    assert lines[0] == lines[1]
    for line in often.metrics():
        assert set(line["gradient_shares"]) == {"task", "kd", "hint"}
        assert sum(line["gradient_shares"].values()) == pytest.approx(1, abs=1e-5)
    assert all(line["gradient_shares"] == {} for line in never.metrics())


@pytest.mark.parametrize("method", ["distill", "dot"])
def test_a_compiled_student_is_measured(
    load: Callable[..., Experiment], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled, a forward pass gives its buffers away to the first of several backward passes, unless told not to."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module: compile(module, backend="aot_eager"))
    terms = "losses=[{kind: ce}, {kind: kd}]"
    made = run(load(terms, "train.compile=true", "train.epochs=1", f"method={{kind: {method}}}"))
    assert all(len(line["gradient_shares"]) == 2 for line in made.metrics())


def test_one_term_is_not_measured(load: Callable[..., Experiment]) -> None:
    lines = run(load("losses=[{kind: ce}]")).metrics()
    assert [line["gradient_shares"] for line in lines] == [{}] * 3


# ----------------------------------------------------------------------------------------------------------- balance


def test_balance_makes_the_shares_the_weights(load: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch) -> None:
    """A learning rate of next to nothing: what is measured next differs by the batch's augmentation alone."""
    monkeypatch.setattr(step, "_SHARES_EVERY", 2)
    loaded = load("balance=gradient", "optimizer={kind: sgd, lr: 1e-12}")
    stage = built(loaded)
    stage.method.train()
    balanced = Step(stage, loaded.student_stage, Clock(), Reporter(), 1)
    batch = next(iter(stage.loader.epoch(0)))
    found: list[dict[str, float]] = []
    for _ in range(7):
        balanced(batch, 0.0)
        found.append(dict(balanced.shares))
    wanted = {"task": 0.3 / 5, "kd": 0.7 / 5, "hint": 4 / 5}
    assert found[0] != pytest.approx(wanted, rel=0.3)  # else there was nothing to balance
    assert found[1] == found[0]
    for later in (2, 4, 6):  # the factors in force are known to the measurement
        assert found[later] == pytest.approx(wanted, rel=1e-3)
    norms = by_hand(stage, batch)
    after = {name: norm * balanced.factors[name] for name, norm in norms.items()}
    assert sum(after.values()) == pytest.approx(sum(norms.values()), rel=1e-3)


def test_a_term_that_comes_later_is_balanced_when_it_comes(load: Callable[..., Experiment]) -> None:
    loaded = load("balance=gradient", "losses.hint.weight={1: 0, 2: 4}", "optimizer={kind: sgd, lr: 1e-12}")
    stage = built(loaded)
    balanced = Step(stage, loaded.student_stage, Clock(), Reporter(), 1)
    batch = next(iter(stage.loader.epoch(0)))
    for epoch in (0.0, 0.5):
        balanced(batch, epoch)
    assert set(balanced.factors) == {"task", "kd"}
    balanced(batch, 1.5)
    assert set(balanced.factors) == {"task", "kd", "hint"} == set(balanced.shares)


def test_a_step_that_did_not_fit_measures_once(load: Callable[..., Experiment]) -> None:
    """The second try has other micro-batches and the factors of before; the count of steps does not run ahead."""
    loaded = load("balance=gradient", *WITHOUT_NORM)
    data = build.build_data(loaded)
    whole = Step(built(loaded, data), loaded.student_stage, Clock(), Reporter(), 1)
    tight = Step(built(loaded, data), loaded.student_stage, Clock(), Reporter(), 1)
    inner = tight.built.method.step

    def small(batch: Any, epoch: float) -> dict[str, Tensor]:
        if batch.size > 20:
            raise torch.OutOfMemoryError("no room")
        return inner(batch, epoch)

    tight.built.method.step = small  # type: ignore[method-assign]
    for batch in list(whole.built.loader.epoch(0))[:3]:
        losses = [float(made(batch, 0.0).loss) for made in (whole, tight)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert tight.parts == 4 and tight._number == whole._number == 3
    assert tight.factors == pytest.approx(whole.factors, rel=1e-3)


class StopAt(Reporter):
    """Sends this process a signal at the n-th step."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


VOLATILE = ("seconds", "eval_seconds", "times", "samples_per_second")


def lines_of(made: runs.Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in VOLATILE} for line in made.metrics()]


@pytest.mark.parametrize("at", [1, 2, 3, 5, 6, 7, 9, 12])
def test_balance_resumes_bit_identically(
    load: Callable[..., Experiment], at: int, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """Steps 1, 5, 9, ... are measured; six steps an epoch."""
    monkeypatch.setattr(step, "_SHARES_EVERY", 4)
    whole = run(load("name=whole", "balance=gradient"))
    plain = run(load("name=plain"))
    assert weights_of(plain) != weights_of(whole)
    with pytest.raises(Interrupted):
        train(Plan(load("name=cut", "balance=gradient"), ""), StopAt(at))
    cut = runs.find("cut", folder / "runs")
    resume(cut, Reporter())
    assert weights_of(cut) == weights_of(whole) and lines_of(cut) == lines_of(whole)


# ------------------------------------------------------------------------------------------------------------ numbers


def test_factors_from_norms() -> None:
    """6 and 2 with weights 1 and 3: the sum stays 8, so 2 and 6 are wanted."""
    assert balancing_factors({"a": 6.0, "b": 2.0}, {"a": 1.0, "b": -3.0}) == pytest.approx({"a": 1 / 3, "b": 3.0})
    found = balancing_factors({"a": 6.0, "b": 0.0, "c": 2.0}, {"a": 1.0, "b": 5.0, "c": 1.0})
    assert found == pytest.approx({"a": 4 / 6, "b": 1.0, "c": 2.0})
    assert balancing_factors({"a": 0.0}, {"a": 1.0}) == {"a": 1.0}
    assert shares({"a": 6.0, "b": 2.0}) == {"a": 0.75, "b": 0.25}
    assert shares({"a": 0.0}) == shares({"a": float("inf")}) == shares({"a": float("nan"), "b": 1.0}) == {}
