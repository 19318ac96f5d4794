"""What an experiment does where labels are missing: on what it is measured, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdctl import runs
from kdctl.config.schema import Experiment
from kdctl.data.digits import Digits
from kdctl.errors import ConfigError
from kdctl.experiment import Plan, train
from kdctl.watch import Reporter

FILE = """
name: small
data: {kind: npz, path: d.npz}
teacher: {kind: digits_cnn, width: 8, train: {epochs: 8}}
student: {kind: digits_cnn, width: 4}
distill: {T: 4, alpha: 0.9}
optimizer: {kind: adamw, lr: 0.01}
train: {epochs: 2, device: cpu, threads: 1}
"""
ALONE = ("data.val_fraction=0", "teacher.train=null", "teacher.control=true", "train.epochs=1")
"""Without labels a teacher is neither trained nor checked."""


def _digits(folder: Path, *, train: bool, test: bool) -> None:
    """d.npz of 300 training and 100 test images, each split with or without its labels."""
    digits = Digits().load().train
    images, labels = digits.images[:400].numpy()[:, 0], digits.targets[:400].numpy()
    truth = np.concatenate([np.where(train, labels[:300], -100), np.where(test, labels[300:], -100)])
    np.savez(
        folder / "d.npz", x_train=images[:300], y_train=truth[:300], x_test=images[300:], y_test=truth[300:],
        class_names=np.array(list("0123456789")),
    )  # fmt: skip


def test_a_test_split_without_labels_is_not_what_is_measured(folder: Path, run_it: Callable[..., Any]) -> None:
    _digits(folder, train=True, test=False)
    run, group = run_it("train.epochs=1", text=FILE, seeds=2, controls=("baseline",))
    assert "the test split has no label: validation stands in for it" in group["notes"]
    assert group["summary"]["gain"]["n"] == 2 and "test" not in runs.read_json(run / "summary.json")["student"]["last"]


def test_without_any_label_runs_are_not_compared(folder: Path, run_it: Callable[..., Any]) -> None:
    _digits(folder, train=False, test=False)
    with pytest.raises(ConfigError, match="no sample has a label, and the runs of a group"):
        run_it(*ALONE, text=FILE, seeds=2)
    assert run_it(*ALONE, text=FILE)[1]["status"] == "done"


def test_a_baseline_needs_labels_to_train_on(folder: Path, experiment: Callable[..., Experiment]) -> None:
    _digits(folder, train=False, test=True)
    with pytest.raises(ConfigError, match="without a teacher the student would learn nothing"):
        train(Plan(experiment(*ALONE, text=FILE), FILE, controls=("baseline",)), Reporter())
    assert not (folder / "runs").exists()
    assert train(Plan(experiment(*ALONE, text=FILE), FILE, seeds=2), Reporter())["summary"]["student"]["n"] == 2


def test_terms_on_labels_alone_need_one(folder: Path, run_it: Callable[..., Any]) -> None:
    _digits(folder, train=False, test=True)
    with pytest.raises(ConfigError, match="every term learns from labels"):
        run_it(*ALONE, "distill=null", "losses=[{kind: dkd}]", text=FILE)
    assert run_it(*ALONE, "distill=null", "losses=[{kind: dkd}, {kind: kd}]", text=FILE)[1]["status"] == "done"
