"""What a reporter reads while an epoch runs is what the epoch's line says at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kdctl.config.schema import Experiment
from kdctl.experiment import Plan, train
from kdctl.watch import Epoch, Reading, Reporter


class Reads(Reporter):
    """Reads after every step."""

    def __init__(self) -> None:
        self.begun: list[Epoch] = []
        self.last: Reading | None = None
        self.lines: list[tuple[dict[str, Any], Reading]] = []
        self.steps = 0

    def begin(self, epoch: Epoch) -> None:
        self.begun.append(epoch)

    def step(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
        running = self.begun[-1]
        assert (running.stage, running.epoch, running.epochs, running.steps) == (stage, epoch, epochs, steps)
        self.last = running.read()
        self.steps += 1

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        assert self.last is not None
        self.lines.append((line, self.last))


def test_a_reading_is_that_of_the_epoch(experiment: Callable[..., Experiment]) -> None:
    reads = Reads()
    train(Plan(experiment("train.epochs=2", "teacher.train.epochs=2"), ""), reads)
    assert [(e.stage, e.epoch) for e in reads.begun] == [("teacher", 0), ("teacher", 1), ("student", 0), ("student", 1)]
    assert reads.steps == sum(e.steps for e in reads.begun) and all(e.pause == 0 for e in reads.begun)  # on a CPU
    for line, seen in reads.lines:
        assert seen.loss == pytest.approx(line["loss"]) and seen.lr == line["lr"]
        assert dict(seen.terms) == pytest.approx(line["terms"])
        assert seen.samples_per_second == pytest.approx(line["samples_per_second"], rel=0.05)
