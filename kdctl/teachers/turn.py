"""The stored rows of one turn of one split: read from files, filled row by row, made into one file when complete.

While it is filled, a turn is several *segments*: files of the rows that were there when they were written. Rows wait in
memory until there are many of them or someone flushes. A turn that has every row becomes one *block*, sorted by sample,
and its segments are deleted. Every file is whole before it has its name, and nothing is ever changed in place: a
process that is killed loses what waited in memory, and several may fill the same turn at once. Rows that two of them
asked for are there twice until the block is made; who reads a segment that another deletes goes on reading it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdctl.signals import CLEAN
from kdctl.teachers.block import Array, Block, Field, Header, damaged, write

Rows = NDArray[np.int64]
MOST_SEGMENTS = 16
"""More small segments than this are made one."""
SMALL_BYTES = 256 << 20
"""A segment of this size is no small one: merging it again and again would cost more than it saves."""
_PART_BYTES = 8 << 20
_ROW_BITS = 32


class Waiting:
    """Rows that are not on the disk yet, in arrays that grow."""

    def __init__(self) -> None:
        self.rows = 0
        self.columns: dict[str, Array] = {}

    def append(self, values: Mapping[str, Array]) -> None:
        count = len(next(iter(values.values())))
        for name, part in values.items():
            column = self.columns.get(name)
            if column is None or len(column) < self.rows + count:
                larger = np.empty((max(2 * self.rows, self.rows + count), *part.shape[1:]), part.dtype)
                if column is not None:
                    larger[: self.rows] = column[: self.rows]
                column = self.columns[name] = larger
            column[self.rows : self.rows + count] = part
        self.rows += count

    @property
    def bytes(self) -> int:
        return sum(column[: self.rows].nbytes for column in self.columns.values())

    @property
    def fields(self) -> dict[str, Field]:
        return {n: Field(n, c.dtype.newbyteorder("<").str, c.shape[1:]) for n, c in self.columns.items()}

    def take(self, name: str, rows: Rows) -> Array:
        return self.columns[name][rows]


class Turn:
    """The rows of (split, turn, stream); size: how many samples the split has.

    Raises MissingError where a file is damaged or foreign.
    """

    def __init__(self, folder: Path, store: str, split: str, turn: int, stream: int, size: int) -> None:
        self.folder, self.store, self.size = folder, store, size
        self.name = turn_name(split, turn, stream)
        self._where: Rows | None = None
        """For each sample: its source << 32 | its row there; -1 where it is missing. None without any or in a block."""
        self._sources: list[Block | Waiting] = []
        self._waiting: Waiting | None = None
        self._files: dict[str, Block] = {}
        self._seen = -1
        self.held = 0
        self.refresh()

    @property
    def complete(self) -> bool:
        """Whether every row is on the disk, in one block."""
        return len(self._sources) == 1 and self._is_block(self._sources[0])

    @property
    def waiting_bytes(self) -> int:
        return self._waiting.bytes if self._waiting else 0

    @property
    def fields(self) -> dict[str, Field]:
        """The fields of a row, by name; none while there are no rows."""
        return next((source.fields for source in reversed(self._sources) if source.rows), {})

    @property
    def row_bytes(self) -> int:
        return sum(field.row_bytes for name, field in self.fields.items() if name != "index")

    def _is_block(self, source: Block | Waiting) -> bool:
        return isinstance(source, Block) and source.path.suffix == ".block"

    # -------------------------------------------------------------------------------------------------------- reading

    def missing(self, index: Rows) -> NDArray[np.bool_]:
        """Which of these samples have no row, here or in what other processes have written since."""
        absent = self._absent(index)
        if absent.any() and self.refresh():
            absent = self._absent(index)
        return absent

    def _absent(self, index: Rows) -> NDArray[np.bool_]:
        if self._where is not None:
            return self._where[index] < 0
        return np.full(len(index), not self.complete)

    def _map(self) -> Rows:
        if self._where is None:
            self._where = np.full(self.size, -1, dtype=np.int64)
        return self._where

    def take(self, name: str, index: Rows) -> Array:
        """A field of these samples (n, ...), all of which are held."""
        if self.complete:
            return self._sources[0].take(name, index)
        spots = self._map()[index]
        if spots.min(initial=0) < 0:
            raise KeyError(f"{self.name}: a row that is asked for is missing")
        source, row = spots >> _ROW_BITS, spots & ((1 << _ROW_BITS) - 1)
        numbers = np.unique(source)
        if len(numbers) == 1:
            return self._sources[numbers[0]].take(name, row)
        field = self.fields[name]
        found = np.empty((len(index), *field.shape), field.dtype)
        for number in numbers:
            mine = source == number
            found[mine] = self._sources[number].take(name, row[mine])
        return found

    def refresh(self) -> bool:
        """Takes in what other processes have written since the last look; says whether there was something."""
        try:
            changed = os.stat(self.folder).st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            return False
        if self.complete or changed == self._seen:
            return False
        self._seen = changed
        before = self.held
        for _ in range(MOST_SEGMENTS):
            names = turn_files(self.folder, self.name)
            names = [n for n in names if n.endswith(".block")] or sorted(names)
            try:
                new = {n: self._open(n) for n in names if n not in self._files}
                break
            except FileNotFoundError:  # merged by another process in between
                continue
        else:
            return False
        for name, block in new.items():
            if name.endswith(".block"):
                self._take_block(block)
                return True
            self._take_segment(name, block)
        return self.held > before

    def _open(self, name: str) -> Block:
        return Block(self.folder / name, self.store, self.name)

    def _take_block(self, block: Block) -> None:
        if block.rows != self.size:
            raise damaged(block.path, f"it has {block.rows:,} rows for {self.size:,} samples")
        self._sources, self._files, self._waiting = [block], {block.path.name: block}, None
        self._where = None
        self.held = self.size

    def _take_segment(self, name: str, block: Block) -> None:
        index, where = block.column("index").astype(np.int64), self._map()
        new = np.flatnonzero(where[index] < 0)
        where[index[new]] = len(self._sources) << _ROW_BITS | new
        self._sources.append(block)
        self._files[name] = block
        self.held += len(new)

    # -------------------------------------------------------------------------------------------------------- filling

    def add(self, index: Rows, values: Mapping[str, Array]) -> None:
        """Keeps the rows of these samples that are not held yet; on the disk at the next flush."""
        unique, first = np.unique(index, return_index=True)
        new = self._absent(unique)
        unique, first = unique[new], first[new]
        if not len(unique):
            return
        if self._waiting is None:
            self._waiting = Waiting()
            self._sources.append(self._waiting)
        rows = np.arange(self._waiting.rows, self._waiting.rows + len(unique))
        self._waiting.append({"index": unique.astype("<i8")} | {n: part[first] for n, part in values.items()})
        self._map()[unique] = (len(self._sources) - 1) << _ROW_BITS | rows
        self.held += len(unique)
        if self.held == self.size:
            self.flush()

    def flush(self) -> None:
        """Writes what waits: as a segment, or with all else as the block where nothing is missing any more."""
        if self._waiting is not None and self.held < self.size:
            self._write_waiting(self._waiting)
            self.refresh()
        elif self._sources:
            self.refresh()  # another process may have made the block
        if self.complete or not self._sources:
            return
        if self.held == self.size:
            self._compact()
        elif len(self._small()) > MOST_SEGMENTS:
            self._merge()

    def _write_waiting(self, waiting: Waiting) -> None:
        header = Header(self.store, self.name, waiting.rows, tuple(waiting.fields.values()))
        block = self._write_segment(header, lambda field: iter([waiting.columns[field.name][: waiting.rows]]))
        self._sources[self._sources.index(waiting)] = block
        self._waiting = None

    def _write_segment(self, header: Header, columns: object) -> Block:
        name = f"{self.name}.{secrets.token_hex(8)}.segment"
        write(self.folder / name, header, columns)  # type: ignore[arg-type]
        self._files[name] = self._open(name)
        return self._files[name]

    def _compact(self) -> None:
        fields = tuple(field for name, field in self.fields.items() if name != "index")
        path = self.folder / f"{self.name}.block"
        write(path, Header(self.store, self.name, self.size, fields), lambda f: self._parts(f, np.arange(self.size)))
        self._take_block(self._open(path.name))
        for name in turn_files(self.folder, self.name):
            if name != path.name:
                _remove(self.folder / name)

    def _small(self) -> dict[str, Block]:
        return {name: block for name, block in self._files.items() if block.bytes < SMALL_BYTES}

    def _merge(self) -> None:
        """Makes one segment of the small ones. Rows of them that a large one also holds stay there alone."""
        small, where = self._small(), self._map()
        numbers = [i for i, source in enumerate(self._sources) if source in small.values()]
        held = np.flatnonzero(where >= 0)
        index = held[np.isin(where[held] >> _ROW_BITS, numbers)]
        if len(index):
            header = Header(self.store, self.name, len(index), tuple(self.fields.values()))
            parts = lambda f: iter([index]) if f.name == "index" else self._parts(f, index)  # noqa: E731
            self._sources.append(self._write_segment(header, parts))
            where[index] = (len(self._sources) - 1) << _ROW_BITS | np.arange(len(index))
        for name in small:
            del self._files[name]
            _remove(self.folder / name)
        for number in numbers:
            self._sources[number] = Waiting()

    def _parts(self, field: Field, index: Rows) -> Iterator[Array]:
        """A field of these samples, a few MiB at a time."""
        step = max(1, _PART_BYTES // max(field.row_bytes, 1))
        for start in range(0, len(index), step):
            yield self.take(field.name, index[start : start + step])


def turn_name(split: str, turn: int, stream: int) -> str:
    """What the files of a turn are called, and what they say they hold."""
    return f"{split}.{'clean' if turn == CLEAN else turn}.{stream}"


def named_turn(file: str) -> tuple[str, int, int]:
    """Split, turn and stream that a file's name says."""
    split, turn, stream = file.split(".")[:3]
    return split, CLEAN if turn == "clean" else int(turn), int(stream)


def turn_files(folder: Path, name: str) -> list[str]:
    """The files of a turn that are there."""
    try:
        with os.scandir(folder) as entries:
            found = [entry.name for entry in entries]
    except FileNotFoundError:
        return []
    return [n for n in found if n.startswith(f"{name}.") and n.endswith((".block", ".segment"))]


def _remove(path: Path) -> None:
    with suppress(OSError):  # gone already, or (on Windows) read by another process: the next one to look deletes it
        path.unlink()
