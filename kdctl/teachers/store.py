"""The store of a teacher's outputs: one folder of a content key, shared by all runs with that key.

`key.json` says what the outputs depend on; the files beside it (block.py) hold rows by (split, turn, stream) and sample
(turn.py). `open_store` finds the folder of a stage's teacher.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdctl.config.schema import Experiment, TeacherCache, TrainStage
from kdctl.data.prepare import Data
from kdctl.errors import ConfigError, KdctlError, MissingError, Problem
from kdctl.models.record import Model
from kdctl.runs import read_json
from kdctl.signals import Batch, Signals
from kdctl.teachers.block import ASIDE, Array, Block, damaged, place
from kdctl.teachers.contents import Contents
from kdctl.teachers.key import (
    KEY_FILE,
    Key,
    class_code,
    default_folder,
    differences,
    key_hash,
    store_key,
    weights_hash,
)
from kdctl.teachers.turn import Rows, Turn, named_turn, turn_name

WAITING_BYTES = 32 << 20
"""Rows wait in memory until they are this many bytes."""
RESIDENT_BYTES = 256 << 20
"""A field of a turn of at most this size is kept as a tensor on the device of the batches; larger ones are mapped."""
_RESIDENT_IN_ALL = 1 << 30
_LEFT_SECONDS = 24 * 3600
_OWN_FILE = re.compile(r"(train|val|test)\.(clean|\d+)\.\d+\.(block|[0-9a-f]{16}\.segment)")


class Store:
    """The rows of one teacher.

    folder: made when the first row is written. sizes: how many sample numbers each split has. used: the sample numbers
    of a split that will be asked for, where these are not all: a turn that has them needs no further look at what is
    missing. Raises ConfigError, saying what changed, where the folder is that of another key; MissingError where a file
    is damaged.
    """

    def __init__(
        self,
        folder: Path,
        key: Key,
        contents: Contents,
        sizes: Mapping[str, int],
        used: Mapping[str, Rows] | None = None,
    ) -> None:
        self.folder, self.key, self.contents = folder, key, contents
        self.sizes = dict(sizes)
        self._used = dict(used or {})
        self._hash = key_hash(key)
        self._turns: dict[tuple[str, int, int], Turn] = {}
        self._ready: dict[str, int] = {}
        self._resident: OrderedDict[tuple[str, str, torch.device], Tensor] = OrderedDict()
        self._tidy = False
        self._check_key()

    def turn(self, split: str, turn: int, stream: int = 0) -> Turn:
        """The rows of one turn. Raises MissingError where a file of it is damaged."""
        found = self._turns.get((split, turn, stream))
        if found is None:
            found = Turn(self.folder, self._hash, split, turn, stream, self.sizes[split])
            self._turns[split, turn, stream] = found
        return found

    # -------------------------------------------------------------------------------------------------------- reading

    def missing(self, batch: Batch) -> Tensor | None:
        """Which rows of a batch are not held, (N,) bool on the CPU; None where none is missing in the whole turn."""
        turn = self.turn(batch.split, batch.turn, batch.stream)
        if self._is_ready(turn, batch.split):
            return None
        return torch.from_numpy(turn.missing(batch.index.cpu().numpy()))

    def read(self, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
        """Fields of a batch, all of whose rows are held, on its device and as they are stored."""
        turn = self.turn(batch.split, batch.turn, batch.stream)
        found: dict[str, Tensor] = {}
        rows: Rows | None = None
        for name in names:
            whole = self._whole(turn, batch.split, name, batch.index.device)
            if whole is not None:
                found[name] = whole.index_select(0, batch.index)
                continue
            rows = batch.index.cpu().numpy() if rows is None else rows
            found[name] = _tensor(turn.take(name, rows)).to(batch.index.device, non_blocking=True)
        return found

    def signals(self, batch: Batch, taps: Sequence[str], logits: bool) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Logits (None where they are not wanted) and features of a batch, all of whose rows are held; in float32."""
        return self.contents.decode(self.read(batch, self.contents.names_of(taps, logits)), batch.inputs)

    def _is_ready(self, turn: Turn, split: str) -> bool:
        if turn.complete:
            return True
        used = self._used.get(split)
        if used is None or turn.held < len(used):
            return False
        if self._ready.get(turn.name) != turn.held:
            if turn.missing(used).any():
                return False
            self._ready[turn.name] = turn.held
        return True

    def _whole(self, turn: Turn, split: str, name: str, device: torch.device) -> Tensor | None:
        """A field of a ready turn as one tensor; None where it is too large or still filled."""
        key = (turn.name, name, device)
        found = self._resident.get(key)
        if found is not None:
            self._resident.move_to_end(key)
            return found
        if not self._is_ready(turn, split) or turn.size * turn.fields[name].row_bytes > RESIDENT_BYTES:
            return None
        rows = np.arange(turn.size) if turn.complete else self._used[split]
        values = _tensor(turn.take(name, rows))
        if len(rows) < turn.size:
            values = values.new_zeros(turn.size, *values.shape[1:]).index_copy_(0, torch.from_numpy(rows), values)
        self._resident[key] = values.to(device)
        while sum(t.nbytes for t in self._resident.values()) > _RESIDENT_IN_ALL:
            self._resident.popitem(last=False)
        return self._resident.get(key, values)

    # -------------------------------------------------------------------------------------------------------- filling

    def add(self, batch: Batch, signals: Signals) -> None:
        """Keeps what the teacher said of a batch. Raises ConfigError where a value has no place in the store."""
        fields = self.contents.encode(signals, batch.inputs)
        values = {name: _array(field, self.contents.numpy_dtype(name)) for name, field in fields.items()}
        self.put(self.turn(batch.split, batch.turn, batch.stream), batch.index.cpu().numpy(), values)

    def put(self, turn: Turn, index: Rows, values: Mapping[str, Array]) -> None:
        """Keeps the fields of some samples as they are."""
        for name, part in values.items():
            self._check_values(name, part, turn)
        with self._writing():
            self._make_folder()
            if not self._tidy:
                self._tidy = True
                _remove_leftovers(self.folder)
            turn.add(index, values)
        if sum(t.waiting_bytes for t in self._turns.values()) > WAITING_BYTES:
            self.flush()

    def flush(self) -> None:
        """Puts every waiting row on the disk. Raises KdctlError where that is not possible."""
        filling = [turn for turn in self._turns.values() if not turn.complete and turn.held]
        with self._writing():
            if filling:
                self._make_folder()
            for turn in filling:
                turn.flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            message = f"the store of teacher outputs cannot be written: {error.strerror or error}"
            hint = "teacher_cache.dir, or the environment's KDCTL_CACHE, names another place"
            raise KdctlError(Problem(message, file=str(self.folder), key="teacher_cache", hint=hint)) from error

    def _check_values(self, name: str, values: Array, turn: Turn) -> None:
        if values.dtype.kind == "f" and name != "rest" and not np.isfinite(values).all():
            what = "logits" if not name.startswith("tap:") else f"features at {name[4:]}"
            message = f"the teacher's {what} have values that are not finite in {self.contents.dtype}"
            hint = None if self.contents.dtype == "fp32" else "teacher_cache.dtype: fp32 keeps values above 65504"
            raise ConfigError(Problem(message, key="teacher_cache.dtype", hint=hint))
        known = turn.fields.get(name)
        if known is not None and known.shape != values.shape[1:]:
            message = f"the shape of {name} differs from sample to sample: {known.shape} and {values.shape[1:]}"
            raise ConfigError(Problem(message, key="teacher_cache", hint="only outputs of one shape can be stored"))

    # ----------------------------------------------------------------------------------------------------- the folder

    def verify(self) -> list[str]:
        """Checks every byte of every file; the names of these. Raises MissingError naming all that are damaged."""
        names = [name for name in own_files(self.folder) if _OWN_FILE.fullmatch(name)]
        problems: list[Problem] = []
        for name in names:
            try:
                Block(self.folder / name, self._hash, turn_name(*named_turn(name))).verify()
            except FileNotFoundError:  # merged by another process in between
                continue
            except MissingError as error:
                problems += error.problems
        if problems:
            raise MissingError(*problems)
        return names

    def _check_key(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(Problem(f"{self.folder} is no folder", key="teacher_cache.dir"))
        path = self.folder / KEY_FILE
        if not path.exists():
            return
        try:
            other = read_json(path)
        except MissingError as error:
            raise damaged(path, error.problems[0].message) from None
        if other == self.key:
            return
        changed = differences(other, self.key) if isinstance(other, dict) else ["the key is none"]
        message = f"{self.folder} holds the outputs of something else: {'; '.join(changed)}"
        hint = "name another folder or leave `dir` out, or delete it with `kdctl cache clear CONFIG`"
        raise ConfigError(Problem(message, key="teacher_cache.dir", hint=hint))

    def _make_folder(self) -> None:
        """Makes the folder with its key; where another process does the same at once, with another key, refuses."""
        path = self.folder / KEY_FILE
        if path.exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=self.folder, prefix=ASIDE)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(json.dumps(self.key, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.chmod(aside, 0o644)
            place(Path(aside), path)
        finally:
            Path(aside).unlink(missing_ok=True)
        self._check_key()


def own_files(folder: Path) -> list[str]:
    """The files of a store's folder that kdctl made, also what a killed process left half-written."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return [n for n in names if n == KEY_FILE or n.startswith(ASIDE) or _OWN_FILE.fullmatch(n)]


def _remove_leftovers(folder: Path) -> None:
    """Deletes what processes that were killed long ago had begun to write."""
    for name in own_files(folder):
        with suppress(OSError):
            if name.startswith(ASIDE) and time.time() - os.stat(folder / name).st_mtime > _LEFT_SECONDS:
                (folder / name).unlink()


def stored_bytes(folder: Path) -> int:
    """How much a store takes on the disk."""
    total = 0
    for name in own_files(folder):
        with suppress(FileNotFoundError):
            total += os.stat(folder / name).st_size
    return total


def clear(folder: Path) -> tuple[int, int]:
    """Deletes the files of a store, and its folder if nothing else is in it; how many, and their bytes."""
    names = own_files(folder)
    names.sort(key=lambda name: name == KEY_FILE)  # last: until then the folder says what it is
    total = stored_bytes(folder)
    for name in names:
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
    return len(names), total


def _array(values: Tensor, dtype: str) -> Any:
    return values.detach().cpu().numpy().astype(dtype, copy=False)


def _tensor(values: Any) -> Tensor:
    """A writable tensor of what was read; torch hardly works with uint16."""
    values = np.array(values, dtype=np.int32) if values.dtype == np.uint16 else np.array(values)
    return torch.from_numpy(values)


# -------------------------------------------------------------------------------------------------------------- opening


def open_store(
    experiment: Experiment, stage: TrainStage, number: int, model: Model, data: Data, taps: Sequence[str]
) -> Store:
    """The store of a stage's teacher.

    number: which of the stage's teachers `model` is. data: the stage's. taps: all teacher taps of the stage's terms.
    experiment: with its `teacher_cache`, and the precision settled. Raises ConfigError where the folder that it names
    is that of another key.
    """
    contents, key = content_key(experiment, stage, model, data, taps)
    folder = named_folder(experiment, stage, number) or default_folder(key)
    return Store(folder, key, contents, split_sizes(data), {"train": data.train.index.numpy()})


def split_sizes(data: Data) -> dict[str, int]:
    """How many sample numbers each split has."""
    there = {"val": data.val, "test": data.test}
    return {"train": data.index_size} | {name: len(split) for name, split in there.items() if split is not None}


def content_key(
    experiment: Experiment, stage: TrainStage, model: Model, data: Data, taps: Sequence[str]
) -> tuple[Contents, Key]:
    """What the store of a stage's teacher keeps, and its key."""
    contents = contents_of(experiment.teacher_cache or TeacherCache(), model, taps)
    contents = replace(contents, tokens=data.tokens)
    changed = stage.data
    augment = changed.augment if changed.augment is not None else experiment.data.augment
    strong = changed.strong_augment if changed.strong_augment is not None else experiment.data.strong_augment
    key = model_key(
        model, data, contents, str(experiment.train.precision),
        augment=[_operation(spec.kind, spec.arguments) for spec in augment]
        + [_operation(spec.kind, spec.arguments) | {"stream": 1} for spec in strong],
        enumerated=(changed.views or experiment.data.views) == "all",
        augment_seed=experiment.data.augment_seed,
    )  # fmt: skip
    return contents, key


def contents_of(cache: TeacherCache, model: Model, taps: Sequence[str]) -> Contents:
    """What a stage's store keeps. A top_k that is not less than the number of classes is all of them."""
    classes = model.record.num_logits
    top_k = cache.top_k if cache.top_k is not None and cache.top_k < classes else None
    kept = tuple(sorted(set(taps))) if cache.store != "logits" else ()
    logits = cache.store != "features"
    return Contents(logits, top_k if logits else None, kept, cache.dtype, classes)


def model_key(
    model: Model, data: Data, contents: Contents, precision: str, *,
    augment: Sequence[Mapping[str, Any]] = (), enumerated: bool = False, augment_seed: int = 0,
) -> Key:  # fmt: skip
    """The key of what a model says of data under a transform (none: of clean samples alone)."""
    kind, code = class_code("models", model.record.kind, model.base)
    return store_key(
        record=model.record.to_dict() | {"kind": kind},
        code=code,
        weights=weights_hash(model.net),
        data=data.fingerprint(),
        augment=augment,
        enumerated=enumerated,
        augment_seed=augment_seed,
        stored=contents.to_dict(),
        precision=precision,
    )


def _operation(kind: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    name, code = class_code("augment", kind)
    return {"kind": name, **arguments} | ({"code": code} if code else {})


def named_folder(experiment: Experiment, stage: TrainStage, number: int) -> Path | None:
    """The folder that the user names for a stage's teacher, None for the key's own.

    One teacher takes the folder itself; where several stages have teachers each has a folder of its own in it, and so
    has each of several teachers.
    """
    cache = experiment.teacher_cache
    if cache is None or cache.dir is None:
        return None
    folder = Path(cache.dir)
    if sum(bool(other.teachers) for other in experiment.train_stages) > 1:
        folder /= stage.name
    return folder / str(number + 1) if len(stage.teachers) > 1 else folder
