"""One step by hand: the weights move by the gradient of the mean over what counts, not over what is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from kdctl import build
from kdctl.config.schema import Experiment
from kdctl.data.loader import TrainLoader
from kdctl.errors import ConfigError
from kdctl.models.record import load_model, save_model
from kdctl.signals import IGNORE, find_logits

DIGITS = """
name: one
data: {kind: digits, limit: 60, labels_per_class: 2, batch_size: 60, val_fraction: 0}
student: {kind: digits_cnn, width: 4}
optimizer: {kind: sgd, lr: 0.5, momentum: 0, weight_decay: 0}
schedule: {kind: constant}
train: {epochs: 1, device: cpu, threads: 1, precision: fp32, keep: last}
"""
TEXTS = """
name: one
task: {kind: causal_lm}
data: {kind: corpus, root: ., max_length: 16, vocab_size: 40, units: characters, batch_size: 64, test_share: 0.1, val_fraction: 0}
student: {kind: gpt, depth: 1, width: 16, heads: 2, dropout: 0}
optimizer: {kind: sgd, lr: 0.5, momentum: 0, weight_decay: 0}
schedule: {kind: constant}
train: {epochs: 1, device: cpu, threads: 1, precision: fp32, keep: last}
"""  # noqa: E501


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("text", [DIGITS, TEXTS], ids=["labels", "tokens"])
def test_weights_move_by_the_mean(
    text: str, accumulate: int, folder: Path, experiment: Callable[..., Experiment], run_it: Callable[..., Any]
) -> None:
    """A third of the images have a label, the last block of a text is short: neither changes what a label weighs."""
    if text is TEXTS:
        pytest.importorskip("tokenizers")
        (folder / "train.txt").write_text("to be or not to be, that is the question: " * 12)
    elif accumulate > 1:
        text = text.replace(
            "kind: digits_cnn, width: 4", "kind: tiny_transformer, depth: 1, width: 16, heads: 2, patch: 2"
        )
    asked = experiment(text=text)
    data = build.build_data(asked)
    before = build.build_model(asked.student_stage.student, data, "student")  # type: ignore[arg-type]
    save_model(before, folder / "start")
    run, _ = run_it("student.weights=start.safetensors", f"train.accumulate={accumulate}", text=text)
    after = load_model(run.path)
    (batch,) = TrainLoader(data.train, batch_size=64, order_seed=0).epoch(0)
    logits = find_logits(before.train()(batch.inputs))
    known = batch.targets != IGNORE
    assert 0 < int(known.sum()) < known.numel()
    F.cross_entropy(logits[known], batch.targets[known].long()).backward()
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert old.grad is not None
        torch.testing.assert_close(
            new, old - 0.5 * old.grad, rtol=1e-4, atol=1e-6, msg=lambda said, n=name: f"{n}: {said}"
        )
    assert not torch.equal(next(before.parameters()), next(after.parameters()))


NORMALISED = """
from torch import nn


class Normalised(nn.Sequential):
    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, num_classes))
"""


@pytest.mark.parametrize(
    "student", ["student={kind: ./own.py:Normalised}", "method={kind: one, branches: 2, at: layer3}"]
)
def test_a_micro_batch_of_one_sample_has_no_statistics(student: str, folder: Path, run_it: Callable[..., Any]) -> None:
    (folder / "own.py").write_text(NORMALISED)
    asked = (student, "data.batch_size=12", "data.labels_per_class=all")
    assert run_it(*asked, "train.accumulate=6", text=DIGITS)[1]["status"] == "done"
    with pytest.raises(ConfigError, match="no statistics of a single sample"):
        run_it(*asked, "train.accumulate=12", text=DIGITS)
