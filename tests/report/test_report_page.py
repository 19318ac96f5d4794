"""The page of a report: every number of it stems from a file, nothing of it from elsewhere, and nothing breaks it."""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_runs import CONTROLS, make_group, make_run, write

from kdctl.report import claims, origin, plots, quality
from kdctl.report.blocks import Figures, Matrix, Table
from kdctl.report.compare import compare
from kdctl.report.facts import RunFacts, collect
from kdctl.report.page import render, write_report
from kdctl.report.side_by_side import comparison
from kdctl.runs import Run

UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "k": 1e3, "M": 1e6, "G": 1e9, "min": 60, "h": 3600}
EXEMPT = ("style", "title", "svg", "pre", "script")
"""Elements whose numbers are not held against files: those of drawings are (their descriptions), axes aside."""


@dataclass
class Page(HTMLParser):
    """A page taken apart: numbers (value, source, text), words of files, other texts, words of drawings, tags."""

    numbers: list[tuple[str, str | None, str]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    drawings: list[str] = field(default_factory=list)
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "path", "use", "rect", "image", "line", "circle"):
            self._open.append((tag, dict(attrs)))
        if ("class", "said") in attrs:
            self.said.append("")

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1][0] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        inside = [tag for tag, _ in self._open]
        if inside and inside[-1] == "data":
            attributes = self._open[-1][1]
            self.numbers.append((str(attributes["value"]), attributes.get("data-from"), data))
        elif any(attributes.get("class") == "said" for _, attributes in self._open):
            self.said[-1] += data
        elif inside and inside[-1] == "desc":
            self.drawings.append(data)
        elif not set(EXEMPT) & set(inside):
            self.texts.append(data)


def take_apart(text: str) -> Page:
    page = Page()
    page.feed(text)
    return page


def values_in(document: Any) -> Iterator[Any]:
    if isinstance(document, dict):
        for key, value in document.items():
            yield key
            yield from values_in(value)
    elif isinstance(document, list):
        for value in document:
            yield from values_in(value)
    else:
        yield document


def files_of(runs: list[Run], group: Path | None) -> list[Any]:
    """Every JSON document of the runs and their group."""
    paths = [path for run in runs for path in sorted(run.path.rglob("*.json"))]
    documents = [json.loads(path.read_text()) for path in [*paths, *([group] if group else [])]]
    return documents + [line for run in runs for line in run.metrics()]


def checked(value: float, source: str | None, known: set[float], runs: list[Run]) -> bool:
    """Whether a number is in a file, or comes from such numbers as it says."""
    if source is None:
        return value in known
    summed = re.fullmatch(r"sum of times\.(\w+) of metrics\.jsonl, stage (\S+)", source)
    if summed:
        section, stage = summed.groups()
        return value == math.fsum(line["times"].get(section, 0) for line in runs[0].metrics() if line["stage"] == stage)
    assert re.fullmatch(r"[-\d.e+]+( [-*/] [-\d.e+]+){1,2}", source), source
    parts = [float(part) for part in re.split(r" [-*/] ", source)]
    assert all(part in known or part == 100 for part in parts), source
    return bool(value == eval(source))  # numbers and signs alone: see the expression above


def fits(value: float, text: str) -> bool:
    """Whether a text is the value, rounded to the places that it shows."""
    found = re.fullmatch(r"([-+]?[\d,]*\.?\d+(?:e[-+]\d+)?) ?(\w*)", text)
    if text == "< 0.001":
        return value < 0.001
    assert found is not None, text
    number, unit = found.groups()
    factor = UNITS.get(unit, 1)
    places = len(number.split(".")[1].split("e")[0]) if "." in number else 0
    step = 10.0**-places * (10 ** float(number.split("e")[1]) if "e" in number else 1)
    return abs(float(number.replace(",", "")) * factor - value) <= (0.5000001 * step) * factor


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return take_apart(text)


# -------------------------------------------------------------------------------------------------------------- numbers


def test_every_number_is_in_a_file_of_the_runs(page: Page, group: tuple[list[Run], Path]) -> None:
    runs, path = group
    known = {float(v) for v in values_in(files_of(runs, path)) if isinstance(v, int | float)}
    assert len(page.numbers) > 400
    wrong = [n for n in page.numbers if not checked(float(n[0]), n[1], known, runs)]
    assert wrong == []


def test_every_text_is_its_number_rounded(page: Page) -> None:
    assert [n for n in page.numbers if not fits(float(n[0]), n[2])] == []


def test_no_decimal_number_stands_alone(page: Page) -> None:
    assert [t for t in page.texts if re.search(r"\d\.\d", t)] == []


def test_what_files_say_is_said_word_for_word(page: Page, group: tuple[list[Run], Path]) -> None:
    runs, path = group
    words = [str(v) for v in values_in(files_of(runs, path)) if v is not None]
    words += [str(run) for run in runs] + [
        "kdctl train 'a b.yaml' --seeds",
        "kdctl train x.yaml",
        "an <i>added</i> note",
    ]
    words += ["control (no teacher)", "stage teacher", "stage student"]  # of curves
    whole = "\n".join(words)
    assert [s for s in page.said if s not in whole and not re.fullmatch(r"[\d-]+ [\d:]+ UTC|\d+\.\d+\.\d+", s)] == []


def test_numbers_in_descriptions_of_drawings_are_those_of_the_page_or_of_files(
    page: Page, group: tuple[list[Run], Path]
) -> None:
    runs, path = group
    known = [float(v) for v in values_in(files_of(runs, path)) if isinstance(v, int | float)]
    known += [float(value) for value, _, _ in page.numbers]
    told = [m for d in page.drawings for m in re.findall(r"[-+]?\d[\d,]*\.\d+(?:e[-+]\d+)?(?: (?:kB|MB|ms|min))?", d)]
    assert len(told) > 50
    assert [t for t in told if not any(fits(v, t) for v in known)] == []


def test_numbers_are_held_against_files() -> None:
    """The checks above can fail."""
    assert not checked(1.25, None, {1.5}, [])
    assert not checked(1.0, "3.0 - 1.5", {3.0, 1.5}, [])
    with pytest.raises(AssertionError):
        checked(1.5, "3.0 - 1.5", {3.0}, [])
    assert fits(97.866, "97.87") and not fits(97.866, "97.86")
    assert fits(18714, "18.7 kB") and not fits(18764, "18.7 kB")
    bad = take_apart("<p>gains 1.5 points <data value='2'>2.00</data></p>")
    assert bad.texts == ["gains 1.5 points "] and bad.numbers == [("2", None, "2.00")]


# --------------------------------------------------------------------------------------------------------- what it says


def test_the_claim_comes_first_and_is_that_of_the_group(text: str, group: tuple[list[Run], Path]) -> None:
    statements = json.loads(group[1].read_text())["result"]["statements"]
    about = "Student against control (no teacher), top-1, %: "
    claim = text.index(f'<p class="claim">{about}<span class="said">{html.escape(statements[0])}')
    assert claim < text.index("<table") and statements[1] in text


def test_the_last_epoch_stands_below_the_best(text: str, group: tuple[list[Run], Path]) -> None:
    last = json.loads((group[0][0] / "summary.json").read_text())["student"]["last"]["test"]["top1"]
    assert f'<th scope="row">its last epoch</th><td class="num"><data value="{last!r}">' in text


def test_the_sections_are_there_in_order(page: Page, text: str) -> None:
    found = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert found == [
        "summary", "seeds", "curves", "fidelity", "calibration", "classes", "robustness", "layers", "cost", "origin",
        "limits",
    ]  # fmt: skip
    assert 'class="missing"' not in text
    assert all(f'href="#{anchor}"' in text for anchor in found)


def test_all_controls_stand_beside_the_student(text: str) -> None:
    seeds = text[text.index('id="seeds"') : text.index('id="curves"')]
    for control in CONTROLS[1:]:
        assert f">{control.replace('_', ' ')}<" in seeds and f"{control}: no evidence, p = 0.375" in seeds
    assert seeds.count(">placebo<") == 2


def test_drawings_have_words(page: Page, text: str) -> None:
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawings) >= 18 and len(page.drawings) == len(drawings)
    ids = {attributes.get("id") for _, attributes in page.tags}
    for attributes in drawings:
        assert attributes["role"] == "img"
        assert set(str(attributes["aria-labelledby"]).split()) <= ids
    assert text.count("<figure>") == text.count("<figcaption>") == len(drawings)
    assert "student from" in " ".join(page.drawings) and re.search(r"control \(no teacher\): [-+]\d", page.drawings[0])


# ------------------------------------------------------------------------------------------------------- one whole file


def test_nothing_is_fetched(page: Page, text: str) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object"), tag
        for name in ("src", "href", "xlink:href"):
            assert str(attributes.get(name, "#")).startswith(("#", "data:")), (tag, attributes)
    assert not re.search(r"url\((?!#)|@import|https?://", text)


def test_identifiers_are_unique_and_what_is_pointed_at_is_there(page: Page, text: str) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    pointed = re.findall(r'(?:url\(#|href="#)([^)"]+)', text)
    assert pointed and set(pointed) <= set(ids)


def test_the_head_says_what_a_browser_needs(text: str) -> None:
    for part in ('<html lang="en">', "width=device-width", "<title>made: report of kdctl</title>", "@media print"):
        assert part in text
    assert 'http-equiv="refresh"' not in text


def test_what_files_hold_is_no_markup(page: Page, text: str) -> None:
    assert not {"b", "i", "eval"} & {tag for tag, _ in page.tags}
    assert "&lt;b&gt;bold&lt;/b&gt;" in text and "an &lt;i&gt;added&lt;/i&gt; note" in text


def test_the_same_files_give_the_same_page(text: str, group: tuple[list[Run], Path]) -> None:
    facts = collect([group[0][0]])
    for section in (claims.seeds(facts), quality.layers(facts, "")):
        drawings = [figure.svg for block in section.blocks if isinstance(block, Figures) for figure in block.figures]
        assert drawings and all(drawing in text for drawing in drawings)


def contrast(one: str, other: str) -> float:
    """Contrast of two colours by WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("number", [0, 1], ids=["light", "dark"])
def test_colours_have_contrast(text: str, number: int) -> None:
    part = re.findall(r":root \{(.*?)\}", text, re.DOTALL)[number]
    colours = dict(re.findall(r"(--\w+): (#\w{6})", part))
    for name in ("--ink", "--soft", "--accent"):
        assert contrast(colours[name], colours["--paper"]) >= 4.5
        assert contrast(colours[name], colours["--tint"]) >= 4.5
    for i in range(6):
        assert contrast(colours[f"--s{i}"], colours["--paper"]) >= 4.5
    shaded = "#" + "".join(
        f"{round(0.38 * int(colours['--accent'][i : i + 2], 16) + 0.62 * int(colours['--paper'][i : i + 2], 16)):02x}"
        for i in (1, 3, 5)
    )
    assert contrast(colours["--ink"], shaded) >= 4.5


def test_the_page_of_thirty_five_runs_is_below_a_megabyte(text: str, group: tuple[list[Run], Path]) -> None:
    assert len(collect([group[0][0]]).members) == 35
    assert 100_000 < len(text.encode()) < 1_000_000


# ---------------------------------------------------------------------------------------------------- what is not there


def test_a_run_alone_shows_nothing_about_its_teacher(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", whole=False)
    text = html.unescape(render(collect([run])))
    assert "One run, no control: nothing is shown about the teacher's help." in text
    for command in ("kdctl train CONFIG --with-baseline", f"kdctl report {run}", f"kdctl bench {run}"):
        assert f"<code>{command}" in text
    for line in ("Robustness is not measured", "The layers are not compared", "There is no provenance.json"):
        assert line in text


def test_a_run_that_is_training_shows_what_is_there(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", status="running")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"stage": "stud')  # as a reader may meet it
    place, facts = write_report([run], refresh=True)
    text = place.read_text()
    assert facts.training and '<meta http-equiv="refresh" content="3">' in text
    assert "is running: the report shows what is there so far" in text and 'id="stage1-loss-t"' in text
    assert 'id="stage1-share-t"' in text
    run.update(status="done")
    assert "refresh" not in write_report([run], refresh=True)[0].read_text()


def test_a_group_is_training_until_it_is_summed_up(tmp_path: Path) -> None:
    runs, path = make_group(tmp_path / "runs", seeds=1, controls=("baseline",))
    document = json.loads(path.read_text())
    result = document.pop("result")
    write(path, document | {"members": [*document["members"], {"role": "main", "seed": 1, "run": None}]})
    facts = collect([runs[0]])
    assert facts.training and "2 of 3 runs of the group are done" in str(claims.summary(facts).blocks[0])
    write(path, document | {"result": result})
    assert not collect([runs[0]]).training
    runs[1].update(status="failed")
    write(path, document)
    assert not collect([runs[0]]).training


def test_a_control_brings_its_student(group: tuple[list[Run], Path]) -> None:
    runs, _ = group
    facts = collect([runs[1]])
    assert runs[1].info["role"] == "control" and facts.lead.run.path == runs[0].path and len(facts.members) == 35
    seed_one = next(run for run in runs if run.info["role"] == "main" and run.info["seed"] == 1)
    lead = collect([seed_one])
    assert lead.lead.run.path == seed_one.path
    control = lead.control()
    assert control is not None and control.seed == 1 and control.name == "baseline"


def test_a_damaged_or_missing_file_is_noted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    (run / "analysis/cka.json").write_text("{")
    facts = collect([run])
    assert "The layers are not compared" in str(quality.layers(facts, "").blocks)
    assert "cka.json: the file is damaged" in str(origin.limits(facts, []).blocks)


@pytest.mark.parametrize("text", ["{", "[1]", "{}"])
def test_a_damaged_analysis_is_measured_anew(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path / "runs")
    (run / "student.safetensors").touch()
    for name in ("cka", "robustness", "cost"):
        os.utime(run / f"analysis/{name}.json")
    assert RunFacts(run).lacking == []
    (run / "analysis/cost.json").write_text(text)
    assert RunFacts(run).lacking == ["cost"]


@pytest.mark.parametrize(("size", "tables", "heats"), [(20, 2, 0), (60, 0, 2), (101, 0, 0)])
def test_confusions_by_the_number_of_classes(tmp_path: Path, size: int, tables: int, heats: int) -> None:
    run = make_run(tmp_path / "runs", classes=[f"class {i}" for i in range(size)])
    blocks = quality.classes(collect([run])).blocks
    assert sum(isinstance(block, Matrix) for block in blocks) == tables
    drawn = "".join(figure.svg for block in blocks if isinstance(block, Figures) for figure in block.figures)
    assert len(re.findall(r'id="confusion-\w+-t"', drawn)) == heats
    captions = [str(block.caption) for block in blocks if isinstance(block, Table)]
    assert ("The 20 worst of 101 classes of the student" in captions) is (size == 101)
    assert "What the student confuses most" in captions


def test_texts_have_no_corruptions(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    for name in ("cka", "cost"):
        os.utime(run / f"analysis/{name}.json")
    (run / "analysis/robustness.json").unlink()
    assert RunFacts(run).lacking == ["robustness"]
    write(run / "student.json", {"tokens": {"vocab_size": 9}})
    assert RunFacts(run).lacking == []
    assert "corruptions are of images" in str(quality.robustness(collect([run]), "").blocks)


def test_a_class_without_samples_is_not_the_worst(tmp_path: Path) -> None:
    matrix = [[0] * 25, *([0] * i + [5] + [0] * (24 - i) for i in range(1, 25))]
    matrix[7][3] = 20
    shares = [[v / max(1, sum(row)) for v in row] for row in matrix]
    figure = quality._confusion_heat("student", matrix, shares, list(map(str, range(25))))
    assert "that of 7, 20.0 %" in str(figure.svg)


def test_names_that_a_legend_would_leave_out() -> None:
    series = [plots.Series("_mine", [1, 2], [1.0, 2.0], 0), plots.Series("kd", [1, 2], [2.0, 1.0], 1)]
    assert "_mine" in str(plots.lines("x", "t", series, "x", "y", "d"))


# --------------------------------------------------------------------------------------------------------- several runs


def test_several_runs_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = make_run(Path("runs"), "one", whole=False), make_run(Path("runs"), "two", whole=False)
    second.config.write_text(second.config.read_text().replace("epochs: 6}", "epochs: 7}"))
    monkeypatch.setattr("kdctl.report.page.sections", lambda facts, notes: [comparison(facts)])
    text = render(collect([first, second]))
    document = compare([str(first), str(second)])
    page = take_apart(text)
    known = {float(v) for v in values_in(document) if isinstance(v, int | float)}
    assert {float(value) for value, source, _ in page.numbers if source == "kdctl compare"} <= known
    assert [row["what"] for row in document["rows"]] == ["runs/one/001", "runs/two/001"]
    assert {"runs/one/001", "runs/two/001", "stages.teacher.epochs", "6", "7"} <= set(page.said)
    gap = document["rows"][1]["against_baseline"]["mean"]
    assert f'<data value="{gap!r}" data-from="kdctl compare"' in text
