"""The training loop of one stage: runs any method, stops at any moment, and continues as if it had not."""

from __future__ import annotations

import math
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from kdctl import checkpoint
from kdctl.build import Built, seed_everything
from kdctl.config.schema import TrainStage
from kdctl.device import autocast
from kdctl.errors import DivergedError, Interrupted, OutOfMemoryError, Problem
from kdctl.evaluate import validate
from kdctl.optim.ema import EMA
from kdctl.runs import Run
from kdctl.signals import Batch


class Reporter:
    """What a run tells while it works; this one is silent. The command line shows progress with its own."""

    def say(self, text: str) -> None:
        """A line for the reader."""

    def step(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
        """One optimizer step is done."""

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        """One epoch is done; `line` is what metrics.jsonl got."""


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a flag that the loop reads; the second one stops at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._catch)
        return self

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number

    def check(self, where: str) -> None:
        """Raises Interrupted when a stop was asked for."""
        if self.number is not None:
            raise Interrupted(self.number, f"stopped {where}")

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@dataclass
class Progress:
    """All loop state beside weights and optimizer; it goes into every checkpoint."""

    epoch: int = 0
    step: int = 0
    """Steps done in this epoch."""
    best_epoch: int = 0
    best_value: float = -math.inf
    seconds: float = 0.0
    samples: int = 0
    """Samples seen in this epoch."""
    epoch_seconds: float = 0.0
    metrics_bytes: int = 0
    finished: str = ""
    """Why the stage ended, empty while it has not."""
    loss: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    """The weighted loss, summed over the steps of this epoch; below, each term's sum and count."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)


def fit(
    built: Built, stage: TrainStage, run: Run, *, seed: int, eval_batch_size: int, budget: float,
    stop: StopSignal, reporter: Reporter,
) -> Progress:  # fmt: skip
    """Trains one stage to its end, or from its last checkpoint to its end.

    budget is the number of seconds that the stage may take in all.
    Raises DivergedError before an update with a non-finite loss, Interrupted after saving on SIGINT or SIGTERM,
    OutOfMemoryError when a step does not fit.
    """
    folder = run.stage_dir(stage.name) / "checkpoints"
    ema = EMA(built.method.student.net, stage.ema) if stage.ema else None
    scaler = torch.amp.GradScaler(built.device.type, enabled=built.precision == "fp16")
    seed_everything(seed, stage.name, "train")
    state = Progress(metrics_bytes=run.metrics_size())
    if (folder / "last.pt").exists():
        state = _restore(folder / "last.pt", built, ema, scaler, run)
    else:
        _save(folder / "last.pt", built, ema, scaler, state)

    while not state.finished:
        _train_epoch(built, stage, state, ema, scaler, budget, stop, reporter)
        if state.step == len(built.loader) or _spent(state, budget):
            _end_epoch(built, stage, state, ema, folder, run, eval_batch_size, reporter)
            state.finished = _why_finished(stage, state, budget)
        _save(folder / "last.pt", built, ema, scaler, state)
        stop.check(f"in epoch {state.epoch + 1} of stage {stage.name}; `kdctl resume {run}` continues")
    return state


def _train_epoch(
    built: Built, stage: TrainStage, state: Progress, ema: EMA | None, scaler: torch.amp.GradScaler,
    budget: float, stop: StopSignal, reporter: Reporter,
) -> None:  # fmt: skip
    """The rest of one epoch, step by step; returns early when a stop is asked for or the time budget is spent."""
    steps = len(built.loader)
    total = stage.epochs * steps
    built.method.train()
    began = time.monotonic()
    before = state.epoch_seconds
    for batch in built.loader.epoch(state.epoch, start_step=state.step):
        done = state.epoch * steps + state.step
        factor = built.schedule(done, total, steps)
        for group in built.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        try:
            _step(built, stage, batch, done / steps, state, scaler)
        except torch.OutOfMemoryError:
            hint = f"train.accumulate={2 * stage.accumulate} halves the memory and keeps the loss"
            raise OutOfMemoryError("a training step does not fit into memory", hint=hint) from None
        if ema is not None:
            ema.update(built.method.student.net)
        state.step += 1
        state.samples += batch.size
        state.epoch_seconds = before + time.monotonic() - began
        reporter.step(stage.name, state.epoch, stage.epochs, state.step, steps)
        if stop.number is not None or _spent(state, budget):
            return


def _spent(state: Progress, budget: float) -> bool:
    return state.seconds + state.epoch_seconds >= budget


def _step(
    built: Built, stage: TrainStage, batch: Batch, epoch: float, state: Progress, scaler: torch.amp.GradScaler
) -> None:
    """One update: every term's sum divided by its count over the whole batch, whatever the micro-batches."""
    method = built.method
    counts = method.counts(batch)
    weights = method.weights(epoch)
    for micro in batch.split(stage.accumulate):
        with autocast(built.device, built.precision):
            sums = method.step(micro, epoch)
        if not sums:  # every weight is zero at this moment
            continue
        loss = torch.stack([weights[name] * value / _at_least_one(counts[name]) for name, value in sums.items()]).sum()
        if not torch.isfinite(loss):
            raise DivergedError(Problem(_name_the_term(sums, state), key="losses"))
        scaler.scale(loss).backward()
        state.loss += loss.detach().cpu().double()
        for name, value in sums.items():
            state.sums[name] = state.sums.get(name, torch.zeros((), device=loss.device)) + value.detach().float()
    for name in sums:
        state.counts[name] = state.counts.get(name, torch.zeros(())) + counts[name]
    if stage.clip_norm is not None:
        scaler.unscale_(built.optimizer)
        torch.nn.utils.clip_grad_norm_(method.parameters(), stage.clip_norm)
    scaler.step(built.optimizer)
    scaler.update()
    built.optimizer.zero_grad(set_to_none=True)


def _at_least_one(count: int | Tensor) -> int | Tensor:
    return count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1)


def _name_the_term(sums: dict[str, Tensor], state: Progress) -> str:
    bad = [name for name, value in sums.items() if not torch.isfinite(value)] or list(sums)
    return (
        f"the loss is not finite in epoch {state.epoch + 1}, step {state.step + 1}: {', '.join(bad)}; "
        "stopped before the update. Try a lower optimizer.lr, schedule.warmup_epochs or train.clip_norm"
    )


def _end_epoch(
    built: Built, stage: TrainStage, state: Progress, ema: EMA | None, folder: Path, run: Run,
    eval_batch_size: int, reporter: Reporter,
) -> None:  # fmt: skip
    """Validates, keeps the best weights, and writes the epoch's line of metrics.jsonl."""
    began = time.monotonic()
    student = built.method.student
    val: dict[str, float] = {}
    if built.data.val is not None:
        with _averaged(ema, built):
            val = validate(student, built.data.val, built.task, built.device, eval_batch_size, built.precision)
    state.epoch += 1
    value = val.get(built.task.primary, math.nan)
    best = value > state.best_value
    if best:
        state.best_epoch, state.best_value = state.epoch, value
        with _averaged(ema, built):
            checkpoint.save(folder / "best.pt", {"student": student.net.state_dict(), "epoch": state.epoch})
    terms = {name: float(state.sums[name]) / max(float(state.counts[name]), 1.0) for name in state.sums}
    line = {
        "stage": stage.name,
        "epoch": state.epoch,
        "lr": built.optimizer.param_groups[0]["lr"],
        "loss": float(state.loss) / max(state.step, 1),
        "terms": terms,
        "val": val,
        "best": best,
        "seconds": round(state.epoch_seconds, 4),
        "eval_seconds": round(time.monotonic() - began, 4),
        "samples_per_second": round(state.samples / max(state.epoch_seconds, 1e-9), 2),
    }
    state.metrics_bytes = run.append_metrics(line)
    state.seconds += state.epoch_seconds + time.monotonic() - began
    state.step, state.samples, state.epoch_seconds = 0, 0, 0.0
    state.loss, state.sums, state.counts = torch.zeros((), dtype=torch.float64), {}, {}
    reporter.epoch(line, stage.epochs)


class _averaged:
    """Puts the averaged weights into the student for a while; nothing without EMA."""

    def __init__(self, ema: EMA | None, built: Built) -> None:
        self.ema, self.net = ema, built.method.student.net

    def __enter__(self) -> None:
        if self.ema is not None:
            self.ema.swap(self.net)

    def __exit__(self, *exception: object) -> None:
        if self.ema is not None:
            self.ema.swap(self.net)


def _why_finished(stage: TrainStage, state: Progress, budget: float) -> str:
    if state.epoch >= stage.epochs:
        return "all epochs done"
    if stage.early_stop is not None and state.epoch - state.best_epoch >= stage.early_stop:
        return f"early stop: no better validation since epoch {state.best_epoch}"
    if _spent(state, budget):
        return "time budget spent"
    return ""


# -------------------------------------------------------------------------------------------------------- checkpoints


def _save(path: Path, built: Built, ema: EMA | None, scaler: torch.amp.GradScaler, state: Progress) -> None:
    checkpoint.save(
        path,
        {
            "trained": built.method.trained.state_dict(),
            "optimizer": built.optimizer.state_dict(),
            "ema": ema.state_dict() if ema else None,
            "scaler": scaler.state_dict(),
            "random": checkpoint.random_state(built.device),
            "progress": asdict(state),
        },
    )


def _restore(path: Path, built: Built, ema: EMA | None, scaler: torch.amp.GradScaler, run: Run) -> Progress:
    saved = checkpoint.load(path, built.device)
    built.method.trained.load_state_dict(saved["trained"])
    built.optimizer.load_state_dict(saved["optimizer"])
    if ema is not None:
        ema.load_state_dict(saved["ema"])
    scaler.load_state_dict(saved["scaler"])
    checkpoint.restore_random_state(saved["random"], built.device)
    state = Progress(**saved["progress"])
    run.cut_metrics(state.metrics_bytes)
    return state
