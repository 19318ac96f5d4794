"""Matplotlib's drawings as SVG that lives inside a page: its colours follow light and dark, its text is text.

A drawing is made with placeholder colours, which become variables of the page's style sheet; identifiers are made
unique to the drawing, and nothing in it depends on the day, so that equal numbers give equal bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from markupsafe import Markup

WIDTH = 5.0
"""Of every drawing, in inches of 72 points: 360 points are about what a telephone shows, so text keeps its size."""

INK, FAINT, PAPER = "#000001", "#000002", "#000003"
SERIES = [f"#0000a{i}" for i in range(6)]
_VARIABLES = {INK: "--ink", FAINT: "--rule", PAPER: "--paper"} | {c: f"--s{i}" for i, c in enumerate(SERIES)}

MARKERS = ["o", "s", "^", "D", "v", "P"]
DASHES = ["-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1, 1, 1)), (0, (8, 3))]

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 10, "font.family": "DejaVu Sans", "axes.titlesize": 10,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": INK, "ytick.color": INK,
    "grid.color": FAINT, "grid.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True, "axes.facecolor": "none",
    "figure.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "legend.fontsize": 10, "xtick.labelsize": 10, "ytick.labelsize": 10, "lines.linewidth": 1.6,
    "lines.markersize": 4.5, "xtick.major.size": 0, "ytick.major.size": 0, "legend.handlelength": 2.6,
    "text.parse_math": False, "axes.unicode_minus": False,
}  # fmt: skip


@contextmanager
def drawing(height: float) -> Iterator[tuple[Any, Any]]:
    """A figure of the common width and its axes, in the common style; height in inches."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.add_subplot()


def markup(figure: Any, key: str, title: str, description: str) -> Markup:
    """The figure as an element of a page. key: unique on the page; title and description are read out for it."""
    import matplotlib

    target = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": key}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # text stays text: the browser has the font
        figure.get_layout_engine().execute(figure)
        figure.set_layout_engine("none")  # else it would be laid out twice more
        figure.savefig(target, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"\s*\n\s*", " ", text).replace("> <", "><").replace("xlink:href", "href")
    text = _own_identifiers(text, key)
    text = re.sub(r"<[^>]*>", _shortened, text)
    text = re.sub(r"font: (\S+px) [^;\"]*(?=[;\"])", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]*; ?", "", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    head = Markup('<svg class="plot" viewBox="{0}" role="img" aria-labelledby="{1}-t {1}-d">').format(_box(text), key)
    head += Markup('<title id="{0}-t">{1}</title><desc id="{0}-d">{2}</desc>').format(key, title, description)
    return head + Markup(text[text.index(">") + 1 :].strip())


def _shortened(tag: re.Match[str]) -> str:
    """A tag whose coordinates have two places: hundredths of a point are not seen."""
    return re.sub(r"(\d\.\d\d)\d+", r"\1", tag.group())


def _box(text: str) -> str:
    found = re.search(r'viewBox="([^"]*)"', text)
    assert found is not None
    return found.group(1)


def _own_identifiers(text: str, key: str) -> str:
    """Identifiers that something in the drawing points to, with the key before them; the others are left out."""
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))

    def name(found: re.Match[str]) -> str:
        return f' id="{key}-{found.group(1)}"' if found.group(1) in used else ""

    text = re.sub(r' id="([^"]*)"', name, text)
    return re.sub(r"(url\(#|href=\"#)", rf"\g<1>{key}-", text)
