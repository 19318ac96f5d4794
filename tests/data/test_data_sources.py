"""Sources: what they read, and what they say of missing, damaged and hostile files."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kdctl import registry
from kdctl.data import SOURCES, cifar, mnist, official
from kdctl.data.base import ArraySplit, Dataset, ItemSplit, Source, split_from_pairs, statistics
from kdctl.data.cifar import Cifar
from kdctl.data.digits import Digits
from kdctl.data.mnist import Mnist
from kdctl.errors import ConfigError, MissingError

RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


# --------------------------------------------------------------------------------------------------------------- base


def test_dataset_measures_its_statistics() -> None:
    images = torch.from_numpy(noise(50, 3, 6, 5))
    images[:, 2] = 51
    dataset = Dataset(ArraySplit(images, torch.zeros(50, dtype=torch.int64)), class_names=["a"])
    scaled = images.double() / 255
    assert dataset.mean == pytest.approx(scaled.mean((0, 2, 3)).tolist())
    expected = scaled.std((0, 2, 3), correction=0).tolist()
    assert dataset.std == pytest.approx([*expected[:2], 1.0]), "a flat channel is left as it is"


def test_statistics_of_items_come_from_some_of_them() -> None:
    asked: list[int] = []

    def decode(item: int) -> torch.Tensor:
        asked.append(item)
        return torch.full((1, 2, 2), item % 2 * 255, dtype=torch.uint8)

    mean, std = statistics(ItemSplit(decode, torch.zeros(5001, dtype=torch.int64), (1, 2, 2), stamp=""))
    assert len(asked) == 512 and asked[0] == 0 and asked[-1] == 5000
    assert 0.4 < mean[0] < 0.6 and 0.45 < std[0] < 0.55


@pytest.mark.parametrize(
    ("targets", "names", "message"),
    [
        ([0, 1, 2], ["a", "b"], "target 2; allowed: 0..1"),
        ([0, -1, 1], ["a", "b"], "target -1"),
        ([0, 0, 0], [], "names no classes"),
        ([], ["a"], "no samples"),
    ],
)
def test_dataset_refuses_wrong_targets(targets: list[int], names: list[str], message: str) -> None:
    images = torch.zeros(len(targets), 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(ConfigError, match=message):
        Dataset(ArraySplit(images, torch.tensor(targets, dtype=torch.int64)), class_names=names)


def test_labels_of_some_classes_alone_are_refused() -> None:
    targets = torch.tensor([[1, 0], [-100, -100], [1, -100]])
    split = ArraySplit(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), targets)
    with pytest.raises(ConfigError, match="sample 2 of the train split has labels of some classes alone"):
        Dataset(split, class_names=["a", "b"])


def test_splits_refuse_other_types_and_shapes() -> None:
    good = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="float32 of shape"):
        ArraySplit(good.float(), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"int64 of shape \(3,\) .*; got int64 of shape \(2,\)"):
        ArraySplit(good, torch.zeros(2, dtype=torch.int64))
    train = ArraySplit(good, torch.zeros(3, dtype=torch.int64))
    test = ArraySplit(good[..., :1], torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ConfigError, match="test split have shape"):
        Dataset(train, test=test, class_names=["a"])
    with pytest.raises(ConfigError, match="got list"):
        Dataset(train, test=[1], class_names=["a"])  # type: ignore[arg-type]
    odd = ItemSplit(lambda i: good[0, :, :1], torch.zeros(3, dtype=torch.int64), (1, 2, 2), stamp="")
    with pytest.raises(ConfigError, match="item 2 is uint8 of shape"):
        odd.fetch(torch.tensor([2]))


def test_pairs_become_a_split() -> None:
    colour, grey = noise(4, 5, 3), noise(4, 5)
    split = split_from_pairs([(Image.fromarray(colour), 3), (colour, 1)])
    assert split.images.shape == (2, 3, 4, 5) and split.targets.tolist() == [3, 1]
    np.testing.assert_array_equal(split.images[0].permute(1, 2, 0).numpy(), colour)
    assert split_from_pairs([(grey, 0)]).images.shape == (1, 1, 4, 5)
    with pytest.raises(ConfigError, match="one shape"):
        split_from_pairs([(grey, 0), (grey[1:], 0)])


@pytest.mark.parametrize("name", SOURCES)
def test_table_entries_are_sources_that_the_registry_can_make(name: str) -> None:
    arguments = {"npz": {"path": "x.npz"}, "image_folder": {"root": "x"}, "text": {"root": "x"}}.get(name, {})
    arguments |= {"root": "x", "target": "next"} if name == "corpus" else {}
    arguments |= {"name": "x", "target": "next" if name == "hub_corpus" else "class"} if name.startswith("hub_") else {}
    assert isinstance(registry.create("data", name, arguments), Source)


# ------------------------------------------------------------------------------------------------------------- digits


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    dataset = Digits().load()
    assert dataset.test is not None and dataset.val is None
    assert len(dataset.train) == 1297 and dataset.input_shape == (1, 8, 8)
    assert torch.bincount(dataset.test.targets).tolist() == [50] * 10

    def rows(splits: list[Any]) -> list[tuple[int, ...]]:
        return sorted((*s.images[i].flatten().tolist(), int(s.targets[i])) for s in splits for i in range(len(s)))

    data = load_digits()
    pixels = np.round(data.images * 255 / 16).astype(np.uint8)
    original = ArraySplit(torch.from_numpy(pixels)[:, None], torch.from_numpy(data.target.astype(np.int64)))
    assert rows([dataset.train, dataset.test]) == rows([original])


# -------------------------------------------------------------------------------------------------------------- cifar


def python2_pickle(content: dict[bytes, Any]) -> bytes:
    """A dictionary as Python 2 wrote it, as the official files are: byte strings, numpy's old names."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def item(value: Any) -> bytes:
        if isinstance(value, bytes):
            return text(value)
        if isinstance(value, int):
            return number(value)
        if isinstance(value, list):
            return b"](" + b"".join(item(v) for v in value) + b"e"
        made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85U\x01b\x87R"
        kind = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + number(-1) * 2 + b"K\x00tb"
        state = b"(K\x01" + b"".join(map(number, value.shape)) + b"\x86" + kind + b"\x89"
        return made + state + b"T" + struct.pack("<I", value.nbytes) + value.tobytes() + b"tb"

    return b"\x80\x02}(" + b"".join(text(key) + item(value) for key, value in content.items()) + b"u."


def python3_pickle(content: dict[bytes, Any]) -> bytes:
    return pickle.dumps(content, protocol=4)


def cifar_files(
    root: Path, name: str, count: int = 20, pickled: Callable[[dict[bytes, Any]], bytes] = python2_pickle
) -> dict[str, str]:
    """Small files in the official layout, and their MD5 sums."""
    folder = root / cifar._FOLDERS[name]
    folder.mkdir(parents=True, exist_ok=True)
    sums = {}
    for file in cifar._MD5[name]:
        labels = [int(v) for v in RNG.integers(0, 10, count)]
        content = {b"data": noise(count, 3072), cifar._LABELS[name]: labels, b"filenames": [b"x.png"] * count}
        data = pickled(content)
        (folder / file).write_bytes(data)
        sums[file] = hashlib.md5(data).hexdigest()
    return sums


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("pickled", [python2_pickle, python3_pickle])
def test_cifar_is_read(
    name: str, pickled: Callable[[dict[bytes, Any]], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cifar._MD5, name, cifar_files(tmp_path, name, pickled=pickled))
    dataset = Cifar(root=str(tmp_path), name=name).load()  # type: ignore[arg-type]
    files = list(cifar._MD5[name])
    assert len(dataset.train) == 20 * (len(files) - 1) and dataset.test is not None and len(dataset.test) == 20
    with open(tmp_path / cifar._FOLDERS[name] / files[0], "rb") as file:
        first = pickle.load(file, encoding="bytes")
    np.testing.assert_array_equal(dataset.train.fetch(torch.arange(20)).reshape(20, -1).numpy(), first[b"data"])
    assert dataset.train.targets[:20].tolist() == first[cifar._LABELS[name]]
    assert len(dataset.class_names) == len(set(dataset.class_names)) == {"cifar10": 10, "cifar100": 100}[name]
    inside = Cifar(root=str(tmp_path / cifar._FOLDERS[name]), name=name).load()  # type: ignore[arg-type]
    assert inside.train.fingerprint() == dataset.train.fingerprint()


def test_cifar_npz_is_read(tmp_path: Path) -> None:
    x, y = noise(30, 32, 32, 3), np.arange(30, dtype=np.uint8)
    np.savez(tmp_path / "cifar100.npz", x_train=x, y_train=y, coarse_train=y, x_test=x[:9], y_test=y[:9])
    dataset = Cifar(root=str(tmp_path), name="cifar100").load()
    np.testing.assert_array_equal(dataset.train.fetch(torch.arange(30)).permute(0, 2, 3, 1).numpy(), x)
    assert dataset.test is not None and dataset.test.targets.tolist() == list(range(9))
    assert dataset.class_names[0] == "apple"
    np.savez(tmp_path / "cifar100.npz", x_train=x[:, :28], y_train=y)
    with pytest.raises(MissingError, match=r"\(3, 28, 32\)"):
        Cifar(root=str(tmp_path), name="cifar100").load()


def test_a_file_that_is_not_the_official_one_is_named_and_not_unpickled(tmp_path: Path) -> None:
    cifar_files(tmp_path, "cifar10")
    with pytest.raises(MissingError, match="data_batch_1: not the official file: its MD5 is"):
        Cifar(root=str(tmp_path)).load()


class Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch exploded",)


HOSTILE = {
    "a command": pickle.dumps({b"data": Bomb()}),
    "a builtin": b"cbuiltins\neval\n(S'1+1'\ntR.",
    "a function of numpy": b"cnumpy\nload\n(S'x'\ntR.",
    "an attribute of an allowed name": b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93.",
    "an array of objects": python3_pickle({b"data": np.array([[1, "x"]], dtype=object), b"labels": [1]}),
    "an array of floats": python3_pickle({b"data": np.zeros((1, 3072)), b"labels": [1]}),
    "an array of signed bytes": python3_pickle({b"data": np.zeros((1, 3072), np.int8), b"labels": [1]}),
    "another order": python3_pickle({b"data": np.asfortranarray(noise(2, 3072)), b"labels": [1, 2]}),
    "a wrong shape": python3_pickle({b"data": noise(2, 3), b"labels": [1, 2]}),
    "too few labels": python3_pickle({b"data": noise(2, 3072), b"labels": [1]}),
    "a list": pickle.dumps([1]),
    "nothing": b"",
    "noise": bytes(range(256)),
    "cut off": python3_pickle({b"data": noise(2, 3072), b"labels": [1, 2]})[:-40],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_damaged_pickles_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sums = cifar_files(tmp_path, "cifar10")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(HOSTILE[name])
    monkeypatch.setitem(cifar._MD5, "cifar10", sums | {"data_batch_3": hashlib.md5(HOSTILE[name]).hexdigest()})
    with pytest.raises(MissingError, match="data_batch_3"):
        Cifar(root=str(tmp_path)).load()
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(("source", "file"), [(Cifar, "cifar-10-batches-py/data_batch_1"), (Mnist, "train-images")])
def test_missing_data_name_the_command_that_gets_them(source: type, file: str, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=file) as caught:
        source(root=str(tmp_path)).load()
    assert caught.value.code == 4
    assert "data.download=true" in str(caught.value)


def test_download_is_refused_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCTL_OFFLINE", "1")
    for source in (Cifar(root=str(tmp_path), download=True), Mnist(root=str(tmp_path), download=True)):
        with pytest.raises(MissingError, match="KDCTL_OFFLINE"):
            source.load()


def test_download_happens_only_when_files_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def bring(name: str, root: Path) -> None:
        asked.append(name)
        monkeypatch.setitem(cifar._MD5, name, cifar_files(root, name))

    monkeypatch.setattr(official, "download", bring)
    for _ in range(2):
        Cifar(root=str(tmp_path), download=True, name="cifar100").load()
    assert asked == ["cifar100"]


def test_a_failed_download_is_an_error_of_missing_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdctl.torchvision_guard import ensure_torchvision

    ensure_torchvision()
    import torchvision

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no route")

    monkeypatch.delenv("KDCTL_OFFLINE", raising=False)
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fail)
    with pytest.raises(MissingError, match="downloading fashion_mnist failed: no route"):
        Mnist(root=str(tmp_path), download=True, name="fashion_mnist").load()


# -------------------------------------------------------------------------------------------------------------- mnist


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + b"".join(s.to_bytes(4, "big") for s in array.shape) + array.tobytes()


def mnist_files(folder: Path, suffix: str = "") -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = dict(zip(mnist._FILES, (noise(12, 28, 28), noise(12) % 10, noise(5, 28, 28), noise(5) % 10), strict=True))
    for name, array in arrays.items():
        content = idx(array)
        (folder / (name + suffix)).write_bytes(gzip.compress(content) if suffix else content)
    return arrays


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("folder", [".", "raw", "MNIST/raw"])
def test_mnist_is_read(suffix: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mnist._MD5, "mnist", {})
    arrays = mnist_files(tmp_path / folder, suffix)
    dataset = Mnist(root=str(tmp_path)).load()
    assert dataset.test is not None and dataset.input_shape == (1, 28, 28)
    np.testing.assert_array_equal(dataset.train.fetch(torch.arange(12))[:, 0].numpy(), arrays[mnist._FILES[0]])
    assert dataset.test.targets.tolist() == arrays[mnist._FILES[3]].tolist()


def test_mnist_sums_are_checked(tmp_path: Path) -> None:
    mnist_files(tmp_path)
    with pytest.raises(MissingError, match="train-images-idx3-ubyte: not the official file"):
        Mnist(root=str(tmp_path)).load()


GOOD = idx(noise(4, 28, 28))


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        (b"", "", "not an IDX file"),
        (GOOD[:9], "", "not an IDX file"),
        (GOOD[:-1], "", "3135 bytes follow"),
        (GOOD + b"x", "", "3137 bytes follow"),
        (b"\0\0\x0d\x03" + GOOD[4:], "", "not an IDX file"),
        (bytes((0, 0, 8, 3)) + b"\xff" * 12, "", "0 bytes follow"),
        (GOOD, ".gz", "not a gzip file"),
        (gzip.compress(GOOD)[:-30], ".gz", "not a gzip file"),
    ],
)
def test_damaged_idx_files_are_refused(
    content: bytes, suffix: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(mnist._MD5, "mnist", {})
    mnist_files(tmp_path)
    (tmp_path / mnist._FILES[0]).unlink()
    (tmp_path / (mnist._FILES[0] + suffix)).write_bytes(content)
    with pytest.raises(MissingError, match=message) as caught:
        Mnist(root=str(tmp_path)).load()
    assert mnist._FILES[0] + suffix in str(caught.value)


def test_images_and_labels_must_be_as_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mnist._MD5, "mnist", {})
    mnist_files(tmp_path)
    (tmp_path / mnist._FILES[1]).write_bytes(idx(noise(11) % 10))
    with pytest.raises(MissingError, match="12 images but 11 labels"):
        Mnist(root=str(tmp_path)).load()


# ---------------------------------------------------------------------------------------------------------- real data


@pytest.mark.slow
@pytest.mark.skipif(
    "KDCTL_CIFAR" not in os.environ, reason="KDCTL_CIFAR names no folder with cifar10/cifar-10-batches-py"
)
def test_real_cifar10() -> None:
    dataset = Cifar(root=Path(os.environ["KDCTL_CIFAR"], "cifar10")).load()
    assert dataset.test is not None
    assert torch.bincount(dataset.train.targets).tolist() == [5000] * 10
    assert torch.bincount(dataset.test.targets).tolist() == [1000] * 10
    assert dataset.mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-5)
    assert dataset.std == pytest.approx([0.2470, 0.2435, 0.2616], abs=5e-5)
