"""Image files in folders by class, decoded in worker processes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from kdctl.config.types import PathStr, PositiveInt
from kdctl.data.base import Dataset, ItemSplit, Source
from kdctl.errors import ConfigError, KdctlError, MissingError, Problem, did_you_mean

EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class ImageFolder(Source):
    """Image files in `root/train/<class>/` and `root/test/<class>/` (or `root/val/<class>/`).

    With both `val` and `test` they are the validation and the test split; one of them alone is the test split, and
    validation is carved from train. An image is turned as its EXIF orientation says, its transparent parts are laid
    on white, its shorter side is resized to `size` (bilinear with antialiasing) and its middle square is taken.
    channels: 3 for colour, 1 for grey. Files that are no images by their name's ending are passed over.
    """

    def __init__(self, *, root: PathStr, size: PositiveInt = 224, channels: Literal[1, 3] = 3) -> None:
        self.root = Path(root).expanduser()
        self.size = size
        self.channels = channels

    def load(self) -> Dataset:
        train = self.root / "train"
        if not train.is_dir():
            hint = "expected <root>/train/<class>/*.png and <root>/test/<class>/*.png"
            classes = [n for n in _folders(self.root) if _images(self.root / n)] if self.root.is_dir() else []
            if classes:
                hint += f"; move {', '.join(classes[:3])} ... into train, and a part of each into test"
            raise MissingError(Problem(f"there is no folder {train}", key="data.root", hint=hint))
        class_names = _folders(train)
        if not class_names:
            raise MissingError(Problem("has no folder of a class", file=str(train), key="data.root"))
        measured = [name for name in ("val", "test") if (self.root / name).is_dir()]
        splits = {name: self._split(name, class_names) for name in ["train", *measured]}
        val = splits["val"] if len(measured) == 2 else None
        test = splits[measured[-1]] if measured else None
        return Dataset(splits["train"], val=val, test=test, class_names=class_names)

    def _split(self, name: str, class_names: list[str]) -> ItemSplit:
        folder = self.root / name
        files: list[str] = []
        targets: list[int] = []
        digest = hashlib.sha256()
        for class_name in _folders(folder):
            if class_name not in class_names:
                message = f"class '{class_name}' is not in {self.root / 'train'}"
                raise ConfigError(Problem(message, file=str(folder), hint=did_you_mean(class_name, class_names)))
            for path in _images(folder / class_name):
                status = path.stat()
                said = f"{path.relative_to(self.root)}\0{status.st_size}\0{status.st_mtime_ns}\0"
                digest.update(said.encode("utf-8", "surrogateescape"))  # a name may be any bytes
                files.append(str(path))
                targets.append(class_names.index(class_name))
        if not files:
            message = f"has no image; looked for {' '.join(sorted(EXTENSIONS))}"
            raise MissingError(Problem(message, file=str(folder), key="data.root"))
        shape = (self.channels, self.size, self.size)
        decode = Decoder(files, self.size, self.channels)
        return ItemSplit(decode, torch.tensor(targets), shape, stamp=digest.hexdigest())


class Decoder:
    """Reads file number i as uint8 (channels, height, width); size: one side of both, or the two."""

    def __init__(self, files: list[str], size: int | tuple[int, int], channels: int) -> None:
        self._files = np.array(files)  # one block of memory: forked workers do not copy it
        self._size = (size, size) if isinstance(size, int) else size
        self._channels = channels

    def __call__(self, item: int) -> Tensor:
        from PIL import Image

        path = str(self._files[item])
        try:
            with Image.open(path) as image:
                pixels = self._pixels(image)
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            hint = "mend or delete the file"
            raise KdctlError(Problem(f"cannot be read as an image: {error}", file=path, hint=hint)) from None
        return torch.from_numpy(pixels)

    def _pixels(self, image: Any) -> np.ndarray:
        from PIL import Image, ImageOps

        height, width = self._size
        image.draft(None, (2 * width, 2 * height))  # JPEG: decode no finer than needed
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("floating-point pixels, of which no range is known; save it with 8 or 16 bits")
        if image.mode.startswith("I"):  # 16 bits, which convert() would clip
            deep = np.asarray(image, dtype=np.float32)
            image = Image.fromarray((deep / 257).clip(0, 255).round().astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB" if self._channels == 3 else "L")
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
        array = np.array(image)
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy()


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    found = []
    for place, _, names in os.walk(folder):
        found += [Path(place, n) for n in names if Path(n).suffix.lower() in EXTENSIONS and not n.startswith(".")]
    return sorted(found)
