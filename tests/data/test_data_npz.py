"""Arrays in .npz files as a source: layouts, names of classes, damage."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdctl.data.npz import Npz
from kdctl.errors import ConfigError, MissingError

RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def saved(path: Path, **arrays: Any) -> Npz:
    np.savez(path / "data.npz", **arrays)
    return Npz(path=str(path / "data.npz"))


@pytest.mark.parametrize("shape", [(6, 8, 9), (6, 8, 9, 3), (6, 8, 9, 1)])
def test_npz_layouts(shape: tuple[int, ...], tmp_path: Path) -> None:
    x, y = noise(*shape), np.array([0, 1, 2, 3, -100, 1], dtype=np.int16)
    dataset = saved(tmp_path, x_train=x, y_train=y, x_val=x[:2], y_val=y[:2, None]).load()
    expected = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(dataset.train.fetch(torch.arange(6)).numpy(), expected)
    assert dataset.train.targets.tolist() == y.tolist() and dataset.class_names == ["0", "1", "2", "3"]
    assert dataset.val is not None and len(dataset.val) == 2 and dataset.test is None
    if x.ndim == 4:
        dataset = saved(tmp_path, x_train=expected, y_train=y).load()
        np.testing.assert_array_equal(dataset.train.fetch(torch.arange(6)).numpy(), expected)


def test_npz_names_classes(tmp_path: Path) -> None:
    x, y = noise(2, 4, 4), np.array([0, 1])
    assert saved(tmp_path, x_train=x, y_train=y, class_names=np.array(["no", "yes"])).load().class_names == [
        "no",
        "yes",
    ]
    named = Npz(path=str(tmp_path / "data.npz"), class_names=["a", "b", "c"]).load()
    assert named.class_names == ["a", "b", "c"]


X, Y = noise(4, 6, 6, 3), np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_train": X}, "needs the arrays x_train and y_train; it has x_train"),
        ({"images": X}, "it has none"),
        ({"x_train": X.astype(np.float32), "y_train": Y}, "x_train is float32; images must be uint8"),
        ({"x_train": X, "y_train": Y.astype(float)}, "y_train is float64"),
        ({"x_train": X, "y_train": Y[:3]}, "4 images"),
        ({"x_train": X, "y_train": np.eye(4, dtype=int)}, r"shape \(4, 4\)"),
        ({"x_train": X[:, 0, 0], "y_train": Y}, "expected"),
        ({"x_train": X[..., :2], "y_train": Y}, "which axis is the channels.*layout"),
        ({"x_train": X[:, :3], "y_train": Y}, "which axis is the channels"),
        ({"x_train": X, "y_train": Y - 1}, "target -1"),
        ({"x_train": X, "y_train": Y, "x_test": X}, "one of x_test and y_test"),
        ({"x_train": X, "y_train": Y, "x_test": X[:, :5], "y_test": Y}, "test split have shape"),
        ({"x_train": X[:0], "y_train": Y[:0], "x_test": X, "y_test": Y}, "train split has no samples"),
        ({"x_train": X, "y_train": Y, "class_names": np.array(["a"])}, "target 1; allowed: 0..0"),
        ({"x_train": X, "y_train": np.array([1, "a", None, 2], dtype=object)}, "cannot be read as .npz"),
    ],
)
def test_npz_errors_name_the_file_and_the_array(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        saved(tmp_path, **arrays).load()
    assert "data.npz" in str(caught.value)


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch exploded",)


def damaged_npz() -> dict[str, bytes]:
    buffer, single = io.BytesIO(), io.BytesIO()
    np.savez_compressed(buffer, x_train=X, y_train=Y)
    np.save(single, X)
    whole = buffer.getvalue()
    flipped = bytearray(whole)
    flipped[120] ^= 0x40
    bomb = pickle.dumps(Bomb())
    return {"empty": b"", "text": b"hello", "half": whole[: len(whole) // 2], "bit": bytes(flipped),
            "npy": single.getvalue(), "pickle": bomb}  # fmt: skip


@pytest.mark.parametrize("name", damaged_npz())
def test_damaged_npz_files_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.npz").write_bytes(damaged_npz()[name])
    with pytest.raises(ConfigError, match=r"data\.npz"):
        Npz(path=str(tmp_path / "data.npz")).load()
    assert not (tmp_path / "exploded").exists()


def test_npz_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="there is no file"):
        Npz(path=str(tmp_path / "data.npz")).load()


def test_names_of_bytes_and_a_train_split_without_samples(tmp_path: Path) -> None:
    names = np.array([b"cat", b"dog"])
    data = saved(tmp_path, x_train=noise(4, 3, 3), y_train=np.array([0, 1, 0, 1]), class_names=names).load()
    assert data.class_names == ["cat", "dog"]
    with pytest.raises(ConfigError, match="the train split has no samples"):
        saved(tmp_path, x_train=noise(0, 3, 3), y_train=np.zeros(0, np.int64)).load()
