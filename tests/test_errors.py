"""What errors and other texts are made of."""

from __future__ import annotations

import pytest

from kdctl.errors import counted


@pytest.mark.parametrize(
    ("number", "noun", "expected"),
    [
        (1, "epoch", "1 epoch"), (0, "epoch", "0 epochs"), (1500, "sample", "1,500 samples"),
        (1, "class", "1 class"), (2, "class", "2 classes"),
    ],
)  # fmt: skip
def test_one_thing_is_not_plural(number: int, noun: str, expected: str) -> None:
    assert counted(number, noun) == expected
