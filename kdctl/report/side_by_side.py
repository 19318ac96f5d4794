"""The section of a report on several runs: a row each, what differs in their files, and which nothing beats."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from kdctl.report import numbers as n
from kdctl.report import plots
from kdctl.report.blocks import Cell, Figure, Figures, Items, Section, Table
from kdctl.report.compare import compare
from kdctl.report.facts import Document, Facts
from kdctl.report.numbers import NONE, said, shown, unit_of

SOURCE = "kdctl compare"
"""Where the numbers of this section come from, means and differences over seeds among them."""


def comparison(facts: Facts) -> Section:
    """The runs that were named, each standing for its group, as `kdctl compare` compares them."""
    section = Section("comparison", "Runs side by side")
    document = compare([str(run.run.path) for run in (facts.lead, *facts.others)])
    rows: list[list[Cell]] = [_row(row) for row in document["rows"]]
    metric = next((row["metric"] for row in document["rows"] if row["metric"]), facts.primary)
    head: list[Cell] = [
        "run", "student", "trained by", "seeds", unit_of(metric), "against the first",
        "agreement, %", "bytes", "parameters", "MACs", "latency",
    ]  # fmt: skip
    caption = Markup("Each against {}").format(said(document["baseline"]))
    section.blocks.append(Table(caption, head, rows, "Latency: median of one image in ms."))
    figures = [f for f in (_front(document, cost, metric) for cost in document["pareto"]) if f]
    if figures:
        section.blocks.append(Figures(figures))
    if document["differences"]:
        section.blocks.append(_differences(document))
    if document["notes"]:
        section.blocks.append(Items([said(note) for note in document["notes"]]))
    return section


def _row(row: Document) -> list[Cell]:
    gap, value = row["against_baseline"], row["value"] or {}

    def of(number: Any, text: Any) -> Markup:
        return shown(number, text, SOURCE)

    signed = of(gap["mean"], n.signed_text) if gap else NONE
    if gap and gap["ci95"]:
        ends = Markup(", ").join(of(end, n.signed_text) for end in gap["ci95"])
        signed = Markup('{} <span class="ci">[{}]</span>').format(signed, ends)
    return [
        said(row["what"]), said(row["student"] or "-"), said(row["method"] or "-"), of(row["seeds"], n.count_text),
        of(value.get("mean"), n.two_places), signed, of(row["agreement"], n.two_places),
        of(row["bytes"], n.bytes_text), of(row["parameters"], n.count_text), of(row["macs"], n.large_text),
        of(row["latency_ms"], n.millis_text),
    ]  # fmt: skip


def _front(document: Document, cost: str, metric: str) -> Figure | None:
    points = [
        {"name": _last(row["what"]), "x": float(row[cost]), "y": row["value"]["mean"], "front": row["pareto"][cost]}
        for row in document["rows"]
        if row["value"] and n.is_number(row[cost]) and row["pareto"][cost] is not None
    ]
    if len(points) < 2:
        return None
    what, unit = ("bytes", "bytes") if cost == "bytes" else ("latency", "ms for one image")
    told = "; ".join(f"{p['name']}: {p['y']:.2f} at {p['x']:,g}" + (" (front)" if p["front"] else "") for p in points)
    title = f"Quality against {what} of the runs"
    drawn = plots.scatter(f"runs-{what}", title, points, unit, unit_of(metric), f"{title}. {told}.")
    names = Markup(", ").join(said(name) for name in document["pareto"][cost])
    return Figure(drawn, Markup("{}. The front, on which nothing else is better in both: {}.").format(title, names))


def _last(name: str) -> str:
    """A row's path without the folders that all have: name, number and artefact."""
    return " ".join(part for part in name.split("/") if part not in ("runs", "groups", "artefacts"))[-18:]


def _differences(document: Document) -> Table:
    names = list(document["differences"][0]["values"])
    rows: list[list[Cell]] = [
        [said(row["key"]), *(said("-" if row["values"].get(name) is None else row["values"][name]) for name in names)]
        for row in document["differences"]
    ]
    note = Markup("{} keys are the same.").format(document["same"])
    return Table("What differs in the configurations", ["key", *map(said, names)], rows, note, tall=len(rows) > 12)
