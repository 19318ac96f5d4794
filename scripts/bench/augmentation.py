"""Batched augmentation against the same operations on one Pillow image after the other: images per second of one core.

    python scripts/bench/augmentation.py [--batch 128] [--side 32] [--json FILE]

Both start from uint8 images of a data set in memory, picked in random order, and end at a float32 batch in [0, 1].
The two take turns; the numbers are medians of CPU time. Prints a table, and writes the JSON where asked.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from kdctl.data.augment import Augment, Augmentation
from kdctl.data.base import ArraySplit
from kdctl.data.loader import as_inputs
from kdctl.data.rand_augment import RandAugment
from kdctl.data.spatial import Cutout, HorizontalFlip, RandomCrop, RandomResizedCrop

SAMPLES = 4096
ROUNDS = 7

Change = Callable[[Image.Image], Image.Image]


def crop(image: Image.Image, padding: int = 4) -> Image.Image:
    width, height = image.size
    left, top = random.randint(0, 2 * padding), random.randint(0, 2 * padding)
    return ImageOps.expand(image, padding).crop((left, top, left + width, top + height))


def flip(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image


def cutout(image: Image.Image, size: int = 16) -> Image.Image:
    x, y = random.randrange(image.width) - size // 2, random.randrange(image.height) - size // 2
    image.paste(0, (x, y, x + size, y + size))
    return image


def resized_crop(image: Image.Image) -> Image.Image:
    side = (image.width * image.height * random.uniform(0.08, 1)) ** 0.5
    root = (3 / 4 * (16 / 9) ** random.random()) ** 0.5
    width, height = min(image.width, max(1, round(side * root))), min(image.height, max(1, round(side / root)))
    left, top = random.randint(0, image.width - width), random.randint(0, image.height - height)
    return image.resize(image.size, Image.Resampling.BILINEAR, (left, top, left + width, top + height))


def rand_augment(image: Image.Image, num_ops: int = 2, strength: float = 0.3) -> Image.Image:
    def warp(*matrix: float) -> Change:
        return lambda i: i.transform(i.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)

    def enhance(kind: type) -> Change:
        return lambda i: kind(i).enhance(1 + 0.9 * strength * sign)

    for _ in range(num_ops):
        sign = random.choice((1, -1))
        move = 150 / 331 * strength * sign * image.width
        changes: list[Change] = [
            lambda i: i,
            warp(1, 0.3 * strength * sign, 0, 0, 1, 0),
            warp(1, 0, 0, 0.3 * strength * sign, 1, 0),
            warp(1, 0, move, 0, 1, 0),
            warp(1, 0, 0, 0, 1, move),
            lambda i: i.rotate(30 * strength * sign),  # noqa: B023 - used in this round only
            enhance(ImageEnhance.Brightness),
            enhance(ImageEnhance.Color),
            enhance(ImageEnhance.Contrast),
            enhance(ImageEnhance.Sharpness),
            lambda i: ImageOps.posterize(i, 7),
            lambda i: ImageOps.solarize(i, 178),
            ImageOps.autocontrast,
            ImageOps.equalize,
        ]
        image = random.choice(changes)(image)
    return image


CASES: dict[str, tuple[list[Augmentation], list[Change]]] = {
    "crop + flip": ([RandomCrop(), HorizontalFlip()], [crop, flip]),
    "crop + flip + cutout": ([RandomCrop(), HorizontalFlip(), Cutout()], [crop, flip, cutout]),
    "resized crop + flip": ([RandomResizedCrop(), HorizontalFlip()], [resized_crop, flip]),
    "crop + flip + rand_augment": ([RandomCrop(), HorizontalFlip(), RandAugment()], [crop, flip, rand_augment]),
}


def batched(split: ArraySplit, augment: Augment, rows: torch.Tensor) -> torch.Tensor:
    return as_inputs(augment(split.fetch(rows), split.index[rows], torch.zeros_like(rows)))


def per_sample(arrays: np.ndarray, changes: list[Change], rows: list[int]) -> torch.Tensor:
    images = []
    for row in rows:
        image = Image.fromarray(arrays[row])
        for change in changes:
            image = change(image)
        images.append(np.asarray(image))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div_(255)


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(batch: int, side: int) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (SAMPLES, 3, side, side), dtype=torch.uint8, generator=generator)
    split = ArraySplit(images, torch.zeros(SAMPLES, dtype=torch.int64))
    arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
    parts = torch.randperm(SAMPLES, generator=generator).split(batch)
    found = []
    for name, (operations, changes) in CASES.items():
        augment = Augment(operations)
        ours: list[float] = []
        pillow: list[float] = []
        batched(split, augment, parts[0])
        for _ in range(ROUNDS):
            ours.append(cpu_seconds(lambda: [batched(split, augment, p) for p in parts]))  # noqa: B023
            pillow.append(cpu_seconds(lambda: [per_sample(arrays, changes, p.tolist()) for p in parts]))  # noqa: B023
        rates = {"kdctl": SAMPLES / statistics.median(ours), "pillow": SAMPLES / statistics.median(pillow)}
        found.append({"case": name, **rates, "ratio": rates["kdctl"] / rates["pillow"]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    rows = measure(options.batch, options.side)
    print(f"{'images/s of one core':<28}{'kdctl':>10}{'Pillow':>10}{'ratio':>8}")
    for row in rows:
        print(f"{row['case']:<28}{row['kdctl']:>10,.0f}{row['pillow']:>10,.0f}{row['ratio']:>8.1f}")
    document = {
        "schema_version": 1,
        "batch": options.batch,
        "side": options.side,
        "torch": torch.__version__,
        "rows": rows,
    }
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    else:
        print(json.dumps(document))


if __name__ == "__main__":
    main()
