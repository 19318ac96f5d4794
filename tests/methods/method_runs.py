"""Small experiments with a training method: built, trained, interrupted, and measured again from disk."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from kdctl import build, runs
from kdctl.build import Built
from kdctl.config.expand import load_experiment
from kdctl.config.schema import Experiment, TrainStage
from kdctl.device import settle_by_rule
from kdctl.errors import Interrupted
from kdctl.evaluate import validate
from kdctl.experiment import Plan, resume, train
from kdctl.models.record import load_model
from kdctl.runs import Run
from kdctl.signals import Batch
from kdctl.watch import Reporter

BASE = """
name: small
data: {kind: digits, limit: 300, batch_size: 64, augment: [{kind: random_crop, padding: 1}]}
student: {kind: digits_cnn, width: 4}
optimizer: {kind: adamw, lr: 0.01}
train: {epochs: 3, device: cpu, threads: 1}
"""
TEACHER = """
  - name: teacher
    role: teacher
    student: {kind: digits_cnn, width: 8}
    losses: [{kind: ce}]
    method: {kind: distill}
    epochs: 4
"""
LOOSE = '''
from torch import nn


class Loose(nn.Module):
    """A net whose parts are not in a row."""

    def __init__(self, *, num_classes: int, in_channels: int = 1) -> None:
        super().__init__()
        self.layer3 = nn.Conv2d(in_channels, num_classes, 3)

    def forward(self, x):
        return self.layer3(x).mean((2, 3))
'''
VOLATILE = ("seconds", "eval_seconds", "times", "samples_per_second")


class Crash(Exception):
    """The process dies here."""


class CrashAt(Reporter):
    """Dies at the n-th step of a stage."""

    def __init__(self, step: int, stage: str = "student") -> None:
        self.steps, self.name = step, stage

    def step(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
        self.steps -= stage == self.name
        if self.steps == 0:
            raise Crash

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        pass


def load(folder: Path, text: str, *overrides: str) -> Experiment:
    (folder / "small.yaml").write_text(text)
    loaded = load_experiment(folder / "small.yaml", overrides).experiment
    return loaded.model_copy(update={"train": settle_by_rule(loaded.train)})


def built(folder: Path, text: str, *overrides: str) -> Built:
    """The student's stage of an experiment, as training builds it; an earlier stage's model is in the folder."""
    experiment = load(folder, text, *overrides)
    stage = next(s for s in experiment.train_stages if s.role == "student")
    return build.build_stage(experiment, stage, build.build_data(experiment), lambda name: folder / name)


def stage_of(folder: Path, text: str) -> TrainStage:
    return next(s for s in load(folder, text).train_stages if s.role == "student")


def run_it(folder: Path, text: str, *overrides: str, name: str = "small") -> Run:
    document = train(Plan(load(folder, text, f"name={name}", *overrides), text), Reporter())
    return Run(Path(document["run"]))


def outcome(run: Run) -> tuple[bytes, list[dict[str, Any]]]:
    lines = [{k: v for k, v in line.items() if k not in VOLATILE} for line in run.metrics()]
    return (run / "student.safetensors").read_bytes(), lines


def check_resumes(folder: Path, text: str, step: int, *overrides: str) -> None:
    """A run that dies at a step of the student's stage continues to what it would have been."""
    whole = run_it(folder, text, *overrides, name="whole")
    with pytest.raises(Crash):
        train(Plan(load(folder, text, "name=broken", *overrides), text), CrashAt(step))
    broken = runs.find("broken", folder / "runs")
    resume(broken, Reporter())
    assert outcome(broken) == outcome(whole)


def stop_and_resume(folder: Path, text: str, step: int, *overrides: str) -> tuple[Any, Any]:
    """What a run is in the end that was stopped by a signal after a step (and saved there), and one that was not."""

    class StopAt(CrashAt):
        def step(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
            self.steps -= stage == self.name
            if self.steps == 0:
                os.kill(os.getpid(), signal.SIGTERM)

    whole = run_it(folder, text, *overrides, name="whole")
    with pytest.raises(Interrupted):
        train(Plan(load(folder, text, "name=stopped", *overrides), text), StopAt(step))
    stopped = runs.find("stopped", folder / "runs")
    resume(stopped, Reporter())
    return outcome(stopped), outcome(whole)


def check_shipped_is_validated(folder: Path, text: str, run: Run) -> None:
    """The shipped student, from disk, has the validation metrics of the epoch that was kept."""
    experiment = load(folder, text)
    data = build.build_data(experiment)
    assert data.val is not None
    best = [line for line in run.metrics() if line["stage"] == "student" and line["best"]][-1]
    student = load_model(run / "student")
    found = validate(student, data.val, build.build_task(experiment), torch.device("cpu"), 256, "fp32")
    assert found == pytest.approx(best["val"], rel=1e-6)


def first_batch(parts: Built, epoch: int = 0) -> Batch:
    return next(iter(parts.loader.epoch(epoch)))
