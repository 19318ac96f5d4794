"""The choice of precision, layout, threads and compilation, by a short measurement of real training steps.

What is found is kept in `probe.json` of the cache, by machine and by everything that the speed depends on: all runs of
a sweep measure once, and agree.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch

from kdctl import __version__, ranks, registry, runs, sharding
from kdctl.config.schema import Experiment, LossSpec, ModelSpec, RunSettings, TrainStage
from kdctl.data.augment import Augment
from kdctl.data.loader import num_workers
from kdctl.data.prepare import Data
from kdctl.device import (
    check_precision,
    choose_device,
    has_fast_bf16,
    processor,
    restored,
    settle_by_rule,
    usable_cores,
    wished_threads,
)
from kdctl.errors import KdctlError
from kdctl.losses.base import Loss
from kdctl.probe.race import Choice, Clock, Measure, Options, fastest
from kdctl.probe.trial import Trial
from kdctl.teachers.key import class_code

_FORMAT = 1
_FILE = "probe.json"
_KEPT = 200
"""How many choices the file remembers."""
_BUSY_LOAD = 0.75
_BUSY_LASTS_S = 86_400
"""What was measured while others used more than this share of the cores is believed for a day."""
_LONG_STEPS = 2000
"""A run of fewer steps than this never earns back the time of compiling."""
_MANY_CORES = 4


def settle(
    experiment: Experiment,
    data: Data,
    say: Callable[[str], None],
    measure: Measure | None = None,
    clock: Clock = time.perf_counter,
) -> RunSettings:
    """The run's settings with every `auto` replaced: what the user set is kept, the rest is what is fastest.

    Steps of the student's stage are timed at its batch size and image shape, with the teacher's forward pass where the
    teacher is asked at every step. fp16 is never chosen. Where nothing can be measured, rules of thumb hold, and `say`
    gets the reason. measure, clock: what times a choice, in place of real steps.
    Raises what `choose_device` raises, and KdctlError where a model cannot be built for these data.
    """
    settings = experiment.train
    device = choose_device(settings.device)
    check_precision(settings.precision, device)
    rule = settle_by_rule(settings)
    task = _Task(experiment, data, device)
    options = task.options(settings)
    if options.count == 1:
        return _settled(settings, device, options.first)
    key = task.key(settings)
    remembered = _recall(key, options)
    if remembered is not None:
        choice, line = remembered
        say(f"probe: {line} (remembered)")
        return _settled(settings, device, choice)
    busy = _is_busy()
    try:
        with restored(device):
            choice, line = fastest(options, measure or task.trial(), clock, task.samples())
    except KdctlError:
        raise
    except Exception as error:  # whatever a model of the user's does: training will say it better
        first = Choice(str(rule.precision), str(rule.layout), max(options.threads), rule.compile is True)
        say(f"probe: {first}, by rule, for nothing could be measured: {_first_line(error)}")
        return _settled(settings, device, first)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what is free decides whether the data can stay on the device
    _remember(key, choice, line, busy)
    say(f"probe: {line}{'; the machine is busy' if busy else ''}")
    return _settled(settings, device, choice)


def _settled(settings: RunSettings, device: torch.device, choice: Choice) -> RunSettings:
    return settings.model_copy(update={"device": str(device), **asdict(choice)})


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


# ----------------------------------------------------------------------------------------------------------- what runs


class _Task:
    """The steps that training will take: of which models, on how many samples of which shape."""

    def __init__(self, experiment: Experiment, data: Data, device: torch.device) -> None:
        self.experiment, self.data, self.device = experiment, data, device
        self.stage = experiment.student_stage
        spec, changed = experiment.data, self.stage.data
        steps = changed.augment if changed.augment is not None else spec.augment
        chain = Augment([registry.create("augment", s.kind, s.arguments) for s in steps])
        self.shape = tuple(chain.output_shape(data.input_shape))
        self.batch_size = changed.batch_size or spec.batch_size
        self.rows = math.ceil(self.batch_size / self.stage.accumulate / ranks.current().size)
        self.student = _student_of(experiment, self.stage)
        self.wanted = [t for t in self.stage.losses if _weighs(t) and _loss_class(t).needs_teacher]
        self.teachers = [_source(experiment, t) for t in self.stage.teachers] if self._asks_teacher() else []

    def _asks_teacher(self) -> bool:
        """Whether a step runs the teacher: some term needs of it what no store holds."""
        if not self.wanted or self.experiment.teacher_cache is None:
            return bool(self.wanted)
        store = self.experiment.teacher_cache.store
        features = any(term.taps for term in self.wanted) and store == "logits"
        return features or (any(_loss_class(t).needs_logits for t in self.wanted) and store == "features")

    def options(self, settings: RunSettings) -> Options:
        """What of each setting is worth measuring: what the user set, or what this machine may be fast with."""
        on_mps = self.device.type == "mps"
        precisions = ["fp32", "bf16"] if has_fast_bf16(self.device) else ["fp32"]
        sharded = sharding.wanted(settings)
        layouts = ["contiguous"] if on_mps or sharded else ["contiguous", "channels_last"]
        may_compile = self.device.type == "cuda" and not sharded and self._steps() > _LONG_STEPS
        compiled = [False, True] if may_compile and not any(t.taps for t in self.stage.losses) else [False]
        return Options(
            precisions if settings.precision == "auto" else [settings.precision],
            layouts if settings.layout == "auto" else [settings.layout],
            self._threads() if settings.threads == "auto" else [settings.threads],
            compiled if settings.compile == "auto" else [settings.compile],
        )

    def _threads(self) -> list[int]:
        """One, half of and all cores that decoding leaves; what the environment asks for where it does."""
        wish = wished_threads()
        if wish is not None:
            return [wish]
        cores = max(1, usable_cores() // ranks.current().local_size)
        if self.device.type != "cpu":
            return [cores]
        cores -= num_workers(self.experiment.data.workers, self.data.train) if cores > 1 else 0
        cores = max(1, cores)
        return sorted({1, cores, *([cores // 2] if cores >= _MANY_CORES else [])})

    def samples(self) -> int:
        """How many the stage trains on, over all epochs."""
        return self.stage.epochs * len(self.data.for_stage(self.stage.data).train)

    def _steps(self) -> int:
        return math.ceil(self.samples() / self.batch_size)

    def key(self, settings: RunSettings) -> dict[str, Any]:
        """All that the result depends on, as plain values."""
        given = {n: getattr(settings, n) for n in ("precision", "layout", "threads", "compile")}
        return {
            "kdctl": __version__,
            "torch": torch.__version__,
            "device": [str(self.device), processor(self.device)],
            "threads": self._threads(),
            "processes": ranks.current().size,
            "student": _described(self.student),
            "frozen": self.stage.frozen,
            "teachers": [_described(spec) for spec in self.teachers],
            "classes": len(self.data.class_names),
            "rows": self.rows,
            "shape": [*self.data.input_shape, *self.shape],
            "optimizer": [self.stage.optimizer.kind, self.stage.optimizer.arguments],
            "long": self.device.type == "cuda" and self._steps() > _LONG_STEPS,
            "taps": sorted({str(tap) for term in self.stage.losses for tap in term.taps}),
            "given": given,
        }

    def trial(self) -> Trial:
        """Real steps of these models, built without their weights."""
        return Trial(
            self.experiment, self.stage, self.data, _bare(self.student), [_bare(t) for t in self.teachers],
            self.device, self.rows, self.shape,
        )  # fmt: skip


def _loss_class(term: LossSpec) -> type[Loss]:
    return cast("type[Loss]", registry.load(registry.find("losses", term.kind)))


def _weighs(term: LossSpec) -> bool:
    """Whether the term has weight at any time."""
    return any(term.weight.values()) if isinstance(term.weight, dict) else term.weight != 0


def _student_of(experiment: Experiment, stage: TrainStage) -> ModelSpec:
    """The model that a stage trains: that of the stage whose weights it starts from, where it starts from any."""
    earlier = {s.name: s for s in experiment.train_stages[: experiment.train_stages.index(stage)]}
    if stage.start in earlier:
        return _student_of(experiment, earlier[stage.start])
    return _source(experiment, stage.student or experiment.student)


def _source(experiment: Experiment, spec: ModelSpec) -> ModelSpec:
    """The spec, or that of the stage that makes the model."""
    made_by = next((s for s in experiment.train_stages if s.name == spec.stage), None)
    return spec if made_by is None else _student_of(experiment, made_by)


def _bare(spec: ModelSpec) -> ModelSpec:
    """The model without its weights; weights with a record are what say how the model is built, so they stay."""
    recorded = spec.weights is not None and runs.holds_model(spec.weights)
    return (
        spec if recorded else spec.model_copy(update={"weights": None, "stage": None, "mapping": {}, "inherit": None})
    )


def _described(spec: ModelSpec) -> dict[str, Any]:
    """What of a model its speed depends on."""
    model: dict[str, Any] = {"kind": class_code("models", spec.kind), "arguments": spec.arguments}
    if spec.weights is not None and runs.holds_model(spec.weights):
        path = Path(spec.weights)
        with suppress(KdctlError):  # building the model says what is wrong with it
            record = runs.read_json((path / "student" if path.is_dir() else path).with_suffix(".json"))
            model["record"] = {name: record.get(name) for name in ("arguments", "input_size", "input_shape")}
    return model | {"input_size": spec.input_size, "normalize": spec.normalize != "none"}


# ---------------------------------------------------------------------------------------------------------- remembering


def _hash(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()


def _read() -> dict[str, Any]:
    """All remembered choices by the hash of their key; none where the file is damaged or not there."""
    with suppress(KdctlError, OSError):
        document = runs.read_json(runs.cache_home() / _FILE)
        if isinstance(document, dict) and document.get("format") == _FORMAT:
            choices = document.get("choices")
            return choices if isinstance(choices, dict) else {}
    return {}


def _recall(key: dict[str, Any], options: Options) -> tuple[Choice, str] | None:
    """The choice that was found for this key, if it is one of those allowed."""
    with suppress(TypeError, KeyError):
        entry = _read()[_hash(key)]
        choice = Choice(**entry["choice"])
        believed = not entry["busy"] or 0 <= time.time() - entry["made"] < _BUSY_LASTS_S
        if believed and options.allow(choice):
            return choice, str(entry["line"])
    return None


def _is_busy() -> bool:
    """Whether others have used this machine in the last minute."""
    try:
        return os.getloadavg()[0] > _BUSY_LOAD * usable_cores()
    except (OSError, AttributeError):  # not on every system
        return False


def _remember(key: dict[str, Any], choice: Choice, line: str, busy: bool) -> None:
    known = _read()
    known[_hash(key)] = {
        "choice": asdict(choice), "line": line, "busy": busy, "made": int(time.time()), "key": key
    }  # fmt: skip
    kept = dict(list(known.items())[-_KEPT:])
    with suppress(OSError):  # a cache that cannot be written costs a measurement a run
        runs.write_json(runs.cache_home() / _FILE, {"format": _FORMAT, "choices": kept})
