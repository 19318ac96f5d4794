"""Loaders: every sample once an epoch, whatever the workers, from whatever step."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kdctl.data.augment import Augment
from kdctl.data.base import ArraySplit, ItemSplit, Split
from kdctl.data.image_folder import ImageFolder
from kdctl.data.loader import TrainLoader, clean_batches, num_workers
from kdctl.data.rand_augment import RandAugment
from kdctl.data.spatial import HorizontalFlip, RandomCrop, RandomResizedCrop
from kdctl.errors import ConfigError, KdctlError, Problem
from kdctl.signals import IGNORE, Batch


def arrays(count: int = 50) -> ArraySplit:
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ArraySplit(images, torch.arange(count) % 4, torch.arange(count) * 3)


class Decode:
    """Items out of a tensor; item 13 is broken where asked, item 17 kills its process."""

    def __init__(self, images: Tensor, broken: bool = False, deadly: bool = False) -> None:
        self.images, self.broken, self.deadly = images, broken, deadly

    def __call__(self, item: int) -> Tensor:
        if self.broken and item == 13:
            raise KdctlError(Problem("cannot be read", file="x/13.png"))
        if self.deadly and item == 17:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.images[item]


def items(count: int = 50, **faults: bool) -> ItemSplit:
    split = arrays(count)
    return ItemSplit(Decode(split.images, **faults), split.targets, (3, 8, 8), stamp="", index=split.index)


def loader(split: Split, batch_size: int = 8, **settings: object) -> TrainLoader:
    chain = Augment([RandomCrop(padding=1), HorizontalFlip(), RandAugment()], seed=5)
    return TrainLoader(split, batch_size=batch_size, augment=chain, **settings)  # type: ignore[arg-type]


def same(one: list[Batch], other: list[Batch]) -> bool:
    def equal(a: Batch, b: Batch) -> bool:
        pairs = ((a.inputs, b.inputs), (a.targets, b.targets), (a.index, b.index), (a.view, b.view))
        return all(x.equal(y) for x, y in pairs)

    return len(one) == len(other) > 0 and all(equal(a, b) for a, b in zip(one, other, strict=True))


def test_every_sample_once_an_epoch_with_its_label() -> None:
    split = arrays()
    for batch_size in (1, 7, 8, 49, 50, 64):
        seen = torch.cat([b.index for b in loader(split, batch_size).epoch(0)])
        assert seen.sort().values.equal(split.index)
    batches = list(loader(split).epoch(2))
    assert all(b.targets.equal(b.index // 3 % 4) for b in batches)
    assert all(b.view.unique().tolist() == [2] for b in batches)
    first = batches[0].inputs
    assert first.dtype == torch.float32 and first.is_contiguous() and 0 <= first.min() and first.max() <= 1


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(16, 8, [8, 8]), (17, 8, [8, 9]), (18, 8, [8, 8, 2]), (1, 8, [1]), (3, 1, [1, 1, 1]), (7, 8, [7]), (9, 8, [9])],
)
def test_a_last_batch_of_one_is_joined(count: int, batch_size: int, sizes: list[int]) -> None:
    batches = loader(arrays(count), batch_size)
    assert [b.size for b in batches.epoch(0)] == sizes and len(batches) == len(sizes)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    split = arrays()
    base = loader(split, order_seed=1)
    assert base.order(3).equal(loader(split, order_seed=1).order(3))
    assert not base.order(3).equal(base.order(4))
    assert not base.order(3).equal(loader(split, order_seed=2).order(3))


def test_pixels_do_not_depend_on_order_or_batch_size() -> None:
    split = arrays()

    def by_index(batches: TrainLoader) -> Tensor:
        taken = list(batches.epoch(1))
        order = torch.cat([b.index for b in taken]).argsort()
        return torch.cat([b.inputs for b in taken])[order]

    base = by_index(loader(split, 8, order_seed=0))
    assert base.equal(by_index(loader(split, 13, order_seed=9)))
    assert base[10:20].equal(by_index(loader(split.subset(torch.arange(10, 20)), 4)))


@pytest.mark.parametrize("make", [arrays, items])
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_start_change_nothing(make: type, workers: int) -> None:
    reference = list(loader(arrays()).epoch(1))
    batches = loader(make(), workers=workers)
    assert same(list(batches.epoch(1)), reference)
    assert same(list(batches.epoch(1, start_step=4)), reference[4:])
    assert list(batches.epoch(1, start_step=len(batches))) == []


def test_image_folder_with_workers(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for i in range(10):
        path = tmp_path / "train" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    split = ImageFolder(root=str(tmp_path), size=16).load().train
    runs = [list(loader(split, 4, workers=workers).epoch(0)) for workers in (0, 2)]
    assert same(runs[0], runs[1])
    measured = [list(clean_batches(split, batch_size=4, workers=workers)) for workers in (0, 2)]
    assert same(measured[0], measured[1])


def test_a_broken_item_is_reported_in_its_own_words() -> None:
    for workers in (0, 2):
        with pytest.raises(KdctlError) as caught:
            list(loader(items(broken=True), workers=workers).epoch(0))
        assert str(caught.value) == "x/13.png: cannot be read"


def test_a_dead_worker_is_an_error_with_advice() -> None:
    with pytest.raises(KdctlError, match=r"a decoding process failed.*workers=0"):
        list(loader(items(deadly=True), workers=2).epoch(0))


def test_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_workers("auto", arrays()) == num_workers(3, arrays()) == 0
    assert num_workers(3, items()) == 3
    for cores, beside_math, beside_gpu in ((1, 0, 0), (2, 0, 1), (4, 1, 3), (16, 4, 8), (64, 8, 8)):
        monkeypatch.setattr("kdctl.data.loader.usable_cores", lambda c=cores: c)
        assert num_workers("auto", items(), "cpu") == beside_math
        assert num_workers("auto", items(), "cuda") == beside_gpu


def test_views() -> None:
    split = arrays()

    def seen(views: object, epochs: int) -> Tensor:
        chain = Augment([RandomCrop(padding=1), HorizontalFlip()])
        batches = TrainLoader(split, batch_size=8, augment=chain, views=views)  # type: ignore[arg-type]
        return torch.cat([b.view for e in range(epochs) for b in batches.epoch(e)])

    assert seen("fresh", 4).unique().tolist() == [0, 1, 2, 3]
    assert seen(3, 4).unique().tolist() == [0, 1, 2]
    assert torch.bincount(seen("all", 18)).tolist() == [50] * 18
    first = [next(iter(loader(split, views=2).epoch(epoch))) for epoch in (0, 2)]
    order = [batch.index.argsort() for batch in first]
    shared = np.intersect1d(first[0].index, first[1].index)
    rows = [[int((b.index == i).nonzero()) for i in shared] for b in first]
    assert len(order) and first[0].inputs[rows[0]].equal(first[1].inputs[rows[1]])


def test_views_without_augmentation_are_the_clean_images() -> None:
    split = arrays()
    for views in ("fresh", "all", 3):
        batches = TrainLoader(split, batch_size=50, views=views)  # type: ignore[arg-type]
        batch = next(iter(batches.epoch(0)))
        assert batch.inputs.equal(split.images[batches.order(0)].float() / 255)


def test_loader_refuses_what_cannot_be() -> None:
    with pytest.raises(ConfigError, match="finitely many"):
        TrainLoader(arrays(), batch_size=8, augment=Augment([RandomResizedCrop()]), views="all")
    with pytest.raises(ConfigError, match="does not fit"):
        TrainLoader(arrays(), batch_size=8, augment=Augment([RandomCrop(padding=0, size=9)]))


def test_augmented_size_is_known() -> None:
    batches = TrainLoader(arrays(), batch_size=8, augment=Augment([RandomResizedCrop(size=5)]))
    assert batches.input_shape == (3, 5, 5)
    assert next(iter(batches.epoch(0))).inputs.shape == (8, 3, 5, 5)


def test_clean_batches_are_in_order_and_clean() -> None:
    split = arrays(20).labelled(torch.full((20,), IGNORE))
    batches = list(clean_batches(split, batch_size=8))
    assert [b.size for b in batches] == [8, 8, 4]
    assert torch.cat([b.index for b in batches]).equal(split.index)
    assert torch.cat([b.inputs for b in batches]).equal(split.images.float() / 255)
    assert all(bool((b.view == -1).all() and (b.targets == IGNORE).all()) for b in batches)
