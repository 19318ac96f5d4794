"""MNIST and Fashion-MNIST from their official IDX files, compressed or not."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from kdctl.config.types import PathStr
from kdctl.data import official
from kdctl.data.base import ArraySplit, Dataset, Source

_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_MD5 = {
    "mnist": {
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "fashion_mnist": {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
}
_FOLDERS = {"mnist": "MNIST/raw", "fashion_mnist": "FashionMNIST/raw"}
_CLASSES = {
    "mnist": "0 1 2 3 4 5 6 7 8 9",
    "fashion_mnist": "t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle_boot",
}
_LARGEST = 1 << 28
"""Bytes that an IDX file may unpack to: five times the official ones."""


class Mnist(Source):
    """MNIST (LeCun et al., 1998) and Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017): 28x28 grey, 10 classes.

    root: the folder with the four IDX files, as such or `.gz`, or with torchvision's `MNIST/raw`.
    download: get the official files through torchvision when they are not there.
    """

    def __init__(
        self, *, root: PathStr = "data", download: bool = False, name: Literal["mnist", "fashion_mnist"] = "mnist"
    ) -> None:
        self.root = Path(root).expanduser()
        self.download = download
        self.name = name

    def load(self) -> Dataset:
        if self.download and any(self._file(name) is None for name in _FILES):
            official.download(self.name, self.root)
        train_images, train_labels, test_images, test_labels = (self._read(name) for name in _FILES)
        return Dataset(
            self._split(train_images, train_labels),
            test=self._split(test_images, test_labels),
            class_names=_CLASSES[self.name].split(),
        )

    def _file(self, name: str) -> Path | None:
        return official.find(self.root, (_FOLDERS[self.name], "raw", "."), (name, f"{name}.gz"))

    def _read(self, name: str) -> np.ndarray:
        path = self._file(name)
        if path is None:
            raise official.absent(self.name, self.root, f"{name} or {name}.gz")
        content = official.read_checked(path, _MD5[self.name].get(path.name))
        return read_idx(path, content, dimensions=3 if "idx3" in name else 1)

    def _split(self, images: np.ndarray, labels: np.ndarray) -> ArraySplit:
        if len(images) != len(labels):
            official.damaged(self.root, f"{len(images)} images but {len(labels)} labels")
        return ArraySplit(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels.astype(np.int64)))


def read_idx(path: Path, content: bytes, dimensions: int) -> np.ndarray:
    """The uint8 array in an IDX file, unpacked where its name ends in .gz.

    Layout: two zero bytes, the type (8: uint8), the number of dimensions, each size as a big-endian uint32, the data.
    """
    if path.suffix == ".gz":
        try:
            with gzip.open(path) as file:
                content = file.read(_LARGEST)
        except (OSError, EOFError, zlib.error) as error:
            official.damaged(path, f"not a gzip file: {error}")
    start = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) < start:
        official.damaged(path, f"not an IDX file of {dimensions} dimension(s) of bytes")
    shape = [int(size) for size in np.frombuffer(content, ">u4", dimensions, 4)]
    if len(content) - start != int(np.prod(shape, dtype=object)):
        official.damaged(path, f"its header says {shape}, but {len(content) - start} bytes follow")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()
