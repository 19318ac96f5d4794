"""What a data source gives: a Dataset of Splits.

A source is a Source with keyword-only arguments and `load() -> Dataset`. A user's own, named in YAML as
`kind: ./my_data.py:MyData`, is the same:

    class MyData(Source):
        def __init__(self, *, path: str) -> None:
            self.path = path

        def load(self) -> Dataset:
            train = ArraySplit(images, targets)          # uint8 (N, C, H, W) and int64 (N,), or
            test = ItemSplit(decode, targets, (3, 64, 64), stamp="v1")   # decode(i) -> uint8 (C, H, W), in workers
            return Dataset(train, test=test, class_names=["cat", "dog"])

A torch data set of (image, label) pairs in memory becomes a split by `split_from_pairs`.
Shapes: N samples, C channels, H x W pixels. Images are uint8, 0..255. Texts are token numbers: data/tokens.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdctl.errors import ConfigError
from kdctl.signals import IGNORE

Shape = tuple[int, ...]
"""(C, H, W) of images, (L,) of texts of at most L tokens."""
_STATISTICS_SAMPLES = 512


@dataclass
class Posed:
    """Samples as a model is asked about them. targets: what it should answer. keep: as of Batch."""

    inputs: Tensor
    targets: Tensor
    keep: Tensor | None = None


class Split:
    """Samples with their targets; what their inputs are is the subclass's: images, or token numbers.

    targets: of each sample its class, int64 (N,), or which of C classes it has, int64 (N, C) of 0 and 1, both IGNORE
    where there is no label; or a number, float32 (N,), NaN where there is none. index: int64 (N,), each sample's
    number: what its augmentation and stored teacher outputs are keyed by. head: what a model answers for: "sample",
    or, of texts, "token", "vocabulary": which token stands at each place, or "embedding":
    a vector of each, which targets only measure.
    """

    targets: Tensor
    index: Tensor
    head: str = "sample"
    drawn: bool = False
    """Whether what is asked about is drawn, other parts in each view."""

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def input_shape(self) -> Shape:
        """The shape of an input."""
        raise NotImplementedError

    def fetch(self, rows: Tensor) -> Tensor:
        """The inputs at these rows: uint8 images (n, C, H, W), or int64 token numbers (n, l), padded to one length."""
        raise NotImplementedError

    def subset(self, rows: Tensor) -> Split:
        """The samples at these rows, with the numbers they had."""
        raise NotImplementedError

    def labelled(self, targets: Tensor, index: Tensor | None = None) -> Split:
        """The same inputs with other targets, and other numbers where given."""
        raise NotImplementedError

    @property
    def strata(self) -> Tensor:
        """int64 (N,): the class in whose proportion samples are drawn, IGNORE for those without a label.

        All labelled samples are of one where their targets are no classes.
        """
        if self.targets.ndim == 1 and not self.targets.is_floating_point():
            return self.targets
        return torch.where(has_label(self.targets), 0, IGNORE)

    @property
    def has_labels(self) -> bool:
        """Whether any sample has a label."""
        return bool((self.strata != IGNORE).any())

    def posed(self, rows: Tensor, inputs: Tensor, view: Tensor) -> Posed:
        """The samples at these rows, with their inputs (n, ...) and views (n,), as a model is asked about them."""
        return Posed(inputs, self.targets[rows])

    def fingerprint(self) -> str:
        """SHA-256 over inputs and targets."""
        raise NotImplementedError

    def extra(self, inputs: Tensor) -> dict[str, Tensor]:
        """What a batch says of its inputs beside them, such as which tokens are padding."""
        return {}

    def clean_order(self) -> Tensor:
        """All rows in the order in which they are measured fastest."""
        return torch.arange(len(self))

    def arranged(self, rows: Tensor, batch_size: int, key: int) -> Tensor:
        """An epoch's rows, which stand in a random order, as they are best shown in batches of this size."""
        return rows


class ArraySplit(Split):
    """Samples in memory. images: uint8 (N, C, H, W); targets: int64 (N,), IGNORE where there is no label.

    index: (N,) int64, each sample's number: what its augmentation and stored teacher outputs are keyed by; its
    position when left out. Raises ConfigError for other shapes or types.
    """

    def __init__(self, images: Tensor, targets: Tensor, index: Tensor | None = None) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ConfigError(f"images must be uint8 of shape (N, C, H, W); got {_described(images)}")
        check_targets(targets, len(images))
        self.images = images
        self.targets = targets
        self.index = torch.arange(len(images)) if index is None else index

    @property
    def input_shape(self) -> Shape:
        return tuple(self.images.shape[1:])

    def fetch(self, rows: Tensor) -> Tensor:
        """The images at these rows: uint8 (n, C, H, W)."""
        return self.images.index_select(0, rows)

    def to(self, device: torch.device) -> ArraySplit:
        """The same samples on a device."""
        return ArraySplit(self.images.to(device), self.targets.to(device), self.index.to(device))

    def subset(self, rows: Tensor) -> ArraySplit:
        """The samples at these rows, with the numbers they had."""
        return ArraySplit(self.images[rows], self.targets[rows], self.index[rows])

    def labelled(self, targets: Tensor, index: Tensor | None = None) -> ArraySplit:
        """The same images with other targets, and other numbers where given."""
        return ArraySplit(self.images, targets, self.index if index is None else index)

    @classmethod
    def together(cls, splits: list[ArraySplit]) -> ArraySplit:
        """One after the other, numbered anew."""
        return cls(torch.cat([s.images for s in splits]), torch.cat([s.targets for s in splits]))

    def fingerprint(self) -> str:
        """SHA-256 over pixels and targets."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(np.ascontiguousarray(self.images.numpy()).data)
        digest.update(np.ascontiguousarray(self.targets.numpy()).data)
        return digest.hexdigest()


class ItemSplit(Split):
    """Samples decoded on demand, in worker processes where there are some.

    decode: item number -> uint8 (C, H, W), all of `input_shape`; can be pickled. targets, index: as of ArraySplit.
    items: (N,) int64, what decode is called with; positions when left out. stamp: a text that changes whenever the
    images do (names, sizes and times of the files).
    """

    def __init__(
        self,
        decode: Callable[[int], Tensor],
        targets: Tensor,
        input_shape: Shape,
        *,
        stamp: str,
        items: Tensor | None = None,
        index: Tensor | None = None,
    ) -> None:
        check_targets(targets, len(targets))
        self.decode = decode
        self.targets = targets
        self._shape = input_shape
        self.stamp = stamp
        self.items = torch.arange(len(targets)) if items is None else items
        self.index = torch.arange(len(targets)) if index is None else index

    @property
    def input_shape(self) -> Shape:
        return self._shape

    def fetch(self, rows: Tensor) -> Tensor:
        """The images at these rows, decoded: uint8 (n, C, H, W). Raises ConfigError where one has another shape."""
        images = []
        for item in self.items[rows].tolist():
            image = self.decode(item)
            if image.dtype != torch.uint8 or tuple(image.shape) != tuple(self.input_shape):
                raise ConfigError(f"item {item} is {_described(image)}; expected uint8 of shape {self.input_shape}")
            images.append(image)
        return torch.stack(images)

    def subset(self, rows: Tensor) -> ItemSplit:
        """The samples at these rows, with the numbers they had."""
        return self._with(self.targets[rows], self.items[rows], self.index[rows])

    def labelled(self, targets: Tensor, index: Tensor | None = None) -> ItemSplit:
        """The same images with other targets, and other numbers where given."""
        return self._with(targets, self.items, self.index if index is None else index)

    def _with(self, targets: Tensor, items: Tensor, index: Tensor) -> ItemSplit:
        return ItemSplit(self.decode, targets, self.input_shape, stamp=self.stamp, items=items, index=index)

    def fingerprint(self) -> str:
        """SHA-256 over the stamp, the items and the targets."""
        digest = hashlib.sha256(f"{self.input_shape} {self.stamp}".encode())
        digest.update(np.ascontiguousarray(self.items.numpy()).data)
        digest.update(np.ascontiguousarray(self.targets.numpy()).data)
        return digest.hexdigest()


@dataclass
class Dataset:
    """A source's splits and what is known of them.

    class_names: one for each class, in the order of the targets. mean, std: of each channel of the train split's
    images, on the scale [0, 1]; measured when left out (an ItemSplit's from 512 of its images, evenly spaced).
    Raises ConfigError where splits disagree in input shape, a target is no class, or there is nothing to train on.
    """

    train: Split
    val: Split | None = None
    test: Split | None = None
    class_names: list[str] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    tokenizer: str | None = None
    """Of texts: the content of the tokenizer's file."""

    def __post_init__(self) -> None:
        if not self.class_names and self.train.head != "embedding":
            raise ConfigError("the data set names no classes")
        for name, split in self.splits():
            _check_split(name, split, self.input_shape, len(self.class_names))
        if len(self.input_shape) == 3 and not (self.mean and self.std):
            self.mean, self.std = statistics(self.train)

    @property
    def input_shape(self) -> Shape:
        return self.train.input_shape

    def splits(self) -> list[tuple[str, Split]]:
        """(name, split) of those that are there."""
        named = (("train", self.train), ("val", self.val), ("test", self.test))
        return [(name, split) for name, split in named if split is not None]


class Source:
    """Where a data set comes from."""

    def load(self) -> Dataset:
        """Reads the data set. Raises MissingError where it is not there or damaged, ConfigError where it is wrong."""
        raise NotImplementedError


def split_from_pairs(pairs: Iterable[tuple[Any, int]]) -> ArraySplit:
    """A split in memory from (image, label) pairs, such as a torch data set's items.

    An image is a PIL image, a uint8 array (H, W) or (H, W, C), or a uint8 tensor (C, H, W); all of one shape.
    """
    images, targets = [], []
    for image, label in pairs:
        if not isinstance(image, Tensor):
            array = np.array(image)
            image = torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())
        images.append(image)
        targets.append(int(label))
    if len({image.shape for image in images}) != 1:
        raise ConfigError("images must all have one shape; decode and resize them in an ItemSplit")
    return ArraySplit(torch.stack(images), torch.tensor(targets))


def statistics(split: Split) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over all pixels, on the scale [0, 1].

    A channel without any variation has the deviation 1, so that dividing by it is harmless.
    """
    rows = torch.arange(len(split))
    if isinstance(split, ItemSplit) and len(split) > _STATISTICS_SAMPLES:
        rows = torch.linspace(0, len(split) - 1, _STATISTICS_SAMPLES, dtype=torch.float64).long()
    histogram = torch.zeros(split.input_shape[0], 256, dtype=torch.int64)
    for part in rows.split(256):
        pixels = split.fetch(part).transpose(0, 1).flatten(1)
        histogram += torch.stack([torch.bincount(channel, minlength=256) for channel in pixels])
    values = torch.arange(256)
    count = len(rows) * split.input_shape[1] * split.input_shape[2]
    mean = (histogram * values).sum(1).double() / count
    std = ((histogram * values.square()).sum(1).double() / count - mean.square()).clamp_min(0).sqrt()
    std[std == 0] = 255.0
    return (mean / 255).tolist(), (std / 255).tolist()


class _Joined:
    """decode() over several splits, one after the other."""

    def __init__(self, splits: list[Split]) -> None:
        self._splits = splits
        self._starts = np.cumsum([0] + [len(s) for s in splits]).tolist()

    def __call__(self, item: int) -> Tensor:
        which = int(np.searchsorted(self._starts, item, side="right")) - 1
        return self._splits[which].fetch(torch.tensor([item - self._starts[which]]))[0]


def joined(splits: list[Split]) -> Split:
    """One split of several with equal input shapes, numbered anew from 0; in memory where all of them are."""
    if len(splits) == 1:
        return splits[0]
    together = getattr(type(splits[0]), "together", None)
    if together is not None and all(type(split) is type(splits[0]) for split in splits):
        return together(splits)
    targets = torch.cat([s.targets for s in splits])
    stamp = " ".join(s.fingerprint() for s in splits)
    return ItemSplit(_Joined(splits), targets, splits[0].input_shape, stamp=stamp)


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def check_targets(targets: Tensor, count: int) -> None:
    """Raises ConfigError for targets that are neither int64 (count,) or (count, C) nor float32 (count,)."""
    shapes = {torch.int64: (1, 2), torch.float32: (1,)}
    if len(targets) != count or targets.ndim not in shapes.get(targets.dtype, ()):
        allowed = f"int64 of shape ({count},) or ({count}, classes), or float32 of shape ({count},)"
        raise ConfigError(f"targets must be {allowed}; got {_described(targets)}")


def has_label(targets: Tensor) -> Tensor:
    """(N,) bool: which of some targets, of any kind that Split names, are there."""
    if targets.is_floating_point():
        return ~targets.isnan()
    return (targets if targets.ndim == 1 else targets[:, 0]) != IGNORE


def without_labels(targets: Tensor) -> Tensor:
    """Targets of the same kind of which none is there."""
    return torch.full_like(targets, float("nan") if targets.is_floating_point() else IGNORE)


def _check_split(name: str, split: Any, shape: Shape, num_classes: int) -> None:
    if not isinstance(split, Split):
        message = f"the {name} split must be an ArraySplit, an ItemSplit or a TokenSplit; got {type(split).__name__}"
        raise ConfigError(message)
    if len(split) == 0:
        raise ConfigError(f"the {name} split has no samples")
    if tuple(split.input_shape) != tuple(shape):
        raise ConfigError(f"inputs of the {name} split have shape {split.input_shape}, those of train {shape}")
    targets = split.targets
    if targets.ndim == 2 and targets.shape[1] != num_classes:
        raise ConfigError(f"the {name} split has targets of {targets.shape[1]} classes, and there are {num_classes}")
    if targets.is_floating_point() or split.head not in ("sample", "embedding"):
        return
    largest = num_classes - 1 if targets.ndim == 1 else 1
    known = targets != IGNORE
    if targets.ndim == 2 and (known.any(1) != known.all(1)).any():
        row = int((known.any(1) != known.all(1)).nonzero()[0])
        message = f"sample {row} of the {name} split has labels of some classes alone"
        raise ConfigError(f"{message}; allowed: of all, or {IGNORE} for all")
    wrong = targets[((targets < 0) & (targets != IGNORE)) | (targets > largest)]
    if len(wrong):
        raise ConfigError(
            f"the {name} split has the target {int(wrong[0])}; allowed: 0..{largest}, {IGNORE} for no label"
        )
