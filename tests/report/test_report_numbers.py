"""Numbers as people read them, each with its whole value behind it."""

from __future__ import annotations

import math

import pytest

from kdctl.report import numbers as n
from kdctl.report.price import front


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        (n.two_places, 1234.567, "1,234.57"), (n.signed_text, -0.5, "-0.50"), (n.count_text, 65834, "65,834"),
        (n.bytes_text, 999, "999 bytes"), (n.bytes_text, 18714, "18.7 kB"), (n.bytes_text, 123456789, "123.5 MB"),
        (n.large_text, 40551040, "40.6 M"), (n.large_text, 12, "12"), (n.millis_text, 0.5104, "0.510 ms"),
        (n.millis_text, 49.67, "49.7 ms"), (n.seconds_text, 0.25, "0.2 s"), (n.seconds_text, 119.0, "119 s"),
        (n.seconds_text, 300, "5.0 min"), (n.seconds_text, 7200, "2.0 h"), (n.p_text, 0.0004, "< 0.001"),
        (n.p_text, 0.04567, "0.046"), (n.text_of("nll"), 0.12345, "0.1235"), (n.text_of("top1"), 97.866, "97.87"),
    ],
)  # fmt: skip
def test_text(text, value, expected):
    assert text(value) == expected


def test_an_element_holds_the_whole_number_and_where_it_is_from():
    assert n.percent(97.86666666666667) == '<data value="97.86666666666667">97.87</data>'
    assert n.difference("top1", 97.5, 96.0) == (
        '<data value="1.5" data-from="97.5 - 96.0" title="97.5 - 96.0">+1.50</data>'
    )
    assert 'data-from="10 / 4"' in n.ratio(10, 4) and ">2.5 x<" in n.ratio(10, 4)
    assert '<data value="0.75" data-from="sum of a&lt;b"' in n.total([0.5, 0.25], n.two_places, "a<b")


@pytest.mark.parametrize("value", [None, math.nan, math.inf, True, "1", [1]])
def test_what_is_no_number_is_a_dash_never_zero(value):
    assert n.percent(value) == n.NONE and "0" not in n.NONE
    assert n.difference("top1", value, 1.0) == n.difference("top1", 1.0, value) == n.ratio(value, 2) == n.NONE


def test_interval():
    shown = n.interval("top1", {"mean": 1.0, "ci95": [0.5, 1.5]}, signed=True)
    assert '<data value="1.0">+1.00</data>' in shown and '[<data value="0.5">+0.50</data>, ' in shown
    assert n.interval("top1", {"mean": 1.0, "ci95": None}) == '<data value="1.0">1.00</data>'
    assert n.interval("top1", None) == n.NONE


def test_what_files_say_is_escaped():
    assert n.said("<b>") == '<span class="said">&lt;b&gt;</span>'


def test_front():
    def point(name: str, x: float, y: float) -> dict[str, object]:
        return {"name": name, "x": x, "y": y}

    points = [point("a", 1, 1), point("b", 2, 2), point("c", 2, 1), point("d", 3, 2), point("twin", 1, 1)]
    assert [p["name"] for p in front(points) if p["front"]] == ["a", "b", "twin"]


def test_a_seed_is_a_name():
    assert ">2024<" in n.name(2024)
