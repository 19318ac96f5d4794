"""Preparing data: exact strata, samples that keep their numbers, labels withheld, transfer data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdctl.config.schema import Component, DataSpec, StageData
from kdctl.data.base import ArraySplit, ItemSplit
from kdctl.data.prepare import Data, prepare, stratified
from kdctl.errors import ConfigError, MissingError
from kdctl.signals import IGNORE

PER_CLASS = [40, 40, 20, 100]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    """200 images whose pixels spell their position, and a test split."""
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(4), PER_CLASS))
    x = np.zeros((200, 2, 3), np.uint8)
    x[:] = np.arange(200)[:, None, None]
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, x_train=x, y_train=y, x_test=x[:8], y_test=y[:8])
    return str(path)


def prepared(archive: str, **settings: Any) -> Data:
    return prepare(DataSpec(kind="npz", path=archive, **settings))  # type: ignore[call-arg]


def counts(targets: torch.Tensor) -> list[int]:
    return torch.bincount(targets[targets != IGNORE], minlength=4).tolist()


def content(split: Any) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


def test_validation_is_carved_by_class(archive: str) -> None:
    data = prepared(archive, val_fraction=0.1)
    assert data.val is not None and data.test is not None
    assert counts(data.val.targets) == [4, 4, 2, 10]
    assert counts(data.train.targets) == [36, 36, 18, 90]
    assert sorted(content(data.val) + content(data.train)) == list(range(200))
    assert data.val.index.tolist() == list(range(20)) and data.train.index.tolist() == list(range(180))
    assert content(data.val) == content(prepared(archive, val_fraction=0.1).val)
    assert content(data.val) != content(prepared(archive, val_fraction=0.1, split_seed=1).val)


def test_no_validation(archive: str) -> None:
    data = prepared(archive, val_fraction=0.0)
    assert data.val is None and len(data.train) == 200
    with pytest.raises(MissingError, match="no split 'val'; there are: train, test"):
        data.split("val")
    assert data.split("test") is data.test
    with pytest.raises(ConfigError, match="leaves nothing"):
        prepared(archive, val_fraction=0.001)


def test_a_source_that_has_validation_keeps_it(tmp_path: Path) -> None:
    x, y = np.zeros((4, 2, 2), np.uint8), np.array([0, 1, 0, 1])
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_val=x[:2], y_val=y[:2])
    data = prepared(str(tmp_path / "a.npz"), val_fraction=0.5)
    assert len(data.train) == 4 and data.val is not None and len(data.val) == 2


def test_limit_is_by_class_and_keeps_numbers(archive: str) -> None:
    whole = prepared(archive, val_fraction=0.0)
    data = whole.for_stage(StageData(limit=20))
    assert counts(data.train.targets) == [4, 4, 2, 10] and data.index_size == 200
    assert content(data.train) == data.train.index.tolist(), "pixels spell the number"
    larger = whole.for_stage(StageData(limit=33))
    assert set(content(data.train)) < set(content(larger.train)) and len(larger.train) == 33
    assert len(whole.for_stage(StageData(limit=500)).train) == 200


def test_labels_are_withheld_by_class(archive: str) -> None:
    data = prepared(archive, val_fraction=0.0, labels_per_class=5)
    assert data.class_counts() == [5, 5, 5, 5] and len(data.train) == 200
    everything = data.for_stage(StageData(labels_per_class="all"))
    assert everything.class_counts() == PER_CLASS
    assert everything.train.index.equal(data.train.index) and content(everything.train) == content(data.train)
    kept = data.train.targets != IGNORE
    assert data.train.targets[kept].equal(everything.train.targets[kept])
    more = data.for_stage(StageData(labels_per_class=30))
    assert more.class_counts() == [30, 30, 20, 30]
    assert bool((more.train.targets != IGNORE)[kept].all()), "more labels contain fewer"
    other = prepared(archive, val_fraction=0.0, labels_per_class=5, split_seed=1)
    assert not other.train.targets.equal(data.train.targets)


def test_labels_within_a_limit(archive: str) -> None:
    data = prepared(archive, val_fraction=0.0, labels_per_class=5, limit=40)
    assert len(data.train) == 40 and data.class_counts() == [5, 5, 4, 5]
    stage = data.for_stage(StageData())
    assert stage.train.targets.equal(data.train.targets), "a stage that sets nothing has the experiment's"


def test_more_labels_than_there_are(archive: str) -> None:
    with pytest.raises(ConfigError, match="got 101, but the largest class has 100") as caught:
        prepared(archive, val_fraction=0.0, labels_per_class=101)
    assert caught.value.problems[0].key == "data.labels_per_class"


def test_transfer_is_appended_without_labels(archive: str) -> None:
    transfer = [Component(kind="npz", path=archive)]  # type: ignore[call-arg]
    data = prepared(archive, val_fraction=0.1, transfer=transfer)
    assert len(data.train) == 380 and data.train.index.tolist() == list(range(380))
    assert counts(data.train.targets) == [36, 36, 18, 90]
    assert bool((data.train.targets[180:] == IGNORE).all()) and content(data.train)[180:] == list(range(200))
    assert data.val is not None and content(data.val) == content(prepared(archive, val_fraction=0.1).val)


def test_transfer_of_another_shape_is_refused(archive: str) -> None:
    with pytest.raises(ConfigError, match=r"digits have shape \(1, 8, 8\), the data's \(1, 2, 3\)") as caught:
        prepared(archive, transfer=[Component(kind="digits")])
    assert caught.value.problems[0].key == "data.transfer.0"


def test_unlabelled_samples_are_a_stratum_and_never_validate(tmp_path: Path) -> None:
    y = np.where(np.arange(100) < 40, np.arange(100) % 2, IGNORE)
    np.savez(tmp_path / "a.npz", x_train=np.zeros((100, 2, 2), np.uint8), y_train=y)
    data = prepared(str(tmp_path / "a.npz"), val_fraction=0.25)
    assert data.val is not None and counts(data.val.targets)[:2] == [5, 5] and len(data.val) == 10
    limited = data.for_stage(StageData(limit=45))
    assert int((limited.train.targets == IGNORE).sum()) == 30 and limited.class_counts() == [8, 7]


def test_every_beginning_of_a_stratified_order_is_in_proportion() -> None:
    targets = torch.tensor(np.random.default_rng(1).permutation(np.repeat([0, 1, 2, IGNORE], [100, 50, 10, 40])))
    order = stratified(targets, 3)
    assert order.sort().values.equal(torch.arange(200))
    for size in range(1, 201):
        beginning = targets[order[:size]]
        for target, count in ((0, 100), (1, 50), (2, 10), (IGNORE, 40)):
            assert abs(int((beginning == target).sum()) - size * count / 200) <= 1


def test_fingerprint_is_of_images_and_targets_before_limits(archive: str, tmp_path: Path) -> None:
    data = prepared(archive)
    assert data.fingerprint() == prepared(archive).fingerprint()
    assert data.fingerprint() == data.for_stage(StageData(limit=20, labels_per_class=3)).fingerprint()
    assert data.fingerprint() == prepared(archive, labels_per_class=3).fingerprint()
    assert data.fingerprint() != prepared(archive, split_seed=1).fingerprint()
    with np.load(archive) as file:
        arrays = dict(file)
    arrays["x_test"][3, 1, 1] ^= 1
    np.savez(tmp_path / "b.npz", **arrays)
    assert data.fingerprint() != prepared(str(tmp_path / "b.npz")).fingerprint()


OWN = """
import torch
from kdctl.data.base import ArraySplit, Dataset, ItemSplit, Source

def decode(item):
    return torch.full((1, 4, 4), item, dtype=torch.uint8)

class MyData(Source):
    def __init__(self, *, count: int = 10):
        self.count = count

    def load(self) -> Dataset:
        train = ItemSplit(decode, torch.arange(self.count) % 2, (1, 4, 4), stamp=str(self.count))
        return Dataset(train, class_names=["even", "odd"])

class NotOne(Source):
    def load(self):
        return [1, 2]
"""


def test_a_users_own_source(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    spec = DataSpec(kind="./own.py:MyData", count=20, val_fraction=0.2)  # type: ignore[call-arg]
    data = prepare(spec, tmp_path)
    assert isinstance(data.train, ItemSplit) and len(data.train) == 16 and data.class_counts() == [8, 8]
    assert data.val is not None and len(data.val) == 4
    assert data.fingerprint() != prepare(spec.model_copy(update={"split_seed": 2}), tmp_path).fingerprint()
    with pytest.raises(ConfigError, match="gave list, expected"):
        prepare(DataSpec(kind="./own.py:NotOne"), tmp_path)


def test_items_and_arrays_join(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    np.savez(tmp_path / "a.npz", x_train=np.full((3, 4, 4), 99, np.uint8), y_train=np.array([0, 1, 1]))
    transfer = [Component(kind="npz", path=str(tmp_path / "a.npz"))]  # type: ignore[call-arg]
    data = prepare(DataSpec(kind="./own.py:MyData", val_fraction=0.0, transfer=transfer), tmp_path)
    assert len(data.train) == 13 and not isinstance(data.train, ArraySplit)
    pixels = data.train.fetch(torch.tensor([0, 9, 10, 12]))[:, 0, 0, 0].tolist()
    assert pixels == [0, 9, 99, 99]
