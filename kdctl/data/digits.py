"""The handwritten digits that ship with the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from kdctl.data.base import ArraySplit, Dataset, Source


class Digits(Source):
    """UCI handwritten digits: 1,797 grey images of 8x8 in 10 classes, 1,297 to train on and 500 for test.

    The test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine Learning
    Repository, 1998, doi:10.24432/C50P49, licence CC BY 4.0), in its own order. The split is part of the file: 50
    images of each class, drawn once, are the test split (scripts/make_digits.py). Grey values 0..16 become 0..255.
    """

    def __init__(self) -> None:
        self.path = Path(__file__).with_name("digits.npz")

    def load(self) -> Dataset:
        with np.load(self.path, allow_pickle=False) as file:
            grey, targets, is_test = file["images"], file["targets"], file["is_test"]
        pixels = np.round(grey * (255 / 16)).astype(np.uint8)
        images = torch.from_numpy(pixels).unsqueeze(1)
        labels = torch.from_numpy(targets.astype(np.int64))
        test = torch.from_numpy(is_test)
        return Dataset(
            ArraySplit(images[~test], labels[~test]),
            test=ArraySplit(images[test], labels[test]),
            class_names=[str(digit) for digit in range(10)],
        )
