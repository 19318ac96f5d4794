"""The samples that an analysis looks at, and the models that it asks about them."""

from __future__ import annotations

from kdctl.data.base import Split
from kdctl.data.prepare import stratified
from kdctl.signals import IGNORE

MOST = 2000
"""How many samples are looked at, at most."""


def some_of(split: Split, most: int = MOST) -> Split:
    """At most so many labelled samples, the same ones every time, each class in its proportion; without any label, so
    many of all."""
    rows = stratified(split.strata, 0)
    known = rows[split.strata[rows] != IGNORE]
    return split.subset((known if len(known) else rows)[:most].sort().values)
