"""The training loop of one stage: runs any method, stops at any moment, and continues as if it had not."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdctl import checkpoint, ranks, sharding
from kdctl.build import Built, seed_everything
from kdctl.clock import Clock
from kdctl.config.schema import TrainStage
from kdctl.evaluate import validate
from kdctl.optim.ema import EMA
from kdctl.runs import Run
from kdctl.signals import Batch
from kdctl.step import Step, Sums, diverged
from kdctl.watch import Epoch, Reading, Reporter, StopSignal

_PAUSE_S = {"cuda": 1.0, "mps": 1.0}
"""Least seconds between two readings of what the device has summed: each waits for it."""


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
    parts: int = 1
    """Micro-batches a step."""
    finished: str = ""
    """Why the stage ended, empty while it has not."""
    times: dict[str, float] = field(default_factory=dict)
    """Seconds of this stage by what they were spent on (clock.SECTIONS)."""
    loss: Tensor | float = 0.0
    """This process's share of the weighted loss over the steps of this epoch; below, each term's sum and count."""
    sums: dict[str, Tensor | float] = field(default_factory=dict)
    counts: dict[str, Tensor | float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    """Each term's part of the gradient, when it was last measured; below, what balancing multiplies each term by."""
    factors: dict[str, float] = field(default_factory=dict)

    def add(self, step: Sums) -> None:
        """Counts one more step; waits for no device."""
        self.loss = self.loss + step.loss
        for name, value in step.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        for name, count in step.counts.items():
            self.counts[name] = self.counts.get(name, 0.0) + count


@dataclass
class Loop:
    """What the loop of one stage works with."""

    built: Built
    stage: TrainStage
    run: Run
    budget: float
    eval_batch_size: int
    stop: StopSignal
    reporter: Reporter
    clock: Clock
    step: Step
    ema: EMA | None
    state: Progress

    @property
    def folder(self) -> Path:
        return self.run.stage_dir(self.stage.name) / "checkpoints"

    def spent(self) -> bool:
        """Whether the time budget is."""
        return self.state.seconds + self.state.epoch_seconds >= self.budget


def fit(
    built: Built, stage: TrainStage, run: Run, *, seed: int, eval_batch_size: int, budget: float,
    stop: StopSignal, reporter: Reporter,
) -> Progress:  # fmt: skip
    """Trains one stage to its end, or from its last checkpoint to its end.

    budget is the number of seconds that the stage may take in all. With several processes each calls this; the first
    one writes. Raises DivergedError before anything with a non-finite loss is saved, Interrupted after saving on
    SIGINT or SIGTERM, OutOfMemoryError when a step does not fit.
    """
    clock = Clock(built.device)
    built.method.clock = clock
    rank = ranks.current().rank
    seed_everything(seed, stage.name, "train", *([f"rank {rank}"] if rank else []))
    started = ranks.current().told((run.stage_dir(stage.name) / "checkpoints" / "last.pt").exists())
    if not started:
        built.method.start(built.loader)
    state = Progress(metrics_bytes=run.metrics_size(), parts=stage.accumulate)
    step = Step(built, stage, clock, reporter, state.parts)
    ema = EMA(built.method.student.net, stage.ema) if stage.ema else None
    loop = Loop(built, stage, run, budget, eval_batch_size, stop, reporter, clock, step, ema, state)
    if started:
        _restore(loop)
    else:
        _save(loop)

    while not loop.state.finished:
        stopped = _train_epoch(loop)
        if loop.state.step == len(built.loader) or not stopped:
            _end_epoch(loop)
        _save(loop)
        if stopped:  # perhaps by a signal that only another process got
            stop.number = stop.number or signal.SIGTERM
            stop.check(f"in epoch {loop.state.epoch + 1} of stage {stage.name}; `kdctl resume {run}` continues")
    return loop.state


def _train_epoch(loop: Loop) -> bool:
    """The rest of one epoch, step by step; returns early when the time budget is spent, or a stop was asked for: then
    what it returns is true, in every process."""
    built, stage, state, stop = loop.built, loop.stage, loop.state, loop.stop
    steps, everyone = len(built.loader), ranks.current()
    if state.step == 0:
        built.method.begin_epoch(state.epoch)
    built.method.train()
    pause = _PAUSE_S.get(built.device.type, 0.0)
    loop.reporter.begin(Epoch(stage.name, state.epoch, stage.epochs, steps, lambda: _reading(loop), pause))
    began, before = time.monotonic(), state.epoch_seconds
    for batch in _timed(built.loader.epoch(state.epoch, start_step=state.step), loop.clock):
        done = state.epoch * steps + state.step
        factor = built.schedule(done, stage.epochs * steps, steps)
        for group in built.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        state.add(loop.step(batch, done / steps))
        state.parts, state.shares, state.factors = loop.step.parts, loop.step.shares, loop.step.factors
        if loop.ema is not None:
            with loop.clock.section("optimizer"):
                loop.ema.update(built.method.student.net)
        state.step += 1
        state.samples += batch.size
        state.epoch_seconds = before + time.monotonic() - began
        loop.reporter.step(stage.name, state.epoch, stage.epochs, state.step, steps)
        with loop.clock.section("exchange"):
            stopped = everyone.any(stop.number is not None)
        if stopped:
            return True
        if math.isfinite(loop.budget) and everyone.any(loop.spent()):
            break
    if built.device.type == "cuda":  # the last steps are only begun
        torch.cuda.synchronize(built.device)
        state.epoch_seconds = before + time.monotonic() - began
    return False


def _reading(loop: Loop) -> Reading:
    """Where the epoch stands, by this process's steps; waits for the device."""
    state, processes = loop.state, ranks.current().size
    counts = {name: max(float(count), 1.0) for name, count in state.counts.items()}
    terms = {name: processes * float(value) / counts[name] for name, value in state.sums.items()}
    return Reading(
        loss=processes * float(state.loss) / max(state.step, 1),
        terms=terms,
        lr=loop.built.optimizer.param_groups[0]["lr"],
        samples_per_second=processes * state.samples / max(state.epoch_seconds, 1e-9),
    )


def _timed(batches: Iterable[Batch], clock: Clock) -> Iterator[Batch]:
    """The same batches; waiting for one counts as `data`."""
    waiting = iter(batches)
    while True:
        with clock.section("data"):
            batch = next(waiting, None)
        if batch is None:
            return
        yield batch


def _end_epoch(loop: Loop) -> None:
    """Validates, keeps the best weights, writes the epoch's line of metrics.jsonl, and says whether the stage ends."""
    built, state, stage = loop.built, loop.state, loop.stage
    began = time.monotonic()
    loss, samples, sums = _totals(state)
    _check_finite(state, loss, sums)
    val: dict[str, float] = {}
    if built.data.val is not None:
        with loop.clock.section("evaluation"), _averaged(loop):
            ranks.current().agree(built.method.student.net.buffers())
            size, precision = loop.eval_batch_size, built.precision
            val = validate(built.method.student, built.data.val, built.task, built.device, size, precision)
    state.epoch += 1
    value = built.task.score(val) if val else math.nan
    best = value > state.best_value and built.method.ready()
    if best:
        state.best_epoch, state.best_value = state.epoch, value
        with _averaged(loop):
            weights = sharding.gathered(built.method.student.net.state_dict())
            _write(loop, "best.pt", {"student": weights, "epoch": state.epoch})
    times = loop.clock.take()
    state.times = {name: state.times.get(name, 0.0) + times.get(name, 0.0) for name in {**state.times, **times}}
    line = {
        "stage": stage.name,
        "epoch": state.epoch,
        "lr": built.optimizer.param_groups[0]["lr"],
        "loss": loss / max(state.step, 1),
        "terms": {name: value / max(float(state.counts[name]), 1.0) for name, value in sums.items()},
        "gradient_shares": {name: round(share, 6) for name, share in state.shares.items()},
        "val": val,
        "best": best,
        "seconds": round(state.epoch_seconds, 4),
        "eval_seconds": round(time.monotonic() - began, 4),
        "samples_per_second": round(samples / max(state.epoch_seconds, 1e-9), 2),
        "times": {name: round(seconds, 4) for name, seconds in times.items()},
    }
    if ranks.current().first:
        state.metrics_bytes = loop.run.append_metrics(line)
    state.seconds += state.epoch_seconds + time.monotonic() - began
    state.step, state.samples, state.epoch_seconds = 0, 0, 0.0
    state.loss, state.sums, state.counts = 0.0, {}, {}
    state.finished = _why_finished(loop)
    loop.reporter.epoch(line, stage.epochs)


def _totals(state: Progress) -> tuple[float, int, dict[str, float]]:
    """The loss, the samples and each term's sum of this epoch until now, over all processes."""
    own = [float(value) for value in (state.loss, state.samples, *state.sums.values())]
    loss, samples, *sums = ranks.current().total(torch.tensor(own, dtype=torch.float64)).tolist()
    return loss, int(samples), dict(zip(state.sums, sums, strict=True))


def _check_finite(state: Progress, loss: float, sums: dict[str, float]) -> None:
    """Raises DivergedError before anything is saved: on CUDA not every step is looked at."""
    if not math.isfinite(loss):
        raise diverged([n for n, v in sums.items() if not math.isfinite(v)] or list(sums), f"epoch {state.epoch + 1}")


class _averaged:
    """Puts the averaged weights into the student for a while; nothing without EMA."""

    def __init__(self, loop: Loop) -> None:
        self.ema, self.method = loop.ema, loop.built.method
        self.net = self.method.student.net

    def __enter__(self) -> None:
        if self.ema is not None:
            self.ema.swap(self.net)
            self.method.averaged()

    def __exit__(self, *exception: object) -> None:
        if self.ema is not None:
            self.ema.swap(self.net)


def _why_finished(loop: Loop) -> str:
    state, stage = loop.state, loop.stage
    if state.epoch >= stage.epochs:
        return "all epochs done"
    waited = stage.early_stop is not None and state.epoch - state.best_epoch >= stage.early_stop
    if waited and loop.built.method.ready():
        return f"early stop: no better validation since epoch {state.best_epoch}"
    if ranks.current().any(loop.spent()):
        return "time budget spent"
    return ""


# -------------------------------------------------------------------------------------------------------- checkpoints


def _save(loop: Loop) -> None:
    built = loop.built
    if built.teacher is not None:
        built.teacher.flush()
    loss, samples, sums = _totals(loop.state)
    _check_finite(loop.state, loss, sums)
    random = ranks.current().collected(checkpoint.random_state(built.device))
    state: dict[str, Any] = {
        "trained": sharding.gathered(built.method.trained.state_dict()),
        "optimizer": sharding.gathered_optimizer(built.optimizer),
        "ema": sharding.gathered(loop.ema.state_dict()) if loop.ema else None,
        "scaler": loop.step.scaler.state_dict(),
        "method": built.method.state_dict(),
        "random": random,
        "progress": asdict(loop.state) | {"loss": loss, "samples": samples, "sums": sums},
    }
    _write(loop, "last.pt", state)


def _write(loop: Loop, name: str, state: dict[str, Any]) -> None:
    """Writes a checkpoint; of several processes the first one does."""
    if ranks.current().first:
        checkpoint.save(loop.folder / name, state)


def _restore(loop: Loop) -> None:
    built, rank = loop.built, ranks.current().rank
    sharded = sharding.is_sharded(built.method.trained)
    saved = checkpoint.load(loop.folder / "last.pt", "cpu" if sharded else built.device)
    built.method.trained.load_state_dict(sharding.scattered(saved["trained"], built.method.trained.state_dict()))
    built.optimizer.load_state_dict(sharding.scattered_optimizer(saved["optimizer"], built.optimizer))
    if loop.ema is not None:
        loop.ema.load_state_dict(sharding.scattered(saved["ema"], loop.ema.state_dict()))
    loop.step.scaler.load_state_dict(saved["scaler"])
    random = saved["random"] if isinstance(saved["random"], list) else [saved["random"]]  # of before there were ranks
    if rank < len(random):
        checkpoint.restore_random_state(random[rank], built.device)
    loop.state = Progress(**saved["progress"])
    built.method.load_state_dict(saved.get("method", {}))
    state = loop.state
    loop.step.resume(state.epoch * len(built.loader) + state.step, state.parts, state.shares, state.factors)
    if rank == 0:
        loop.run.cut_metrics(loop.state.metrics_bytes)
    else:  # what was summed before the stop is the first process's to tell
        loop.state.loss, loop.state.sums, loop.state.samples = 0.0, {}, 0
