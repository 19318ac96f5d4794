"""CIFAR-10 and CIFAR-100 from their official python files, or from one npz of the same arrays."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from kdctl.config.types import PathStr
from kdctl.data import official
from kdctl.data.base import ArraySplit, Dataset, Source
from kdctl.data.npz import read_npz

_MD5 = {
    "cifar10": {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
    "cifar100": {
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    },
}
_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
_LABELS = {"cifar10": b"labels", "cifar100": b"fine_labels"}
_CLASSES = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
    "cifar100": """
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
        castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
        elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
        man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
        pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
        skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
        tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm""",
}


class Cifar(Source):
    """CIFAR: 50,000 training and 10,000 test images of 32x32 in colour (Krizhevsky, 2009).

    root: the folder with `cifar-10-batches-py` or `cifar-100-python` (or either of these itself), or with
    `cifar10.npz` or `cifar100.npz`: x_train, y_train, x_test, y_test, uint8 (N, 32, 32, 3).
    download: get the official files through torchvision when they are not there.
    """

    def __init__(
        self, *, root: PathStr = "data", download: bool = False, name: Literal["cifar10", "cifar100"] = "cifar10"
    ) -> None:
        self.root = Path(root).expanduser()
        self.download = download
        self.name = name

    def load(self) -> Dataset:
        archive = self.root / f"{self.name}.npz"
        if archive.is_file() and self._file(next(iter(_MD5[self.name]))) is None:
            return self._from_npz(archive)
        names = list(_MD5[self.name])
        if self.download and any(self._file(name) is None for name in names):
            official.download(self.name, self.root)
        parts = [self._part(name) for name in names]
        images, targets = torch.cat([p[0] for p in parts[:-1]]), torch.cat([p[1] for p in parts[:-1]])
        return Dataset(ArraySplit(images, targets), test=ArraySplit(*parts[-1]), class_names=self._class_names())

    def _class_names(self) -> list[str]:
        return _CLASSES[self.name].split()

    def _file(self, name: str) -> Path | None:
        return official.find(self.root, (_FOLDERS[self.name], "."), (name,))

    def _part(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        path = self._file(name)
        if path is None:
            raise official.absent(self.name, self.root, f"{_FOLDERS[self.name]}/{name}")
        content = read_pickle(path, official.read_checked(path, _MD5[self.name][name]))
        data, labels = content.get(b"data"), content.get(_LABELS[self.name])
        if not isinstance(data, np.ndarray) or not isinstance(labels, list) or data.shape != (len(labels), 3072):
            official.damaged(path, "holds no images of 3x32x32 with as many labels")
        images = torch.from_numpy(data.reshape(-1, 3, 32, 32).copy())
        return images, torch.tensor(labels, dtype=torch.int64)

    def _from_npz(self, archive: Path) -> Dataset:
        dataset = read_npz(archive, layout="nhwc", class_names=self._class_names())
        if dataset.input_shape != (3, 32, 32):
            official.damaged(archive, f"its images have shape {dataset.input_shape}, expected (3, 32, 32)")
        return dataset


class _PickledArray:
    """What a pickled numpy array comes to here: nothing of numpy is called until its state has been checked."""

    array: np.ndarray

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        if isinstance(content, str):  # Python 2 wrote bytes as text
            content = content.encode("latin1")
        if fortran or kind.name not in ("u1", b"u1") or int(np.prod(shape)) != len(content):
            raise pickle.UnpicklingError("an array that is not uint8 in C order")
        self.array = np.frombuffer(content, np.uint8).reshape(shape)


class _PickledType:
    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like: a byte has none."""


def _pickled_array(*_: Any) -> _PickledArray:
    return _PickledArray()


class _ArrayUnpickler(pickle.Unpickler):
    """Builds built-in containers, text, numbers and uint8 arrays; any other name in the pickle is refused."""

    _allowed = {
        ("numpy.core.multiarray", "_reconstruct"): _pickled_array,
        ("numpy._core.multiarray", "_reconstruct"): _pickled_array,
        ("numpy", "ndarray"): _PickledArray,
        ("numpy", "dtype"): _PickledType,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None


def read_pickle(path: Path, content: bytes) -> dict[bytes, Any]:
    """The dictionary in a CIFAR file, with arrays as numpy's; no code named in the file is ever run."""
    try:
        value = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        if not isinstance(value, dict):
            raise pickle.UnpicklingError("it holds no dictionary")
    except Exception as error:  # whatever a damaged stream of opcodes can raise
        official.damaged(path, f"not a CIFAR file: {error}")
    return {k: v.array if isinstance(v, _PickledArray) else v for k, v in value.items()}
