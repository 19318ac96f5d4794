"""The page in Chromium: no request, no complaint, every figure visible on a telephone and a screen, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, find_browser

PROGRAM = find_browser()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium: `apt-get install chromium` (Debian) brings it")

FIGURES = """[...document.querySelectorAll('figure svg')].map(svg => {
  const box = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll('text')].map(text => text.getBoundingClientRect());
  return {
    title: svg.querySelector('title').textContent, left: box.left, right: box.right, width: box.width,
    height: box.height, marks: svg.querySelectorAll('path, use, image').length,
    outside: texts.filter(t => t.left < -1 || t.right > innerWidth + 1).length,
    size: Math.min(...[...svg.querySelectorAll('text')].map(
      text => parseFloat(getComputedStyle(text).fontSize) * box.width / svg.viewBox.baseVal.width)),
  };
})"""
COLOURS = """[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor,
  getComputedStyle(document.querySelector('figure svg text')).fill]"""
INK, PAPER = {"light": "rgb(27, 31, 36)", "dark": "rgb(230, 233, 236)"}, {"light": "255", "dark": "rgb(20, 23, 26)"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    opened = Browser(PROGRAM, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def page(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("page") / "report.html"
    place.write_text(text)
    return place


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_as_a_reader_sees_it(browser: Browser, page: Path, width: int, scheme: str) -> None:
    browser.open(page, width, scheme)
    assert browser.complaints() == []
    assert browser.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    figures: list[dict[str, Any]] = browser.evaluate(FIGURES)
    assert len(figures) >= 18
    for figure in figures:
        assert figure["width"] > 300 and figure["height"] > 60 and figure["marks"] > 2, figure
        assert figure["left"] >= 0 and figure["right"] <= width and figure["outside"] == 0, figure
        assert figure["size"] >= 9, figure
    text, paper, in_drawing = browser.evaluate(COLOURS)
    assert text == in_drawing == INK[scheme] and PAPER[scheme] in paper


def test_complaints_are_heard(browser: Browser, tmp_path: Path) -> None:
    """The checks above can fail."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<body style='width: 900px'><script>console.error('no'); missing()</script>"
        "<img src='http://example.invalid/a.png'>"
    )
    browser.open(bad, 390, "light")
    assert len(browser.complaints()) >= 3
    assert browser.evaluate("document.documentElement.scrollWidth") > 390
