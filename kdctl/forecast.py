"""What training will do, before it does it: shapes, terms, memory, stores and time of every stage (`check --deep`).

Every stage is built as training builds it and takes a few real steps on throw-away models; nothing is written.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdctl import build, cache
from kdctl.bench import cost
from kdctl.build import Built
from kdctl.clock import Clock
from kdctl.config.schema import Experiment, ModelSpec, TrainStage
from kdctl.data.prepare import Data
from kdctl.device import apply_settings, choose_device, restored, settle_by_rule
from kdctl.errors import DivergedError
from kdctl.evaluate import validate
from kdctl.methods.base import Term
from kdctl.models.record import Model
from kdctl.signals import Batch
from kdctl.step import Step
from kdctl.taps import Taps
from kdctl.watch import Reporter

_TIMED_STEPS, _LONGEST_S = 8, 3.0
_SHOWN_SAMPLES = 2
_FEW, _NEARLY_ALL = 0.01, 0.99
"""Parts of the gradient with which a term hardly counts, or nothing but it does."""
_SETTLED = "precision, layout and threads are a rule's here: where they are `auto`, training measures which are fastest"


def forecast(experiment: Experiment, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """The document `deep` of a plan: each training stage in order, and their total.

    A teacher or a start that an earlier stage would make is built with fresh weights, as notes say. Raises what
    training would raise before its first step: ConfigError (a term without gradient, shapes that cannot match),
    MissingError (data, weights), OutOfMemoryError.
    """
    settings = settle_by_rule(experiment.train)
    device = choose_device(settings.device)
    with restored(device):
        apply_settings(settings)
        data = build.build_data(experiment)
        made: dict[str, ModelSpec] = {}
        drafts = [_Draft.of(stage, experiment, made) for stage in experiment.train_stages]
        by_name = {draft.stage.name: draft.stage for draft in drafts}
        stages: list[Any] = [by_name.get(stage.name, stage) for stage in experiment.stages]
        whole = experiment.model_copy(update={"train": settings, "stages": stages})
        stores = [] if whole.teacher_cache is None else cache.show(whole, data)["stores"]
        documents, filled = [], dict[str, str]()
        for draft in drafts:
            say(f"stage {draft.stage.name}: building it, and timing a few steps ...")
            store = _store([s for s in stores if s["stage"] == draft.stage.name], draft, filled)
            documents.append(_stage(whole, draft, data, store))
    return {
        "device": str(device),
        "precision": settings.precision,
        "threads": settings.threads,
        "stages": documents,
        "total": {
            "seconds": round(sum(d["time"]["seconds"] for d in documents if d["time"]), 1),
            "peak_bytes": max((d["memory"]["peak"] for d in documents if d["memory"]), default=0),
            "store_bytes": sum(d["store"]["bytes"] for d in documents if d["store"] and not d["store"]["shared_with"]),
        },
        "notes": [_SETTLED, "the time is that of training: the final measurements and artefacts come on top of it"],
    }


@dataclass
class _Draft:
    """A stage that can be built alone, and what is not as it will be."""

    stage: TrainStage
    taught_by: str
    """The teachers as the experiment names them."""
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, stage: TrainStage, experiment: Experiment, made: dict[str, ModelSpec]) -> _Draft:
        """made: the student of each earlier stage, to which this one's is added."""
        notes = []
        spec = stage.student or experiment.student
        if stage.start != "fresh" and stage.start in made:
            spec = made[stage.start]
            notes.append(f"the student starts from stage {stage.start}: here with fresh weights")
        elif stage.role == "compressed":
            notes.append(f"the student is what {stage.start} makes: here it is as it was before, with fresh weights")
        student = _fresh(spec, made)
        if stage.start in made:  # it inherits in the stage that it starts from
            student = student.model_copy(update={"inherit": None})
        teachers = [_fresh(given, made) for given in stage.teachers]
        for given in stage.teachers:
            if given.stage in made:
                notes.append(f"the teacher {given.kind} is trained by stage {given.stage}: here with fresh weights")
        teacher = teachers if isinstance(stage.teacher, list) else next(iter(teachers), None)
        made[stage.name] = student
        alone = stage.model_copy(update={"student": student, "teacher": teacher, "start": "fresh"})
        return cls(alone, str(stage.teachers), notes)


def _fresh(spec: ModelSpec, made: dict[str, ModelSpec]) -> Any:
    """The model with fresh weights where an earlier stage makes it. Weights that tell how the model is built stay."""
    source = made.get(spec.stage or "")
    if source is None:
        return spec
    update = {"kind": source.kind, "stage": None, "weights": source.weights, "mapping": source.mapping}
    return spec.model_copy(update={**update, **source.arguments})


# ------------------------------------------------------------------------------------------------------------ one stage


def _stage(experiment: Experiment, draft: _Draft, data: Data, store: dict[str, Any] | None) -> dict[str, Any]:
    stage = draft.stage
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        alone = experiment.model_copy(update={"teacher_cache": None})  # a step would write into the store
        built = build.build_stage(alone, stage, data, Path)
    draft.notes += [built.inherited] if built.inherited else []
    found = [str(w.message) for w in caught if issubclass(w.category, UserWarning) and "gradient" in str(w.message)]
    few = built.loader.few(_SHOWN_SAMPLES)
    student, terms = built.method.student, built.method.terms
    document: dict[str, Any] = {
        "name": stage.name,
        "epochs": stage.epochs,
        "steps": len(built.loader),
        "samples": len(built.data.train),
        "batch_size": stage.data.batch_size or experiment.data.batch_size,
        "input_shape": list(few.inputs.shape[1:]),
        "student": _model(student, [own for term in terms for own, _ in term.loss.taps], built, few),
        "teachers": [
            _model(model, build.teacher_taps(stage, number), built, few) for number, model in enumerate(built.teachers)
        ],
        "store": store,
        "terms": [],
        "memory": None,
        "time": None,
    }
    if stage.epochs:
        trial = _Trial(built, stage, draft.notes)
        document["terms"] = trial.terms()
        document["memory"] = trial.memory
        document["time"] = _time(experiment, built, stage, trial, store)
        found += trial.warnings + _unbalanced(document["terms"], stage)
    return document | {"warnings": list(dict.fromkeys(found)), "notes": draft.notes}


def _model(model: Model, taps: Sequence[str], built: Built, few: Batch) -> dict[str, Any]:
    return {
        "kind": model.record.kind,
        "parameters": cost.parameters(model.net),
        "macs": cost.macs(model),
        "taps": _tap_shapes(model, taps, built, few),
    }


def _tap_shapes(model: Model, taps: Sequence[str], built: Built, few: Batch) -> dict[str, list[int]]:
    """The shape of each tapped feature of one sample."""
    if not taps:
        return {}
    modes = {name: module.training for name, module in model.named_modules()}
    with Taps(model.net, dict.fromkeys(taps)) as tapped, torch.no_grad():
        with tapped.recording() as features:
            built.task.forward(model.eval(), few)
        shapes = {tap: list(features[tap].shape[1:]) for tap in dict.fromkeys(taps)}
    for name, module in model.named_modules():
        module.training = modes[name]
    return shapes


def _store(stores: Sequence[dict[str, Any]], draft: _Draft, filled: dict[str, str]) -> dict[str, Any] | None:
    """What the stores of a stage's teachers come to, when they are whole. filled: by teachers and contents, the stage
    that has filled a store before; it is shared."""
    if not stores:
        return None
    first = filled.setdefault(f"{draft.taught_by} {[s['contents'] for s in stores]}", draft.stage.name)
    return {
        "shared_with": None if first == draft.stage.name else first,
        "rows": sum(s["expected"] for s in stores),
        "held": sum(s["rows"] for s in stores),
        "bytes": sum(s["bytes_complete"] for s in stores),
        "seconds": sum(s["seconds_to_build"] for s in stores),
        "pays_off_after_epochs": max(s["pays_off_after_epochs"] for s in stores),
    }


def _unbalanced(terms: Sequence[dict[str, Any]], stage: TrainStage) -> list[str]:
    """Warnings of terms that hardly count in the gradient, or alone."""
    found = []
    for term in terms if len(terms) > 1 and stage.balance == "none" else ():
        share = term["share"]
        if share is not None and not _FEW <= share <= _NEARLY_ALL:
            which = "hardly trains the student" if share < _FEW else "leaves the other terms no say"
            advice = "another weight helps, or balance: gradient, which makes weights shares"
            found.append(f"losses.{term['name']}: {100 * share:.2g} % of the gradient: it {which}; {advice}")
    return found


# ---------------------------------------------------------------------------------------------------------- real steps


class _Trial(Reporter):
    """Steps of a stage: the first at the final weights, with what it holds in memory, then a few against the clock.

    seconds: of a step; teacher_seconds: of it spent asking teachers; start_seconds: of what the method does before its
    first step.
    """

    def __init__(self, built: Built, stage: TrainStage, notes: list[str]) -> None:
        self.built, self.stage, self.notes = built, stage, notes
        self.warnings: list[str] = []
        self.seconds = self.teacher_seconds = 0.0
        self.memory: dict[str, Any] | None = None
        self.sums: dict[str, float] = {}
        method, self.clock = built.method, Clock(built.device)
        method.clock = self.clock
        began = time.perf_counter()
        method.start(built.loader)
        self.start_seconds = time.perf_counter() - began
        self._update = Step(built, stage, self.clock, self, stage.accumulate)
        factor = built.schedule(0, stage.epochs * len(built.loader), len(built.loader))
        for group in built.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        method.begin_epoch(0)
        method.train()
        with closing(_endless(built)) as batches:
            try:
                self.memory = self._first(next(batches))
                self._timed(batches)
            except DivergedError as error:
                self.warnings.append(error.problems[0].message)

    def say(self, text: str) -> None:
        self.notes.append(text)

    def _first(self, batch: Batch) -> dict[str, Any]:
        """The step whose terms are shown; what it needs of memory, in bytes."""
        built, on_cuda = self.built, self.built.device.type == "cuda"
        kept = _Kept(built)
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(built.device)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
            done = self._update(batch, float(self.stage.epochs))
        self.sums = {name: float(s) / max(float(done.counts[name]), 1.0) for name, s in done.sums.items()}
        memory = self._bytes(kept)
        if on_cuda:
            memory |= {"peak": torch.cuda.max_memory_allocated(built.device), "how": "measured"}
        return memory

    def _bytes(self, kept: _Kept) -> dict[str, Any]:
        built = self.built
        state = [v for values in built.optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
        parts = {
            "weights": _size([*built.method.trained.parameters(), *built.method.trained.buffers()]),
            "gradients": _size(list(built.method.parameters())),
            "optimizer": _size(state),
            "teachers": sum(_size([*m.parameters(), *m.buffers()]) for m in built.teachers),
            "activations": sum(kept.storages.values()),
        }
        return parts | {"peak": sum(parts.values()), "how": "estimated: the sum of its parts"}

    def _timed(self, batches: Iterator[Batch]) -> None:
        self._wait()
        first = self.clock.take()
        began, number, steps = time.perf_counter(), 0, len(self.built.loader)
        while number < _TIMED_STEPS and (not number or time.perf_counter() - began < _LONGEST_S):
            self._update(next(batches), self.stage.epochs + (number + 1) / steps)  # a method may draw by the step
            number += 1
        self._wait()
        spent, times = time.perf_counter() - began, self.clock.take()
        self.seconds, self.teacher_seconds = spent / number, times.get("teacher", 0.0) / number
        rounds = self.built.method.rounds()
        if rounds is not None:  # of which these steps had some or none
            every, before = rounds
            a_round = first.get("data", 0.0) / (1 + before)
            self.seconds = (spent - times.get("data", 0.0)) / number + a_round / every
            self.start_seconds += before * a_round

    def _wait(self) -> None:
        if self.built.device.type == "cuda":
            torch.cuda.synchronize(self.built.device)

    def terms(self) -> list[dict[str, Any]]:
        """Every term on one batch, with the weights that the schedules end in."""
        weights = self.built.method.weights(float(self.stage.epochs))
        kinds = {loss.label: loss.kind for loss in self.stage.losses}
        alone = len(self.sums) == 1
        found = []
        for term in self.built.method.terms:
            value, weight = self.sums.get(term.name), weights.get(term.name)
            shown = value is not None and math.isfinite(value) and weight is not None
            found.append({
                "name": term.name,
                "kind": kinds.get(term.name, term.name),
                "weight": weight,
                "value": value,
                "weighted": weight * value if shown and weight is not None and value is not None else None,
                "share": self._update.shares.get(term.name, 1.0 if alone and value is not None else None),
                "taps": [{"student": own, "teacher": other} for own, other in term.loss.taps],
                "adapters": _adapters(term),
            })  # fmt: skip
        return found


def _endless(built: Built) -> Generator[Batch, None, None]:
    """The batches of epoch after epoch."""
    epoch = 0
    while True:
        yield from built.loader.epoch(epoch)
        epoch += 1


class _Kept:
    """Counts what autograd keeps for the backward pass: the bytes of each storage once, but for those of weights."""

    def __init__(self, built: Built) -> None:
        modules: list[nn.Module] = [built.method.trained, *built.teachers]
        own = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        self._own = {t.untyped_storage().data_ptr() for t in own}
        self.storages: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def _adapters(term: Term) -> list[dict[str, Any]]:
    """What a term trains beside the student: each learnt part by its place in the term."""
    found = []
    for place, module in term.loss.named_modules():
        size = sum(p.numel() for p in module.parameters(recurse=False) if p.requires_grad)
        if size:
            found.append({"name": place or "term", "kind": type(module).__name__, "parameters": size})
    return found


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# ---------------------------------------------------------------------------------------------------------------- time


def _time(
    experiment: Experiment, built: Built, stage: TrainStage, trial: _Trial, store: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Seconds of a stage: steps, validation, what comes before them; None where no step could be timed."""
    if not trial.seconds:
        return None
    stored = store is not None and _is_stored(experiment, built)
    step = trial.seconds - (trial.teacher_seconds if stored else 0.0)
    evaluation = _evaluation(experiment, built)
    filling = store["seconds"] if store is not None and not store["shared_with"] else 0.0
    before = trial.start_seconds + filling
    seconds = before + stage.epochs * (len(built.loader) * step + evaluation)
    if experiment.train.max_minutes is not None and stage.role == "student":
        seconds = min(seconds, 60 * experiment.train.max_minutes)
    return {
        "step_ms": 1000 * trial.seconds,
        "teacher_ms": 1000 * trial.teacher_seconds,
        "evaluation_seconds": evaluation,
        "before_seconds": before,
        "samples_per_second": len(built.data.train) / max(len(built.loader) * step, 1e-9),
        "seconds": seconds,
    }


def _is_stored(experiment: Experiment, built: Built) -> bool:
    """Whether the store holds all that the terms want of the teachers, so that steps do without asking."""
    taught = [term.loss for term in built.method.terms if term.loss.needs_teacher]
    kept = experiment.teacher_cache.store if experiment.teacher_cache is not None else ""
    features, logits = any(loss.taps for loss in taught), any(loss.needs_logits for loss in taught)
    return kept == "both" or (kept == "logits" and not features) or (kept == "features" and not logits)


def _evaluation(experiment: Experiment, built: Built) -> float:
    """Seconds of a validation, from one batch of it."""
    val = built.data.val
    if val is None:
        return 0.0
    size = min(experiment.data.eval_batch_size, len(val))
    some = val.subset(torch.arange(size))
    began = time.perf_counter()
    validate(built.method.student, some, built.task, built.device, size, built.precision)
    return (time.perf_counter() - began) * len(val) / size
