"""One file of a store: fields of rows, checked to the last byte, read through a memory map.

    8 bytes   magic
    4 + 4     length of the header, CRC-32 of the header (little-endian, as everything here)
    header    JSON: the store it belongs to, what it is of, number of rows, fields with dtype and shape of a row
    data      field after field, each an array (rows, ...) that begins at a multiple of 64
    table     CRC-32 of each MiB of data, and at last the CRC-32 of this table

A file with the field `index` holds the rows of these samples; one without holds row i for sample i. No pickle.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from kdctl.errors import MissingError, Problem

MAGIC = b"kdctl\x1aT1"
CHUNK = 1 << 20
ASIDE = ".aside-"
_PREFIX = struct.Struct("<8sII")
_ALIGN = 64
Array = NDArray[Any]


@dataclass(frozen=True)
class Field:
    """One array of a file. shape: of a row."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Header:
    """What a file says of itself. store: the hash of the store's key. of: split, turn and stream as text."""

    store: str
    of: str
    rows: int
    fields: tuple[Field, ...]

    @property
    def offsets(self) -> dict[str, int]:
        """Where each field begins in the data."""
        found, at = {}, 0
        for field in self.fields:
            found[field.name] = at
            at += _aligned(self.rows * field.row_bytes)
        return found

    @property
    def data_bytes(self) -> int:
        return sum(_aligned(self.rows * field.row_bytes) for field in self.fields)

    def to_bytes(self) -> bytes:
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()
        return text + b" " * (-(len(text) + _PREFIX.size) % _ALIGN)

    @classmethod
    def from_bytes(cls, data: bytes) -> Header:
        said = json.loads(data)
        fields = tuple(Field(f["name"], f["dtype"], tuple(f["shape"])) for f in said["fields"])
        return cls(said["store"], said["of"], said["rows"], fields)


def _aligned(size: int) -> int:
    return size + -size % _ALIGN


# ------------------------------------------------------------------------------------------------------------- writing


def write(path: Path, header: Header, columns: Callable[[Field], Iterable[Array]]) -> bool:
    """Writes a file aside, puts it on the disk and gives it its name; False where there is already one of that name.

    columns: the rows of a field, in order, in parts of any size.
    """
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=ASIDE)
    try:
        with os.fdopen(handle, "wb") as file:
            _write(file, header, columns)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        return place(Path(aside), path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(aside)


def place(aside: Path, path: Path) -> bool:
    """Gives a finished file its name unless another has it already; says whether it did."""
    try:
        os.link(aside, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: the last of two that come at once stays, and both are whole
        if path.exists():
            return False
        os.replace(aside, path)
    return True


def _write(file: BinaryIO, header: Header, columns: Callable[[Field], Iterable[Array]]) -> None:
    text = header.to_bytes()
    file.write(_PREFIX.pack(MAGIC, len(text), zlib.crc32(text)) + text)
    out = _Summing(file)
    for field in header.fields:
        written = 0
        for part in columns(field):
            values = np.ascontiguousarray(part, dtype=field.dtype)
            out.write(values.reshape(-1).view(np.uint8).data)
            written += values.nbytes
        if written != header.rows * field.row_bytes:
            raise ValueError(f"{field.name}: {written} bytes for {header.rows} rows")
        out.write(memoryview(bytes(_aligned(written) - written)))
    table = np.array(out.finish(), dtype="<u4").tobytes()
    file.write(table + struct.pack("<I", zlib.crc32(table)))


class _Summing:
    """Writes bytes and sums up each chunk of them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sums: list[int] = []
        self._sum = self._filled = 0

    def write(self, data: memoryview) -> None:
        self._file.write(data)
        while len(data):
            part = data[: CHUNK - self._filled]
            self._sum = zlib.crc32(part, self._sum)
            self._filled += len(part)
            data = data[len(part) :]
            if self._filled == CHUNK:
                self._end()

    def _end(self) -> None:
        self._sums.append(self._sum)
        self._sum = self._filled = 0

    def finish(self) -> list[int]:
        if self._filled:
            self._end()
        return self._sums


# ------------------------------------------------------------------------------------------------------------- reading


class Block:
    """A file of a store, opened: header and size are checked at once, each MiB of data when it is first read.

    Raises MissingError, naming the file and what is wrong with it, FileNotFoundError where it is gone.
    """

    def __init__(self, path: Path, store: str, of: str) -> None:
        self.path = path
        self.bytes = os.stat(path).st_size
        with open(path, "rb") as file:
            prefix = file.read(_PREFIX.size)
            if len(prefix) < _PREFIX.size:
                raise self._damaged(f"truncated: {self.bytes:,} bytes, less than any such file has")
            magic, length, expected = _PREFIX.unpack(prefix)
            if magic != MAGIC:
                raise self._damaged("this is no file of a store of teacher outputs, or its first bytes are damaged")
            text = file.read(min(length, self.bytes))
        start = _PREFIX.size + length
        if zlib.crc32(text) != expected:
            cut = f"truncated: {self.bytes:,} of at least {start:,} bytes, or " if self.bytes < start else ""
            raise self._damaged(f"{cut}its header is damaged (checksum)")
        try:
            self.header = Header.from_bytes(text)
        except (ValueError, KeyError, TypeError):
            raise self._damaged("its header is none of this version of kdctl") from None
        self._check_identity(store, of)
        self._chunks = -(-self.header.data_bytes // CHUNK)
        self._check_size(start + self.header.data_bytes + 4 * self._chunks + 4)
        self._map = np.memmap(path, np.uint8, "r")
        self._data = self._map[start : start + self.header.data_bytes]
        table = self._map[start + self.header.data_bytes :]
        if zlib.crc32(table[:-4].data) != int(table[-4:].view("<u4")[0]):
            raise self._damaged("its table of checksums is damaged (checksum)")
        self._sums = table[:-4].view("<u4")
        self._offsets = self.header.offsets
        self.fields = {field.name: field for field in self.header.fields}
        self._sound = np.zeros(self._chunks, dtype=bool)
        self._all_sound = False

    @property
    def rows(self) -> int:
        return self.header.rows

    def column(self, name: str) -> Array:
        """A whole field (rows, ...), verified."""
        field = self.fields[name]
        start, size = self._offsets[name], self.rows * field.row_bytes
        if not self._all_sound and size:
            self._verify(np.arange(start // CHUNK, (start + size - 1) // CHUNK + 1))
        return self._column(field)

    def take(self, name: str, rows: NDArray[np.int64]) -> Array:
        """A field at these rows (n, ...), verified."""
        field = self.fields[name]
        size = field.row_bytes
        if not self._all_sound:
            first = (self._offsets[name] + rows * size) // CHUNK
            last = (self._offsets[name] + (rows + 1) * size - 1) // CHUNK
            steps = range(int((last - first).max(initial=0)) + 1)
            self._verify(np.concatenate([np.minimum(first + step, last) for step in steps]))
        return self._column(field)[rows]

    def verify(self) -> None:
        """Reads and checks every byte anew."""
        self._sound[:] = False
        self._all_sound = False
        self._verify(np.arange(self._chunks))

    def _column(self, field: Field) -> Array:
        start = self._offsets[field.name]
        values = self._data[start : start + self.rows * field.row_bytes].view(field.dtype)
        return values.reshape(self.rows, *field.shape)

    def _verify(self, chunks: NDArray[np.int64]) -> None:
        for chunk in np.unique(chunks[~self._sound[chunks]]):
            if zlib.crc32(self._data[chunk * CHUNK : (chunk + 1) * CHUNK].data) != int(self._sums[chunk]):
                raise self._damaged(f"chunk {chunk} of {self._chunks} is damaged (checksum)")
            self._sound[chunk] = True
        self._all_sound = bool(self._sound.all())

    def _check_identity(self, store: str, of: str) -> None:
        if self.header.store != store:
            raise self._damaged("it belongs to another store: its outputs are of another teacher, data or transform")
        if self.header.of != of:
            raise self._damaged(f"it holds {self.header.of}, and its name says {of}")

    def _check_size(self, expected: int) -> None:
        if self.bytes < expected:
            raise self._damaged(f"truncated: {self.bytes:,} of {expected:,} bytes")
        if self.bytes > expected:
            raise self._damaged(f"{self.bytes:,} bytes, where its header says {expected:,}")

    def _damaged(self, message: str) -> MissingError:
        return damaged(self.path, message)


def damaged(path: Path, message: str) -> MissingError:
    """The error of a file of a store that must not be used."""
    hint = "delete this file, or all with `kdctl cache clear CONFIG`: what is missing is asked of the teacher again"
    return MissingError(Problem(message, file=str(path), hint=hint))
