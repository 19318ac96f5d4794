"""The drawings of a report, each from plain values: what is told apart by colour has its own marker or dash as well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from kdctl.report.svg import DASHES, FAINT, INK, MARKERS, PAPER, SERIES, drawing, markup

ROLES = ["student", "baseline", "teacher"]
"""Whose colour, marker and dash are the same in every drawing; `baseline` is the control without a teacher."""

_MOST_MARKERS = 10
_NUMBERED_CELLS = 8
"""Up to which size a heat map has its numbers written into it."""


@dataclass(frozen=True)
class Series:
    """A named line through points; look: which of the six looks it has."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    look: int = 0


def look_of(name: str, others: int = 0) -> int:
    """The look of a model by its role."""
    return ROLES.index(name) if name in ROLES else 3 + others % 3


def _shown(name: str) -> str:
    """A name for the legend, which leaves out those that begin with an underscore."""
    return f"\u200b{name}" if name.startswith("_") else name


def lines(
    key: str, title: str, series: Sequence[Series], x: str, y: str, description: str, log: bool = False,
    whole: bool = True,
) -> Markup:  # fmt: skip
    """Lines over epochs or severities. log: y in powers of ten; whole: x counts something."""
    with drawing(2.9) as (figure, axes):
        for one in series:
            axes.plot(
                one.xs, one.ys, color=SERIES[one.look], linestyle=DASHES[one.look], marker=MARKERS[one.look],
                markevery=max(1, len(one.xs) // _MOST_MARKERS), label=_shown(one.name),
            )  # fmt: skip
        if log:
            _powers(axes, "y")
        if whole:
            axes.xaxis.get_major_locator().set_params(integer=True)
        _finish(axes, x, y, legend=len(series))
        return markup(figure, key, title, description)


def forest(key: str, title: str, rows: Sequence[dict[str, Any]], x: str, description: str) -> Markup:
    """Mean differences with their intervals, each seed's difference as a small ring, and a line at zero.

    rows: {"name", "mean", "ci95" or None, "values"}; from top to bottom.
    """
    with drawing(0.9 + 0.42 * len(rows)) as (figure, axes):
        axes.axvline(0, color=INK, linewidth=1)
        for place, row in enumerate(rows):
            values = row["values"]
            rings = {"markerfacecolor": "none", "markeredgecolor": SERIES[1], "linestyle": "none", "markersize": 5}
            axes.plot(values, [place + 0.16] * len(values), marker="o", **rings)
            if row["ci95"]:
                axes.plot(row["ci95"], [place] * 2, color=SERIES[0], linewidth=2.2, solid_capstyle="butt")
            axes.plot([row["mean"]], [place], marker="D", color=SERIES[0], markersize=6)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        _finish(axes, x, "")
        return markup(figure, key, title, description)


def reliability(key: str, title: str, series: Sequence[Series], description: str) -> Markup:
    """Accuracy against confidence in bins, both in percent; on the dotted diagonal a model means what it says."""
    with drawing(3.6) as (figure, axes):
        axes.plot([0, 100], [0, 100], color=INK, linewidth=1, linestyle=(0, (1, 2)), label="calibrated")
        for one in series:
            axes.plot(
                one.xs, one.ys, color=SERIES[one.look], linestyle=DASHES[one.look], marker=MARKERS[one.look],
                label=one.name,
            )  # fmt: skip
        axes.set(xlim=(0, 102), ylim=(0, 104))
        _finish(axes, "confidence, %", "accuracy, %", legend=3)
        return markup(figure, key, title, description)


def dots(
    key: str, title: str, names: Sequence[str], series: Sequence[tuple[str, Sequence[float | None], int]], x: str,
    description: str,
) -> Markup:  # fmt: skip
    """A row a class, a marker a model, with a line between the least and the greatest of a row."""
    with drawing(0.95 + 0.24 * len(names)) as (figure, axes):
        for place in range(len(names)):
            known = [values[place] for _, values, _ in series if values[place] is not None]
            if len(known) > 1:
                axes.plot([min(known), max(known)], [place] * 2, color=FAINT, linewidth=2, zorder=1)  # type: ignore[type-var]
        for name, values, look in series:
            points = [(value, place) for place, value in enumerate(values) if value is not None]
            axes.plot(
                [value for value, _ in points], [place for _, place in points], color=SERIES[look],
                marker=MARKERS[look], markersize=6, linestyle="none", label=name, markeredgecolor=PAPER,
                markeredgewidth=0.7,
            )  # fmt: skip
        axes.set_yticks(range(len(names)), [_short(name) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        _finish(axes, x, "", legend=2)
        return markup(figure, key, title, description)


def bars(
    key: str, title: str, rows: Sequence[tuple[str, float, int]], text: Callable[[float], str], x: str,
    description: str, log: bool = False,
) -> Markup:  # fmt: skip
    """A bar a name with its value behind it. rows: (name, value, look)."""
    with drawing(0.75 + 0.34 * len(rows)) as (figure, axes):
        for place, (_, value, look) in enumerate(rows):
            axes.barh(place, value, height=0.62, color=SERIES[look], alpha=0.85)
            axes.annotate(text(value), (value, place), (4, 0), textcoords="offset points", va="center", fontsize=10)
        axes.set_yticks(range(len(rows)), [_short(name) for name, _, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        if log:
            _powers(axes, "x")
        else:
            axes.xaxis.set_major_formatter(lambda value, _: _tick(value))
        axes.margins(x=0.28)
        axes.grid(axis="y", visible=False)
        _finish(axes, x, "")
        return markup(figure, key, title, description)


def heat(
    key: str, title: str, cells: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], x: str, y: str,
    description: str, numbers: bool = False,
) -> Markup:  # fmt: skip
    """A matrix as shades from light (0) to dark (1), with its numbers where they have room."""
    square = len(rows) / max(1, len(columns))
    with drawing(min(6.0, max(2.4, 1.1 + 3.6 * square))) as (figure, axes):
        image = axes.imshow(cells, vmin=0, vmax=1, cmap="cividis_r", aspect="auto", interpolation="nearest")
        axes.grid(visible=False)
        if rows and len(rows) <= 2 * _NUMBERED_CELLS:
            axes.set_yticks(range(len(rows)), [_short(name) for name in rows])
        if columns and len(columns) <= 2 * _NUMBERED_CELLS:
            upright = max(map(len, columns)) * len(columns) > 36
            axes.set_xticks(range(len(columns)), [_short(name) for name in columns], rotation=90 if upright else 0)
        if numbers and max(len(rows), len(columns)) <= _NUMBERED_CELLS:
            for i, row in enumerate(cells):
                for j, value in enumerate(row):
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=_ink_on(image.to_rgba(value)))
        figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05)
        _finish(axes, x, y)
        return markup(figure, key, title, description)


def scatter(key: str, title: str, points: Sequence[dict[str, Any]], x: str, y: str, description: str) -> Markup:
    """Quality against cost: {"name", "x", "y", "front"}. The front is filled diamonds on a line."""
    with drawing(3.2) as (figure, axes):
        front = sorted((p for p in points if p["front"]), key=lambda p: p["x"])
        axes.plot([p["x"] for p in front], [p["y"] for p in front], color=SERIES[0], drawstyle="steps-post", zorder=1)
        for on, marker, face in ((True, "D", SERIES[0]), (False, "o", "none")):
            mine = [p for p in points if bool(p["front"]) is on]
            axes.plot(
                [p["x"] for p in mine], [p["y"] for p in mine], linestyle="none", marker=marker, markersize=7,
                markerfacecolor=face, markeredgecolor=SERIES[0], markeredgewidth=1.4,
                label="front" if on else "behind it",
            )  # fmt: skip
        _label(axes, points)
        if all(p["x"] > 0 for p in points) and max(p["x"] for p in points) > 5 * min(p["x"] for p in points):
            _powers(axes, "x")
        axes.margins(x=0.25, y=0.2)
        _finish(axes, x, y, legend=2)
        return markup(figure, key, title, description)


def _ink_on(colour: Sequence[float]) -> str:
    """Black or white, whichever has the greater contrast on an (r, g, b, a) colour (relative luminance of WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#ffffff"


def _powers(axes: Any, which: str) -> None:
    """A logarithmic axis with plain numbers at few places."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    low, high = getattr(axes, f"get_{which}lim")()
    few = high > 100 * low
    axis.set_major_locator(LogLocator(base=10, subs=(1.0,) if few else (1.0, 2.0, 5.0), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _tick(value: float) -> str:
    """A number at an axis: 0.02, 5, 20k, 5M."""
    for least, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= least:
            return f"{value / least:g}{name}"
    return f"{value:g}"


def _label(axes: Any, points: Sequence[dict[str, Any]]) -> None:
    """The name of each point beside it: above and to the left of the front, below and to the right behind it."""
    for point in points:
        offset, side = ((-3, 6), "right") if point["front"] else ((3, -14), "left")
        axes.annotate(
            _short(point["name"]), (point["x"], point["y"]), offset, textcoords="offset points", ha=side,
            fontsize=10,
        )  # fmt: skip


def _short(name: str, most: int = 18) -> str:
    return name if len(name) <= most else name[: most - 3] + "..."


def _finish(axes: Any, x: str, y: str, legend: int = 0) -> None:
    """Names of the axes and, for several series, the legend above the drawing, where it hides nothing."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if legend > 1:
        columns = 2 if legend in (2, 4) else 3
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=columns, borderaxespad=0.2, columnspacing=1.2)
