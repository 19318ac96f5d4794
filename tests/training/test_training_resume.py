"""A run that is stopped or dies anywhere continues to bit-identical weights and metrics."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdctl import checkpoint, runs
from kdctl.config.schema import Experiment
from kdctl.errors import Interrupted, KdctlError
from kdctl.experiment import Plan, resume, train
from kdctl.watch import Reporter

VOLATILE = ("seconds", "eval_seconds", "times", "samples_per_second")


class Crash(Exception):
    """The process dies here."""


class CrashAt(Reporter):
    """Dies at the n-th step of the run, or right after the n-th epoch."""

    def __init__(self, step: int = -1, epoch: int = -1) -> None:
        self.steps, self.epochs = step, epoch

    def step(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
        self.steps -= 1
        if self.steps == 0:
            raise Crash

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        self.epochs -= 1
        if self.epochs == 0:
            raise Crash


class SignalAt(Reporter):
    """Sends this process a signal at the n-th step."""

    def __init__(self, step: int, number: int) -> None:
        self.steps, self.number = step, number

    def step(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
        self.steps -= 1
        if self.steps == 0:
            os.kill(os.getpid(), self.number)


def outcome(run: runs.Run) -> tuple[bytes, bytes, list[dict[str, Any]]]:
    lines = [{k: v for k, v in line.items() if k not in VOLATILE} for line in run.metrics()]
    return (run / "student.safetensors").read_bytes(), (run / "teacher.safetensors").read_bytes(), lines


def only_run(folder: Path) -> runs.Run:
    return runs.find("small", folder / "runs")


@pytest.fixture
def undisturbed(run_it: Callable[..., Any]) -> Any:
    run, _ = run_it("name=whole", "train.ema=0.9")
    return outcome(run)


@pytest.mark.parametrize(
    "crash", [CrashAt(step=1), CrashAt(step=4), CrashAt(epoch=1), CrashAt(step=8), CrashAt(epoch=3)]
)
def test_a_crash_resumes_bit_identically(
    crash: CrashAt, folder: Path, experiment: Callable[..., Experiment], undisturbed: Any
) -> None:
    with pytest.raises(Crash):
        train(Plan(experiment("train.ema=0.9"), ""), crash)
    run = only_run(folder)
    assert run.info["status"] == "failed"
    resume(run, Reporter())
    assert outcome(run) == undisturbed
    assert run.info["status"] == "done"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_resumes(
    number: int, code: int, folder: Path, experiment: Callable[..., Experiment], undisturbed: Any
) -> None:
    with pytest.raises(Interrupted) as stopped:
        train(Plan(experiment("train.ema=0.9"), ""), SignalAt(7, number))
    assert stopped.value.code == code
    run = only_run(folder)
    assert run.info["status"] == "interrupted"
    saved = checkpoint.load(run.stage_dir("student") / "checkpoints" / "last.pt")
    assert (saved["progress"]["epoch"], saved["progress"]["step"]) == (0, 1)  # the teacher took six steps
    resume(run, Reporter())
    assert outcome(run) == undisturbed


def test_a_done_run_is_not_resumed(run_it: Callable[..., Any]) -> None:
    run, _ = run_it()
    with pytest.raises(KdctlError, match="nothing to resume"):
        resume(run, Reporter())


def test_a_group_resumes_with_what_is_left(
    folder: Path, experiment: Callable[..., Experiment], run_it: Callable[..., Any]
) -> None:
    _, whole = run_it("name=whole", seeds=2, controls=("baseline",))
    with pytest.raises(Crash):
        train(Plan(experiment(), "", seeds=2, controls=("baseline",)), CrashAt(step=20))
    group = resume(runs.find("small/001", folder / "runs"), Reporter())
    assert len(group["seeds"]) == 2
    assert [row["student"]["test"] for row in group["seeds"]] == [row["student"]["test"] for row in whole["seeds"]]
    assert group["summary"] == whole["summary"]


def test_a_damaged_checkpoint_is_named_and_not_executed(folder: Path, experiment: Callable[..., Experiment]) -> None:
    with pytest.raises(Crash):
        train(Plan(experiment(), ""), CrashAt(step=4))
    run = only_run(folder)
    path = run.stage_dir("teacher") / "checkpoints" / "last.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(KdctlError, match=r"last\.pt.*damaged"):
        resume(run, Reporter())


def test_a_checkpoint_never_unpickles_objects(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"student": Evil()}, tmp_path / "last.pt")
    with pytest.raises(KdctlError):
        checkpoint.load(tmp_path / "last.pt")
    assert not (tmp_path / "executed").exists()
