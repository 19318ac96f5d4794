"""A small experiment on digits, and a reporter that stops it where a test wants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdctl import runs
from kdctl.config.expand import load_experiment
from kdctl.config.schema import Experiment
from kdctl.device import settle_by_rule
from kdctl.experiment import Plan, train
from kdctl.watch import Reporter

FILE = """
name: small
data: {kind: digits, limit: 300, labels_per_class: 10, augment: [{kind: random_crop, padding: 1}]}
teacher: {kind: digits_cnn, width: 8, train: {epochs: 2, data: {labels_per_class: all}}}
student: {kind: digits_cnn, width: 4}
distill: {T: 4, alpha: 0.9}
optimizer: {kind: adamw, lr: 0.01}
train: {epochs: 2, device: cpu, threads: 1}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def experiment(folder: Path) -> Callable[..., Experiment]:
    """The small experiment, with overrides or another file."""

    def load(*overrides: str, text: str = FILE) -> Experiment:
        (folder / "small.yaml").write_text(text)
        loaded = load_experiment(folder / "small.yaml", overrides).experiment
        return loaded.model_copy(update={"train": settle_by_rule(loaded.train)})

    return load


@pytest.fixture
def run_it(experiment: Callable[..., Experiment]) -> Callable[..., tuple[runs.Run, dict[str, Any]]]:
    """Trains the small experiment; the run and its document."""

    def go(*overrides: str, text: str = FILE, **plan: Any) -> tuple[runs.Run, dict[str, Any]]:
        document = train(Plan(experiment(*overrides, text=text), text, **plan), Reporter())
        return runs.Run(Path(document["run"])), document

    return go
