"""The loop itself: memory that does not suffice, where the time goes, and what is not done twice."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest import approx

from kdctl import cache, checkpoint, clock, device, evaluate, summary
from kdctl.clock import Clock
from kdctl.config.schema import Experiment
from kdctl.errors import DivergedError, KdctlError, OutOfMemoryError
from kdctl.experiment import Plan, load_run, resume, train
from kdctl.probe import choose
from kdctl.runs import Run
from kdctl.smoke import smoke
from kdctl.step import Step
from kdctl.teachers import turn
from kdctl.watch import Reporter

GREEDY = '''
import torch
from torch import nn


class Greedy(nn.Module):
    """Trains on at most `room` samples at once."""

    def __init__(self, *, room: int = 1000, num_classes: int = 10, image_shape: list[int] | None = None) -> None:
        super().__init__()
        self.room = room
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 10))

    def forward(self, x):
        y = self.layers(x)
        if self.training and len(x) > self.room:
            raise torch.OutOfMemoryError("no room")
        return y
'''


class Listening(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def greedy(folder: Path, experiment: Callable[..., Experiment], room: int, *more: str) -> tuple[Run, list[str]]:
    (folder / "greedy.py").write_text(GREEDY)
    listening = Listening()
    student = f"student={{kind: './greedy.py:Greedy', room: {room}}}"
    loaded = experiment(student, "teacher={kind: mlp, hidden: [8], control: true}", "data.batch_size=64", *more)
    document = train(Plan(loaded, ""), listening)
    return Run(Path(document["run"])), listening.said


def test_a_step_that_does_not_fit_is_taken_in_parts_with_the_same_loss(
    folder: Path, experiment: Callable[..., Experiment]
) -> None:
    """Dropout would differ if the generator were not put back before the second try."""
    small, said = greedy(folder, experiment, 16)
    told = "micro-batches a step from here on; the loss stays the same, but batch normalisation sees the smaller ones"
    assert [text for text in said if "out of memory" in text] == [f"out of memory: {n} {told}" for n in (2, 4)]
    large, _ = greedy(folder, experiment, 1000, "train.accumulate=4")
    lines = [[line["loss"] for line in run.metrics()] for run in (small, large)]
    assert lines[0] == lines[1]


def test_what_never_fits_ends_with_code_5(folder: Path, experiment: Callable[..., Experiment]) -> None:
    with pytest.raises(OutOfMemoryError, match="smaller micro-batches are not possible") as caught:
        greedy(folder, experiment, 0)
    assert caught.value.code == 5


def test_another_runtime_error_is_not_taken_for_a_lack_of_memory(
    folder: Path, experiment: Callable[..., Experiment]
) -> None:
    (folder / "greedy.py").write_text(GREEDY.replace('torch.OutOfMemoryError("no room")', 'RuntimeError("broken")'))
    with pytest.raises(RuntimeError, match="broken"):
        train(Plan(experiment("student={kind: './greedy.py:Greedy', room: 1}"), ""), Reporter())


# --------------------------------------------------------------------------------------------------------------- time


def test_a_section_inside_another_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
    watch = Clock()
    with watch.section("forward"), watch.section("teacher"):
        pass
    assert watch.take() == {"other": 1.0 + 5.0, "forward": 2.0 + 4.0, "teacher": 3.0}


def test_train_says_where_its_time_went(experiment: Callable[..., Experiment]) -> None:
    listening = Listening()
    document = train(Plan(experiment(), ""), listening)
    (line,) = [text for text in listening.said if text.startswith("stage student:") and "backward" in text]
    for part in ("forward", "teacher", "evaluation"):
        assert part in line
    run = Run(Path(document["run"]))
    for epoch in run.metrics():
        spent = sum(epoch["times"].values())
        assert set(epoch["times"]) <= {*clock.SECTIONS, "other"}
        assert spent == approx(epoch["seconds"] + epoch["eval_seconds"], rel=0.3, abs=0.1)


# ---------------------------------------------------------------------------------------------------------- measuring


def test_weights_that_are_best_and_last_are_measured_once(
    run_it: Callable[..., tuple[Run, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def counting(*given: Any, checkpoint: str = "best", **named: Any) -> dict[str, Any]:
        asked.append(checkpoint)
        return evaluate.evaluate_run(*given, checkpoint=checkpoint, **named)

    monkeypatch.setattr(summary, "evaluate_run", counting)
    _, document = run_it("data.val_fraction=0")
    assert asked == ["best"] and document["student"]["kept"] == "last"
    run, document = run_it(
        "teacher=null", "distill=null", "train.epochs=6", "optimizer.lr=0.1", "schedule.kind=constant"
    )
    result = json.loads((run / "stages/student/result.json").read_text())
    once = result["best_epoch"] == result["epochs"]
    assert asked[1:] == (["best"] if once else ["best", "last"])
    assert torch.isfinite(torch.tensor(document["student"]["last"]["test"]["top1"]))


# ------------------------------------------------------------------------------------------------------- what may fail


def test_a_checkpoint_of_before_there_were_several_processes_resumes(
    run_it: Callable[..., tuple[Run, dict[str, Any]]], experiment: Callable[..., Experiment]
) -> None:
    run, _ = run_it("teacher=null", "distill=null")
    path = run / "stages/student/checkpoints/last.pt"
    saved = checkpoint.load(path)
    (saved["random"],) = saved["random"]
    saved["progress"]["finished"] = ""
    checkpoint.save(path, saved)
    run.set_stage("student", "running")
    run.update(status="interrupted")
    resume(run, Reporter())
    assert run.info["status"] == "done"


def test_nothing_that_is_not_finite_is_saved(
    folder: Path, experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA not every step is looked at: here none is, as between two looks there."""
    monkeypatch.setattr(Step, "_check_finite", lambda *_: None)
    loaded = experiment("teacher=null", "distill=null", "optimizer={kind: sgd, lr: 1e30}", "schedule={kind: constant}")

    class Stopping(Reporter):
        def step(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
            if step == 2 < steps:
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(DivergedError, match="not finite in epoch 1"):
        train(Plan(loaded, ""), Stopping())
    (last,) = folder.glob("runs/*/*/stages/student/checkpoints/last.pt")
    weights = checkpoint.load(last)["trained"]
    assert all(bool(torch.isfinite(value).all()) for value in weights.values())


STORED = ("data.views=2", "teacher_cache={store: logits, dir: store}", "data.augment=[]")


def test_a_smoke_test_leaves_no_store(folder: Path, experiment: Callable[..., Experiment]) -> None:
    smoke(experiment(*STORED), Reporter())
    assert not (folder / "store").exists()


def test_a_smoke_test_takes_two_steps_of_each_stage(experiment: Callable[..., Experiment]) -> None:
    class Counting(Reporter):
        def step(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
            counted[stage] = counted.get(stage, 0) + 1

    counted: dict[str, int] = {}
    smoke(experiment("teacher.train.data={batch_size: 16}", "data.batch_size=64"), Counting())
    assert counted == {"teacher": 2, "student": 2}


def test_a_store_that_cannot_be_written_says_where_and_costs_no_finished_run(
    run_it: Callable[..., tuple[Run, dict[str, Any]]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "other").mkdir()
    (folder / "other/store").write_text("")
    with pytest.raises(KdctlError) as caught:
        run_it("teacher_cache={store: logits, dir: other/store/inside}")
    (problem,) = caught.value.problems
    assert "cannot be written" in problem.message and "KDCTL_CACHE" in str(problem.hint)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    run, first = run_it(*STORED)
    shutil.rmtree(folder / "store/clean")
    monkeypatch.setattr(turn, "write", full)
    again = evaluate.evaluate_run(run, load_run(run))
    assert again["teacher"] == first["teacher"]["test"]


def test_images_that_are_not_augmented_are_asked_for_once(run_it: Callable[..., tuple[Run, dict[str, Any]]]) -> None:
    _, document = run_it("train.epochs=3", "data.augment=[]", "teacher_cache={store: logits, dir: store}")
    assert document["status"] == "done"
    turns = {path.name.split(".")[1] for path in Path("store").glob("train.*")}
    assert turns == {"0"}


def test_filling_a_store_before_the_first_step_counts(
    run_it: Callable[..., tuple[Run, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else as much time without a teacher would be too little."""
    monkeypatch.setattr(cache, "fill_before", lambda *_: time.sleep(0.5))
    run, _ = run_it("train.epochs=1", "teacher_cache={store: logits, fill: before}")
    own = [line for line in run.metrics() if line["stage"] == "student"]
    trained = sum(line["seconds"] + line["eval_seconds"] for line in own)
    assert run.info["seconds"]["student"] >= trained + 0.5 and run.info["filling"].keys() == {"student"}


def test_half_precision_while_no_term_has_a_weight(
    experiment: Callable[..., Experiment], run_it: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "check_precision", lambda *_: None)  # which refuses fp16 on a CPU
    monkeypatch.setattr(device, "check_precision", lambda *_: None)
    weights = ["distill=null", "losses=[{kind: kd, weight: {0: 0, 1: 1}}]", "teacher.train.epochs=1"]
    run, _ = run_it("train.precision=fp16", "train.layout=contiguous", *weights)
    assert [line["loss"] > 0 for line in run.metrics() if line["stage"] == "student"] == [True, True]
