"""A user's arrays in one .npz file."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import torch

from kdctl.config.types import PathStr
from kdctl.data.base import ArraySplit, Dataset, Source
from kdctl.errors import ConfigError, MissingError, Problem
from kdctl.signals import IGNORE

Layout = Literal["auto", "nhwc", "nchw", "nhw"]


class Npz(Source):
    """Arrays in one .npz file: x_train, y_train, and x_val, y_val, x_test, y_test where there are such splits.

    Images are uint8: (N, H, W), (N, H, W, C) or (N, C, H, W); `layout: auto` tells them apart by the axis that has 1
    or 3 entries. Targets are whole numbers (N,), -100 where a sample has no label. Names of classes: `class_names`,
    or the array `class_names` in the file, or "0", "1", ... up to the largest target.
    """

    def __init__(
        self,
        *,
        path: PathStr,
        layout: Literal["auto", "nhwc", "nchw", "nhw"] = "auto",
        class_names: list[str] | None = None,
    ) -> None:
        self.path = Path(path).expanduser()
        self.layout: Layout = layout
        self.class_names = class_names

    def load(self) -> Dataset:
        return read_npz(self.path, self.layout, self.class_names)


def read_npz(path: Path, layout: Layout = "auto", class_names: list[str] | None = None) -> Dataset:
    """The data set in an .npz file; nothing in it is unpickled.

    Raises MissingError where the file is not there, ConfigError naming the file and the array that is wrong.
    """
    arrays = _read_arrays(path)
    if "x_train" not in arrays or "y_train" not in arrays:
        _wrong(path, f"needs the arrays x_train and y_train; it has {', '.join(sorted(arrays)) or 'none'}")
    there = [name for name in ("train", "val", "test") if {f"x_{name}", f"y_{name}"} & arrays.keys()]
    splits = {name: _split(path, arrays, name, layout) for name in there}
    names = class_names or [_text(name) for name in arrays.get("class_names", [])]
    if not names:
        largest = max((int(split.targets.max()) for split in splits.values() if len(split)), default=0)
        names = [str(number) for number in range(largest + 1)]
    try:
        return Dataset(splits["train"], val=splits.get("val"), test=splits.get("test"), class_names=names)
    except ConfigError as error:
        _wrong(path, error.problems[0].message)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise MissingError(Problem(f"there is no file {path}", key="data.path"))
    wanted = {f"{letter}_{split}" for letter in "xy" for split in ("train", "val", "test")} | {"class_names"}
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            _wrong(path, "is a single array, not an .npz of several")
        with file:
            return {name: file[name] for name in file.files if name in wanted}
    except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        _wrong(path, f"cannot be read as .npz: {error}")


def _split(path: Path, arrays: dict[str, np.ndarray], name: str, layout: Layout) -> ArraySplit:
    x, y = f"x_{name}", f"y_{name}"
    if x not in arrays or y not in arrays:
        _wrong(path, f"has one of {x} and {y} without the other")
    images, targets = arrays[x], arrays[y]
    if images.dtype != np.uint8:
        _wrong(path, f"{x} is {images.dtype}; images must be uint8, 0..255")
    if targets.dtype.kind not in "iu":
        _wrong(path, f"{y} is {targets.dtype}; targets must be whole numbers, {IGNORE} for no label")
    if targets.shape not in ((len(images),), (len(images), 1)):
        _wrong(path, f"{y} has shape {targets.shape}, but {x} has {len(images)} images")
    pixels = np.ascontiguousarray(_channels_first(path, x, images, layout))
    return ArraySplit(torch.from_numpy(pixels), torch.from_numpy(targets.reshape(-1).astype(np.int64)))


def _channels_first(path: Path, name: str, images: np.ndarray, layout: Layout) -> np.ndarray:
    if images.ndim not in (3, 4) or (layout != "auto" and images.ndim != len(layout)):
        expected = "(N, H, W), (N, H, W, C) or (N, C, H, W)" if layout == "auto" else str(tuple(layout.upper()))
        _wrong(path, f"{name} has shape {images.shape}; expected {expected}")
    if images.ndim == 3:
        return images[:, None]
    if layout == "auto":
        last, first = images.shape[3] in (1, 3), images.shape[1] in (1, 3)
        if last == first:
            _wrong(path, f"{name} has shape {images.shape}: which axis is the channels?", "say layout: nhwc or nchw")
        layout = "nhwc" if last else "nchw"
    return images.transpose(0, 3, 1, 2) if layout == "nhwc" else images


def _text(name: np.generic) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def _wrong(path: Path, message: str, hint: str | None = None) -> NoReturn:
    raise ConfigError(Problem(message, file=str(path), hint=hint))
