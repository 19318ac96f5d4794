"""Drawings inside a page: colours of the style sheet, text as text, identifiers of their own."""

from __future__ import annotations

import re

import pytest

from kdctl.report import plots
from kdctl.report.plots import Series
from kdctl.report.svg import INK, SERIES

SERIES_OF_TWO = [Series("a <b>", [1, 2, 3], [0.00125, 0.5, 1.0], 0), Series("b", [1, 2, 3], [3.0, 2.0, 1.0], 1)]


def test_a_drawing_of_lines():
    drawn = plots.lines("key", "A title", SERIES_OF_TWO, "epoch", "loss", "from 1 to 3 & back")
    assert drawn.startswith('<svg class="plot" viewBox="0 0 360 ') and drawn.endswith("</svg>")
    assert '<title id="key-t">A title</title><desc id="key-d">from 1 to 3 &amp; back</desc>' in drawn
    assert "var(--ink)" in drawn and "var(--s0)" in drawn and "var(--s1)" in drawn
    assert not any(colour in drawn for colour in (INK, *SERIES)) and "<metadata" not in drawn and "xlink" not in drawn
    assert ">a &lt;b&gt;</text>" in drawn and "font-family" not in drawn and "DejaVu" not in drawn
    assert len(re.findall("stroke-dasharray", drawn)) >= 1  # the second line, also for those who see no colour
    ids = re.findall(r' id="([^"]*)"', drawn)
    assert len(ids) == len(set(ids)) and all(name.startswith("key-") for name in ids)


def test_the_same_drawing_twice_and_under_another_key():
    one, same = (plots.lines("k", "t", SERIES_OF_TWO, "x", "y", "d") for _ in range(2))
    other = plots.lines("other", "t", SERIES_OF_TWO, "x", "y", "d")
    assert one == same
    ids = [set(re.findall(r' id="([^"]*)"', drawn)) for drawn in (one, other)]
    assert ids[0] and not ids[0] & ids[1]


def test_numbers_at_axes_are_whole_although_coordinates_are_short():
    series = [Series("lr", [1, 2, 3], [0.0012, 0.0008, 0.0004])]
    drawn = plots.lines("k", "t", series, "epoch", "lr", "d")
    assert ">0.0012<" in drawn or ">0.0010<" in drawn
    assert not re.search(r'[ "]\d+\.\d{3}', "".join(re.findall(r' (?:x|y|d)="[^"]*"', drawn)))


def test_powers_of_ten_are_plain_text():
    drawn = plots.lines("k", "t", [Series("a", [1, 2], [3e-3, 2e4])], "epoch", "loss", "d", log=True)
    assert "mathdefault" not in drawn and ">0.01<" in drawn and ">10k<" in drawn


@pytest.mark.parametrize("shade", [0.0, 0.3, 0.5, 0.55, 0.6, 1.0])
def test_ink_on_a_shade_can_be_read(shade):
    ink = plots._ink_on((shade, shade, shade, 1.0))
    linear = ((shade + 0.055) / 1.055) ** 2.4 if shade > 0.04 else shade / 12.92
    contrast = (linear + 0.05) / 0.05 if ink == "#000000" else 1.05 / (linear + 0.05)
    assert contrast >= 4.5


def test_a_heat_map_of_one_cell_and_bars_of_nothing_but_one():
    assert ">1.00<" in plots.heat("k", "t", [[1.0]], ["a"], ["b"], "x", "y", "d", numbers=True)
    assert ">5 bytes<" in plots.bars("k", "t", [("one", 5, 0)], lambda v: f"{v} bytes", "bytes", "d")
