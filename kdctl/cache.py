"""The stores of teacher outputs of an experiment: what they hold and cost, building them ahead, checking, deleting.

The stores themselves are in teachers/store.py; training fills and reads them without anything here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdctl import build
from kdctl.build import Built
from kdctl.config.schema import Experiment, TrainStage
from kdctl.data.loader import TrainLoader, clean_batches
from kdctl.data.prepare import Data
from kdctl.device import apply_settings, autocast, choose_device
from kdctl.errors import ConfigError, KdctlError, MissingError, Problem, counted
from kdctl.models.record import Model
from kdctl.signals import CLEAN, Batch
from kdctl.teachers import store as stores
from kdctl.teachers.cached import CachedTeacher
from kdctl.teachers.contents import Contents
from kdctl.teachers.key import default_folder, nearest
from kdctl.teachers.live import LiveTeacher
from kdctl.teachers.store import Store
from kdctl.watch import Bar, StopSignal, no_bar

Say = Callable[[str], None]
_TIMED_BATCHES, _TIMED_SAMPLES = 3, 128
_CLEAN_FOLDER = "clean"
Part = tuple[str, int, int]
"""Split, turn and stream."""


@dataclass
class Member:
    """A teacher of a stage with its store. data: the stage's. batch_size: of what is asked for when it is built."""

    stage: TrainStage
    teacher: CachedTeacher
    loader: TrainLoader
    data: Data
    batch_size: int
    precision: str
    device: torch.device

    @property
    def store(self) -> Store:
        return self.teacher.store

    @property
    def parts(self) -> list[Part]:
        """All that is stored: the clean validation split, and each turn that the epochs come to, with its strongly
        augmented version where there is one."""
        turns = dict.fromkeys(self.loader.views.turn(epoch) for epoch in range(self.stage.epochs))
        clean = [("val", CLEAN, 0)] if self.data.val is not None else []
        streams = (0,) if self.loader.strong is None else (0, 1)
        return [*clean, *(("train", turn, stream) for turn in turns for stream in streams)]

    def missing(self, split: str, turn: int, stream: int) -> Tensor:
        """The rows of a split whose samples are not held."""
        index = self.data.split(split).index.numpy()
        return torch.from_numpy(np.flatnonzero(self.store.turn(split, turn, stream).missing(index)))

    def batches(self, split: str, turn: int, stream: int, rows: Tensor, size: int) -> Iterator[Batch]:
        """These rows of a split as a turn shows them."""
        if split == "train":
            shown = self.loader.shown(list(rows.to(self.loader.split.targets.device).split(size)), turn)
            return (batch.strongly() if stream else batch for batch in shown)
        part = self.data.split(split).subset(rows)
        return clean_batches(part, batch_size=size, name=split, device=self.device, workers=self.loader.workers)

    def fill(self, batch: Batch) -> None:
        with autocast(self.device, self.precision):
            self.teacher.fill(batch)


def members_of(experiment: Experiment, stage: TrainStage, built: Built) -> list[Member]:
    """The teachers of a built stage that have a store."""
    size = experiment.data.eval_batch_size
    return [
        Member(stage, teacher, built.loader, built.data, size, built.precision, built.device)
        for teacher in built.members
        if isinstance(teacher, CachedTeacher)
    ]


# -------------------------------------------------------------------------------------------------------------- filling


@dataclass(frozen=True)
class Cost:
    """Seconds to ask for all that is missing, seconds of the live teacher an epoch, and bytes of a row."""

    seconds: float
    epoch_seconds: float
    row_bytes: float

    @property
    def pays_off_after(self) -> float:
        """Epochs after which a store costs less than asking at every step."""
        return self.seconds / max(self.epoch_seconds, 1e-9)


@torch.no_grad()
def cost(member: Member) -> Cost:
    """Times the teacher on a few batches, without storing them; not at all where nothing is missing."""
    missing = sum(len(member.missing(*part)) for part in member.parts)
    if not missing:
        return Cost(0.0, 0.0, member.store.turn(*member.parts[-1]).row_bytes)
    count = min(_TIMED_SAMPLES, member.batch_size, len(member.data.train))
    live, contents = member.teacher.live, member.store.contents
    rows = torch.arange(count)
    preparing, asking, row_bytes = [], [], 0.0
    for _ in range(_TIMED_BATCHES):
        began = time.perf_counter()
        batch = next(member.batches(*member.parts[-1], rows, count))
        _wait(member.device)
        ready = time.perf_counter()
        with autocast(member.device, member.precision):
            fields = contents.encode(live(batch, contents.taps, contents.logits), batch.inputs)
        _wait(member.device)
        preparing.append(ready - began)
        asking.append(time.perf_counter() - ready)
        sizes = {n: t[0].numel() * np.dtype(contents.numpy_dtype(n)).itemsize for n, t in fields.items()}
        row_bytes = float(sum(sizes.values()))
    a_row, prepared = min(asking) / count, min(preparing) / count
    streams = len({stream for _, _, stream in member.parts})
    return Cost(missing * (a_row + prepared), streams * len(member.data.train) * a_row, row_bytes)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fill(member: Member, say: Say, check: Callable[[], None] = lambda: None, bar: Bar = no_bar) -> int:
    """Asks the teacher for all rows that are missing, in order and in large batches; how many these were.

    check: called after every batch, raises to stop. What was asked until then stays.
    """
    filled, began = 0, time.perf_counter()
    waiting = [(part, member.missing(*part)) for part in member.parts]
    try:
        with bar("asking the teacher", sum(len(rows) for _, rows in waiting)) as advance:
            for number, (part, rows) in enumerate(waiting, 1):
                for batch in member.batches(*part, rows, member.batch_size) if len(rows) else ():
                    member.fill(batch)
                    filled += batch.size
                    advance(batch.size)
                    check()
                if len(rows):
                    member.store.flush()
                    rate = filled / (time.perf_counter() - began)
                    text = f"stored {_part_text(*part)} ({number} of {len(waiting)}): {counted(len(rows), 'sample')}"
                    say(f"{text}, {rate:,.0f}/s")
    finally:
        member.store.flush()
    return filled


def announce(member: Member, spent: Cost) -> str:
    """What a store holds, what building it costs and when that pays off, in one line."""
    held = {part: len(member.data.split(part[0])) - len(member.missing(*part)) for part in member.parts}
    rows = sum(len(member.data.split(part[0])) for part in held)
    if sum(held.values()) == rows:
        return f"{_name(member)}: all {rows:,} samples are in {member.store.folder}"
    size = bytes_text(rows * spent.row_bytes)
    text = f"{_name(member)}: {sum(held.values()):,} of {counted(rows, 'sample')} ({size})"
    text += f" are in {member.store.folder}; the others take {spent.seconds:.0f} s"
    text += f" and pay off after {spent.pays_off_after:.1f} epochs"
    near = None if any(held.values()) else nearest(member.store.key)
    return f"{text}; the nearest, {near[0].name}, differs: {'; '.join(near[1])}" if near else text


def fill_before(
    members: Sequence[Member], say: Say, check: Callable[[], None] = lambda: None, bar: Bar = no_bar
) -> int:
    """Builds what is missing of each store, its cost said first; how many rows that were."""
    filled = 0
    for member in members:
        say(announce(member, cost(member)))
        filled += fill(member, say, check, bar)
    return filled


# ------------------------------------------------------------------------------------------------------ clean, in full


def clean_logits(
    experiment: Experiment, stage: TrainStage, number: int, model: Model, data: Data, split: str,
    measure: Callable[[], NDArray[np.float32]],
) -> NDArray[np.float32]:  # fmt: skip
    """fp32 logits (N, C) of a teacher on a clean split: as they were measured once, to the bit.

    measure: gives them where they are not stored; those that are not finite are not kept.
    """
    store = _clean_store(experiment, stage, number, model, data)
    turn, index = store.turn(split, CLEAN), data.split(split).index.numpy()
    if not turn.missing(index).any():
        return turn.take("logits", index)
    logits = measure()
    if np.isfinite(logits).all():
        with suppress(KdctlError):  # a store that cannot be written costs time, and no result
            store.put(turn, index, {"logits": logits})
            store.flush()
    return logits


def _clean_place(experiment: Experiment, stage: TrainStage, number: int, model: Model, data: Data) -> Any:
    contents = Contents(True, None, (), "fp32", model.record.num_logits)
    key = stores.model_key(model, data, contents, "fp32")
    named = stores.named_folder(experiment, stage, number)
    return default_folder(key) if named is None else named / _CLEAN_FOLDER, key, contents


def _clean_store(experiment: Experiment, stage: TrainStage, number: int, model: Model, data: Data) -> Store:
    folder, key, contents = _clean_place(experiment, stage, number, model, data)
    return Store(folder, key, contents, stores.split_sizes(data))


# --------------------------------------------------------------------------------------------------------------- verbs


def show(experiment: Experiment, data: Data) -> dict[str, Any]:
    """What the stores of an experiment hold, what they will, and when that pays off. Writes nothing.

    Here and below: experiment has its precision settled; data are all of its data.
    """
    members, notes = _open(experiment, data)
    return {"stores": [_describe(member, cost(member)) for member in members], "notes": notes}


def build_stores(experiment: Experiment, data: Data, say: Say, bar: Bar = no_bar) -> dict[str, Any]:
    """Fills every store whose teacher is at hand. Interrupted, it goes on from there when called again."""
    members, notes = _open(experiment, data)
    began = time.perf_counter()
    with StopSignal() as stop:
        where = "while building; what is stored stays, and `kdctl cache build` goes on"
        filled = fill_before(members, say, lambda: stop.check(where), bar)
    seconds = round(time.perf_counter() - began, 3)
    described = [_describe(member, None) for member in members]
    return {"stores": described, "filled": filled, "seconds": seconds, "notes": notes}


def verify(experiment: Experiment, data: Data) -> dict[str, Any]:
    """Reads every byte of the stores. Raises MissingError naming the files that are damaged."""
    stages, notes = taught_stages(experiment)
    found, problems = [], []
    for stage, number, model, own in _models(experiment, stages, data):
        kept = stores.open_store(experiment, stage, number, model, own, build.teacher_taps(stage, number))
        for store in (kept, _clean_store(experiment, stage, number, model, own)):
            try:
                files = store.verify()
            except MissingError as error:
                problems += error.problems
                continue
            size = stores.stored_bytes(store.folder)
            found.append({"folder": str(store.folder), "files": len(files), "bytes": size})
    if problems:
        raise MissingError(*problems)
    return {"stores": [entry for entry in found if entry["files"]], "notes": notes}


def clear(experiment: Experiment, load_data: Callable[[], Data]) -> dict[str, Any]:
    """Deletes the stores of an experiment, whatever is damaged or stale in them: what kdctl made, and nothing else."""
    cleared = []
    for folder in _folders(experiment, load_data):
        files, size = stores.clear(folder)
        if files:
            cleared.append({"folder": str(folder), "files": files, "bytes": size, "kept": folder.exists()})
    return {"stores": cleared}


def taught_stages(experiment: Experiment) -> tuple[list[TrainStage], list[str]]:
    """The stages with teachers at hand, and a note for each whose teacher an earlier stage will make.

    Raises ConfigError where the experiment stores no teacher outputs.
    """
    if experiment.teacher_cache is None:
        hint = "add teacher_cache: {store: logits}"
        raise ConfigError(Problem("this experiment stores no teacher outputs", key="teacher_cache", hint=hint))
    taught = [stage for stage in experiment.train_stages if stage.teachers and stage.epochs]
    later = [stage for stage in taught if any(spec.stage is not None for spec in stage.teachers)]
    notes = [f"stage {s.name}: its teacher is trained in the run, and its store filled then" for s in later]
    return [stage for stage in taught if stage not in later], notes


def _models(
    experiment: Experiment, stages: Sequence[TrainStage], data: Data
) -> Iterator[tuple[TrainStage, int, Model, Data]]:
    """Each teacher with its stage, its number there, and the stage's data."""
    for stage in stages:
        own = data.for_stage(stage.data)
        models = build.build_teachers(stage, own, experiment.train.seed, lambda name: Path(name))
        yield from ((stage, number, model, own) for number, model in enumerate(models))


def _open(experiment: Experiment, data: Data) -> tuple[list[Member], list[str]]:
    stages, notes = taught_stages(experiment)
    settings = experiment.train
    apply_settings(settings)
    device = choose_device(settings.device)
    layout = torch.channels_last if settings.layout == "channels_last" else torch.contiguous_format
    task, size = build.build_task(experiment), experiment.data.eval_batch_size
    members = []
    for stage, number, model, own in _models(experiment, stages, data):
        model.to(device=device).to(memory_format=layout)  # type: ignore[call-overload]
        store = stores.open_store(experiment, stage, number, model, own, build.teacher_taps(stage, number))
        teacher = CachedTeacher(LiveTeacher(model, task, build.teacher_taps(stage, number)), store)
        loader = build.build_loader(experiment, stage, own, device)
        members.append(Member(stage, teacher, loader, own, size, str(settings.precision), device))
    return members, notes


def _folders(experiment: Experiment, load_data: Callable[[], Data]) -> list[Path]:
    """Every folder that a store of the experiment can lie in; named ones need no models to be found."""
    stages, _ = taught_stages(experiment)
    if experiment.teacher_cache is not None and experiment.teacher_cache.dir is not None:
        taught = [stage for stage in experiment.train_stages if stage.teachers]
        named = [stores.named_folder(experiment, s, n) for s in taught for n in range(len(s.teachers))]
        return [folder for own in named if own is not None for folder in (own / _CLEAN_FOLDER, own)]
    folders = []
    for stage, number, model, data in _models(experiment, stages, load_data()):
        key = stores.content_key(experiment, stage, model, data, build.teacher_taps(stage, number))[1]
        folders += [default_folder(key), _clean_place(experiment, stage, number, model, data)[0]]
    return folders


def _describe(member: Member, spent: Cost | None) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    held_rows = rows = 0
    near = None
    for split, turn, stream in member.parts:
        expected = len(member.data.split(split))
        held = expected - len(member.missing(split, turn, stream))
        place = {"split": split, "turn": None if turn == CLEAN else turn} | ({"stream": stream} if stream else {})
        parts.append(place | {"rows": held, "expected": expected})
        held_rows, rows = held_rows + held, rows + expected
        near = None if held_rows else nearest(member.store.key)
    document: dict[str, Any] = {
        "stage": member.stage.name,
        "teacher": member.teacher.models[0].record.kind,
        "folder": str(member.store.folder),
        "contents": member.store.contents.to_dict(),
        "rows": held_rows,
        "expected": rows,
        "bytes": stores.stored_bytes(member.store.folder),
        "parts": parts,
        "nearest": near and {"folder": str(near[0]), "differs": near[1]},
    }
    if spent is not None:
        document |= {
            "bytes_complete": round(rows * spent.row_bytes),
            "seconds_to_build": round(spent.seconds, 3),
            "teacher_seconds_an_epoch": round(spent.epoch_seconds, 3),
            "pays_off_after_epochs": round(spent.pays_off_after, 2),
        }
    return document


def _name(member: Member) -> str:
    return f"store of {member.teacher.models[0].record.kind} for stage {member.stage.name}"


def _part_text(split: str, turn: int, stream: int) -> str:
    return f"{split}, clean" if turn == CLEAN else f"{split}, view {turn}{', strong' if stream else ''}"


def bytes_text(size: float) -> str:
    """A size for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("the last unit takes every size")
