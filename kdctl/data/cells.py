"""What a column of labels holds: a class, several, a number, or a tag for each word. Cells become targets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from kdctl.signals import IGNORE

Cell = Any
"""What one cell says, as `read` gives it; None where it says nothing."""


class Unknown(Exception):
    """A label that is no class; its text."""


class OneClass:
    """A class a text, as a name; an empty cell is no label."""

    what: ClassVar[str] = "class"

    def read(self, value: Any) -> Cell:
        """The cell's content. Raises ValueError where it can be none."""
        if isinstance(value, list | dict):
            raise ValueError(f"one class is expected, and this is {value!r}")
        return (None if value is None else str(value).strip()) or None

    def labels(self, cell: Cell) -> Iterable[str]:
        """The classes that a cell names."""
        return () if cell is None else (cell,)

    def names(self, cells: Sequence[Cell]) -> list[str]:
        """The classes that there are: numbers in their order, other names sorted."""
        found = {label for cell in cells for label in self.labels(cell)}
        return sorted(found, key=int) if all(label.isdecimal() for label in found) else sorted(found)

    def check(self, cell: Cell, number_of: Mapping[str, int]) -> None:
        """Raises Unknown for a label that is no class."""
        unknown = next((label for label in self.labels(cell) if label not in number_of), None)
        if unknown is not None:
            raise Unknown(unknown)

    def targets(self, cells: Sequence[Cell], number_of: Mapping[str, int], classes: int) -> Tensor:
        """int64 (N,)."""
        return torch.tensor([IGNORE if cell is None else number_of[cell] for cell in cells])


class SeveralClasses(OneClass):
    """Any number of classes a text: names or numbers with a separator in between, or a list in JSON.

    An empty cell is no label; an empty list says that none of the classes is there.
    """

    what = "classes"

    def __init__(self, separator: str) -> None:
        self._separator = separator

    def read(self, value: Any) -> Cell:
        if isinstance(value, list):
            return [str(label).strip() for label in value]
        if isinstance(value, dict):
            raise ValueError(f"a list of classes is expected, and this is {value!r}")
        parts = ["" if value is None else str(value)]
        parts = [label.strip() for label in parts[0].split(self._separator)]
        return [label for label in parts if label] or None

    def labels(self, cell: Cell) -> Iterable[str]:
        return cell or ()

    def targets(self, cells: Sequence[Cell], number_of: Mapping[str, int], classes: int) -> Tensor:
        """int64 (N, C) of 0 and 1; IGNORE all along where there is no label."""
        targets = torch.zeros(len(cells), classes, dtype=torch.int64)
        for row, cell in zip(targets, cells, strict=True):
            if cell is None:
                row.fill_(IGNORE)
            else:
                row[[number_of[label] for label in cell]] = 1
        return targets


class Number(OneClass):
    """A number a text; an empty cell is none."""

    what = "number"

    def read(self, value: Any) -> Cell:
        text = "" if value is None else str(value).strip()
        if not text:
            return None
        try:
            number = math.nan if isinstance(value, bool | list | dict) else float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"'{text}' is no number")
        return number

    def labels(self, cell: Cell) -> Iterable[str]:
        return ()

    def names(self, cells: Sequence[Cell]) -> list[str]:
        return ["score"] if any(cell is not None for cell in cells) else []

    def targets(self, cells: Sequence[Cell], number_of: Mapping[str, int], classes: int) -> Tensor:
        """float32 (N,), NaN where there is none."""
        return torch.tensor([math.nan if cell is None else cell for cell in cells], dtype=torch.float32)


class Tags(OneClass):
    """A class a word, as a list of names or numbers; a text without tags has none."""

    what = "tags"

    def read(self, value: Any) -> Cell:
        if value is None:
            return None
        if not isinstance(value, list):
            raise ValueError(f"a list of tags is expected, and this is {value!r}")
        return [str(tag).strip() for tag in value]

    def labels(self, cell: Cell) -> Iterable[str]:
        return cell or ()

    def targets(self, cells: Sequence[Cell], number_of: Mapping[str, int], classes: int) -> Tensor:
        """int64 (N,): 0, or IGNORE where a text has no tags; these themselves belong to its tokens."""
        return torch.tensor([IGNORE if cell is None else 0 for cell in cells])


def numbers_of(names: Sequence[str], given: bool) -> dict[str, int]:
    """What stands in cells -> the number of its class. given: whether somebody named the classes in this order; their
    numbers then name them too, unless one of the names is itself a number."""
    number_of = {name: number for number, name in enumerate(names)}
    if given and not any(name.isdecimal() for name in names):
        number_of |= {str(number): number for number in range(len(names))}
    return number_of


KINDS = ("class", "classes", "number", "tags", "embedding")


def cells_of(target: str, separator: str) -> OneClass:
    """What the cells of a column hold, by the target of the task."""
    if target == "classes":
        return SeveralClasses(separator)
    return {"class": OneClass, "embedding": OneClass, "number": Number, "tags": Tags}[target]()
