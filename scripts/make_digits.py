"""Makes kdctl/data/digits.npz from scikit-learn's copy of the UCI digits: python scripts/make_digits.py

images uint8 (1797, 8, 8) with grey values 0..16, targets uint8 (1797,), is_test bool (1797,): 50 of each class, drawn
with numpy's RandomState(0), whose stream is fixed for good.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

TEST_PER_CLASS = 50


def main() -> None:
    data = load_digits()
    images, targets = data.images.astype(np.uint8), data.target.astype(np.uint8)
    order = np.random.RandomState(0).permutation(len(targets))
    is_test = np.zeros(len(targets), dtype=bool)
    for digit in range(10):
        is_test[order[targets[order] == digit][:TEST_PER_CLASS]] = True
    path = Path(__file__).resolve().parent.parent / "kdctl" / "data" / "digits.npz"
    np.savez_compressed(path, images=images, targets=targets, is_test=is_test)
    print(f"{path.name}: {path.stat().st_size} bytes, {(~is_test).sum()} train, {is_test.sum()} test")


if __name__ == "__main__":
    main()
