"""A small run on digits with a teacher of foreign weights, trained once; each test gets a copy of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kdctl import runs
from kdctl.config.expand import load_experiment
from kdctl.device import settle_by_rule
from kdctl.experiment import Plan, train
from kdctl.models.record import ModelRecord, build_model
from kdctl.watch import Reporter

FILE = """
name: small
data: {kind: digits, limit: 200, val_fraction: 0.2}
teacher: {kind: digits_cnn, width: 6, weights: foreign.safetensors, control: true}
student: {kind: digits_cnn, width: 4}
distill: {T: 4, alpha: 0.5}
optimizer: {kind: adamw, lr: 0.01}
train: {epochs: 1, device: cpu, threads: 1}
"""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an experiment and its run."""
    folder = tmp_path_factory.mktemp("analysis")
    torch.manual_seed(0)
    net = build_model(ModelRecord("digits_cnn", {"width": 6}, 10, list("0123456789"), [1, 8, 8])).net
    save_file(net.state_dict(), folder / "foreign.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "small.yaml").write_text(FILE)
        loaded = load_experiment(folder / "small.yaml").experiment
        experiment = loaded.model_copy(update={"train": settle_by_rule(loaded.train)})
        train(Plan(experiment, FILE), Reporter())
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> runs.Run:
    """The run; its teacher's weights lie where the experiment named them."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return runs.Run(Path("runs/small/001"))
