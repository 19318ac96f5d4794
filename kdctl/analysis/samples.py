"""The samples that an analysis looks at, and the models that it asks about them."""

from __future__ import annotations

from kdctl.data.base import Split
from kdctl.data.prepare import Data, stratified
from kdctl.signals import IGNORE

MOST = 2000
"""How many samples are looked at, at most."""


def chosen_split(data: Data) -> str:
    """The name of the split that a run is measured on: test, else validation, else training."""
    return next(name for name in ("test", "val", "train") if getattr(data, name) is not None)


def some_of(split: Split, most: int = MOST) -> Split:
    """At most so many labelled samples, the same ones every time, each class in its proportion."""
    rows = stratified(split.strata, 0)
    return split.subset(rows[split.strata[rows] != IGNORE][:most].sort().values)
