"""A folder of images as a source: layouts, kinds of images, orientation, sizes, errors, fingerprint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kdctl.data.image_folder import ImageFolder
from kdctl.errors import ConfigError, KdctlError, MissingError

RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def image_file(path: Path, array: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                image_file(tmp_path / split / name / f"{i}.png", noise(8, 8, 3))
    return tmp_path


def test_folder_is_read(folder: Path) -> None:
    (folder / "train" / "cat" / "notes.txt").write_text("no image")
    (folder / "train" / ".hidden").mkdir()
    dataset = ImageFolder(root=str(folder), size=8).load()
    assert dataset.class_names == ["cat", "dog"] and dataset.input_shape == (3, 8, 8)
    assert dataset.train.targets.tolist() == [0, 0, 0, 1, 1, 1] and dataset.val is None
    assert dataset.test is not None and len(dataset.test) == 4
    expected = np.asarray(Image.open(folder / "train" / "dog" / "1.png"))
    np.testing.assert_array_equal(dataset.train.fetch(torch.tensor([4]))[0].permute(1, 2, 0).numpy(), expected)


def test_folder_with_val_and_test(folder: Path) -> None:
    image_file(folder / "val" / "dog" / "x.jpg", noise(9, 9, 3))
    dataset = ImageFolder(root=str(folder), size=8).load()
    assert dataset.val is not None and dataset.val.targets.tolist() == [1]
    for path in (folder / "test").rglob("*.png"):
        path.unlink()
    for path in sorted((folder / "test").rglob("*"), reverse=True):
        path.rmdir()
    (folder / "test").rmdir()
    dataset = ImageFolder(root=str(folder), size=8).load()
    assert dataset.val is None and dataset.test is not None and len(dataset.test) == 1


def decoded(path: Path, size: int, channels: int = 3) -> np.ndarray:
    """What the folder's only training image comes to: (size, size) or (size, size, 3)."""
    dataset = ImageFolder(root=str(path), size=size, channels=channels).load()  # type: ignore[arg-type]
    return dataset.train.fetch(torch.tensor([0]))[0].permute(1, 2, 0).squeeze(2).numpy()


def test_kinds_of_images(tmp_path: Path) -> None:
    place = tmp_path / "train" / "a" / "x.png"
    grey = noise(6, 6)
    image_file(place, grey)
    np.testing.assert_array_equal(decoded(tmp_path, 6), np.repeat(grey[..., None], 3, 2))
    np.testing.assert_array_equal(decoded(tmp_path, 6, channels=1), grey)
    image_file(place, (grey.astype(np.uint16) * 257))
    np.testing.assert_array_equal(decoded(tmp_path, 6, channels=1), grey)
    colour = np.concatenate([noise(6, 6, 3), np.full((6, 6, 1), 255, np.uint8)], 2)
    colour[:3, :, 3] = 0
    image_file(place, colour)
    laid = decoded(tmp_path, 6)
    np.testing.assert_array_equal(laid[3:], colour[3:, :, :3])
    assert (laid[:3] == 255).all(), "transparent parts are white"
    Image.fromarray(grey).convert("P").save(place, transparency=0)
    assert decoded(tmp_path, 6).shape == (6, 6, 3)
    Image.fromarray(colour[..., :3]).convert("CMYK").save(place.with_suffix(".tif"))
    place.unlink()
    assert decoded(tmp_path, 6).shape == (6, 6, 3)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    image_file(tmp_path / "train" / "a" / "x.jpg", picture, exif=exif, quality=95)
    upright = decoded(tmp_path, 16, channels=1)
    assert upright[:, 9:].mean() > 240 and upright[:, :7].mean() < 15


def test_resizing_keeps_the_middle_square(tmp_path: Path) -> None:
    wide = np.zeros((20, 60), np.uint8)
    wide[:, 20:40] = 200
    image_file(tmp_path / "train" / "a" / "x.png", wide)
    assert (decoded(tmp_path, 10, channels=1)[:, 1:-1] == 200).all()
    assert (decoded(tmp_path, 40, channels=1)[:, 2:-2] == 200).all()


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_an_unreadable_image_is_named(content: bytes | None, folder: Path) -> None:
    path = folder / "train" / "dog" / "0.png"
    path.write_bytes(path.read_bytes()[:100] if content is None else content)
    with pytest.raises(KdctlError, match="cannot be read as an image") as caught:
        ImageFolder(root=str(folder), size=8).load()
    assert str(path) in str(caught.value)


def test_folder_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="there is no folder"):
        ImageFolder(root=str(folder / "nowhere")).load()
    image_file(folder / "test" / "cats" / "x.png", noise(4, 4, 3))
    with pytest.raises(ConfigError, match=r"class 'cats' is not in.*did you mean 'cat'"):
        ImageFolder(root=str(folder)).load()
    with pytest.raises(MissingError, match=r"move cat, dog .* into train, and a part of each into test"):
        ImageFolder(root=str(folder / "train")).load()  # the classes lie in the root itself
    bare = folder / "bare" / "train"
    bare.mkdir(parents=True)
    with pytest.raises(MissingError, match="no folder of a class"):
        ImageFolder(root=str(bare.parent)).load()
    (bare / "a").mkdir()
    with pytest.raises(MissingError, match="has no image"):
        ImageFolder(root=str(bare.parent)).load()


def test_folder_fingerprint_follows_the_files(folder: Path) -> None:
    def fingerprint() -> str:
        return ImageFolder(root=str(folder), size=8).load().train.fingerprint()

    before = fingerprint()
    assert before == fingerprint()
    path = folder / "train" / "dog" / "0.png"
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    assert fingerprint() != before


def test_a_name_that_is_no_text(folder: Path) -> None:
    before = ImageFolder(root=str(folder), size=8).load()
    name = os.fsdecode(b"caf\xe9.png")
    image_file(folder / "train" / "cat" / name, noise(9, 9, 3))
    data = ImageFolder(root=str(folder), size=8).load()
    assert len(data.train) == len(before.train) + 1 and data.train.fingerprint() != before.train.fingerprint()


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    image_file(tmp_path / "train" / "a" / "x.tif", noise(6, 6).astype(np.float32) / 255)
    with pytest.raises(KdctlError, match="floating-point pixels"):
        decoded(tmp_path, 6)
