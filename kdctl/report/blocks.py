"""What a page is made of: sections of paragraphs, tables, figures and texts to unfold. The template knows no more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from kdctl.report.numbers import NONE

Cell = str | Markup


@dataclass(frozen=True)
class Prose:
    """A paragraph. kind: its place in the style sheet (`claim`, `note`, `missing`, ...)."""

    text: Cell
    kind: str = ""
    name = "prose"


@dataclass(frozen=True)
class Items:
    """A list of paragraphs."""

    items: Sequence[Cell]
    name = "items"


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is its head. tall: many rows, which scroll in a box of their own."""

    caption: Cell
    head: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    note: Cell = ""
    tall: bool = False
    name = "table"

    @property
    def numeric(self) -> list[bool]:
        """Of each column whether it holds numbers alone: those stand right."""
        columns = list(zip(*self.rows, strict=True)) or [() for _ in self.head]
        return [
            all(isinstance(cell, Markup) and (cell == NONE or cell.startswith("<data")) for cell in column)
            for column in columns
        ]


@dataclass(frozen=True)
class Matrix:
    """A square table of counts, each cell shaded by its share of the row. names: of rows and columns."""

    caption: Cell
    corner: Cell
    names: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    shades: Sequence[Sequence[float]]
    """In [0, 1]."""
    name = "matrix"


@dataclass(frozen=True)
class Figure:
    """A drawing with its caption."""

    svg: Markup
    caption: Cell


@dataclass(frozen=True)
class Figures:
    """Figures side by side where there is room."""

    figures: Sequence[Figure]
    name = "figures"


@dataclass(frozen=True)
class Verbatim:
    """A text of a file, to unfold."""

    summary: Cell
    text: str
    name = "verbatim"


Block = Prose | Items | Table | Matrix | Figures | Verbatim


@dataclass
class Section:
    """A part of the page. anchor: its id, and where the contents lead."""

    anchor: str
    title: str
    blocks: list[Block] = field(default_factory=list)

    def missing(self, text: str, command: str | None = None) -> Section:
        """One line on what is absent and which command brings it; returns the section."""
        words = (
            Markup("{}: <code>{}</code> brings it.").format(text, command) if command else Markup("{}.").format(text)
        )
        self.blocks.append(Prose(words, "missing"))
        return self
