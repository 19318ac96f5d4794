"""The section of a report on what student, teacher and artefacts cost to train, to keep and to ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from markupsafe import Markup

from kdctl.report import numbers as n
from kdctl.report import plots
from kdctl.report.blocks import Block, Cell, Figure, Figures, Section, Table
from kdctl.report.claims import Side, sides
from kdctl.report.facts import BASELINE, Document, Facts, RunFacts
from kdctl.report.numbers import NONE, said, shown, unit_of


def cost(facts: Facts, command: str) -> Section:
    """Size, latency, memory, time and energy, and which models nothing beats."""
    section = Section("cost", "Cost")
    models = [side for side in sides(facts) if side.role != BASELINE]
    figures = [*_bars(models)]
    if figures:
        section.blocks.append(Figures(figures))
    section.blocks += _latency_tables(facts.lead)
    if not facts.lead.analysis("cost"):
        section.missing("Latency of the teacher and the break-even are not measured", command)
    section.blocks += _training(facts)
    fronts = [f for f in (_front(facts, "bytes", n.bytes_text), _front(facts, "latency", n.millis_text)) if f]
    if fronts:
        section.blocks.append(Figures(fronts))
    return section


def _bars(models: Sequence[Side]) -> Iterator[Figure]:
    """Size and latency of each model as bars."""
    wanted: list[tuple[str, str, str, Callable[[Side], Any], Callable[[Any], str]]] = [
        ("size", "Size of the weights or of the file", "bytes", lambda side: side.cost.get("bytes"), n.bytes_text),
        ("latency", "Median latency of one image, one thread", "ms", lambda side: side.latency, n.millis_text),
    ]
    for key, title, unit, value, text in wanted:
        rows = [(side, value(side)) for side in models if n.is_number(value(side))]
        if len(rows) < 2:
            continue
        told = "; ".join(f"{side.name}: {text(number)}" for side, number in rows)
        bars = [(side.name, float(number), plots.look_of(side.role)) for side, number in rows]
        drawn = plots.bars(f"bars-{key}", title, bars, text, unit, f"{title}. {told}.")
        yield Figure(drawn, title + ".")


def _latency_tables(run: RunFacts) -> list[Block]:
    """Every measured cell of student and teacher, and the three columns of each artefact."""
    blocks: list[Block] = []
    cells = [(who, row) for who in ("student", "teacher") for row in run.cost_of(who).get("rows") or []]
    if cells:
        rows: list[list[Cell]] = [
            [
                who, said(row.get("runtime", "-")), n.count(row.get("batch")), n.count(row.get("threads")),
                shown(row.get("p50_ms"), n.millis_text), shown(row.get("p95_ms"), n.millis_text),
                n.count(row.get("samples_per_second")), shown(row.get("peak_bytes"), n.bytes_text),
            ]
            for who, row in cells
        ]  # fmt: skip
        head: list[Cell] = ["model", "runtime", "batch", "threads", "p50", "p95", "samples a second", "peak memory"]
        known = run.analysis("cost").get("processor") or (run.read("bench.json") or {}).get("processor")
        note = Markup("Each in a fresh process after a warm-up, on {}.").format(said(known)) if known else ""
        blocks.append(Table("Latency", head, rows, note))
    if run.artefacts:
        rows = [_artefact_row(made) for made in run.artefacts]
        head = [
            "artefact", "runtime", "bytes", "times smaller than fp32", "top metric before", "after",
            "agreement with fp32, %", "fp32, same runtime", "artefact", "gates",
        ]  # fmt: skip
        blocks.append(Table("Artefacts", head, rows, "Latencies: median of one image, one thread."))
    return blocks


def _artefact_row(made: Document) -> list[Cell]:
    before, same, after = (made.get(name) or {} for name in ("before", "same_runtime", "after"))
    metric = next(iter(after.get("metrics", {})), "top1")
    gates = made.get("gates") or []
    missed = [gate["name"] for gate in gates if not gate.get("passed")]
    verdict: Cell = NONE if not gates else "missed: " + ", ".join(missed) if missed else "all hold"
    return [
        said(made.get("variant", "-")), said(made.get("runtime", "-")), shown(after.get("bytes"), n.bytes_text),
        n.ratio(before.get("bytes"), after.get("bytes")), n.metric(metric, before.get("metrics", {}).get(metric)),
        n.metric(metric, after.get("metrics", {}).get(metric)), n.percent(made.get("agreement")),
        shown((same.get("latency_ms") or {}).get("1"), n.millis_text),
        shown((after.get("latency_ms") or {}).get("1"), n.millis_text), verdict,
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ training


def _training(facts: Facts) -> Iterator[Block]:
    """Time by section of each stage, memory and energy, and when the distillation has paid for itself."""
    run = facts.lead
    stages = run.trained_stages
    sections = list(dict.fromkeys(name for line in run.lines for name in line.get("times") or {}))
    if sections:
        rows: list[list[Cell]] = []
        for name in sections:
            sums: list[Cell] = [
                n.total(_times(run, stage, name), n.seconds_text, f"times.{name} of metrics.jsonl, stage {stage}")
                for stage in stages
            ]
            rows.append([said(name), *sums])
        head: list[Cell] = ["section", *(said(stage) for stage in stages)]
        note = "Summed over the epochs that metrics.jsonl holds; `teacher` is asking it, or reading its store."
        yield Table("Training time by section", head, rows, note)
        yield Figures([_time_bars(run, stage, number, sections) for number, stage in enumerate(stages)])
    known = run.analysis("cost")
    spent = known.get("training") or {}
    if spent:
        energy = shown(spent.get("energy_joules"), lambda v: f"{v:,.0f} J")
        rows = [
            ["training of the student", shown(spent.get("student_seconds"), n.seconds_text)],
            ["training of the teacher, in this run", shown(spent.get("teacher_seconds"), n.seconds_text)],
            ["of the student's: asking the teacher", shown(spent.get("asking_seconds"), n.seconds_text)],
            ["peak memory", shown(spent.get("peak_bytes"), n.bytes_text)],
            [Markup("energy ({})").format(said(spent.get("energy_source") or "no meter")), energy],
        ]
        even = known.get("break_even") or {}
        rows.append(["inferences after which it has paid for itself", n.count(even.get("inferences"))])
        yield Table("What training took", ["", "value"], rows, said(even["text"]) if even.get("text") else "")


def _times(run: RunFacts, stage: str, section: str) -> list[float]:
    values = [(line.get("times") or {}).get(section) for line in run.stage_lines(stage)]
    return [value for value in values if n.is_number(value)]


def _time_bars(run: RunFacts, stage: str, number: int, sections: Sequence[str]) -> Figure:
    rows = [(name, sum(_times(run, stage, name)), 0) for name in sections]
    rows = sorted((row for row in rows if row[1] > 0), key=lambda row: -row[1])
    told = "; ".join(f"{name} {n.seconds_text(value)}" for name, value, _ in rows)
    title = f"Training time of stage {stage}"
    drawn = plots.bars(f"time{number}", title, rows, n.seconds_text, "seconds", f"{title}: {told}.")
    return Figure(drawn, Markup("Training time of stage {} by section.").format(said(stage)))


# --------------------------------------------------------------------------------------------------------------- front


def front(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points with `front`: whether no other has at least its y and at most its x, and is better in one."""

    def beaten(p: dict[str, Any]) -> bool:
        return any(q["x"] <= p["x"] and q["y"] >= p["y"] and (q["x"], q["y"]) != (p["x"], p["y"]) for q in points)

    return [point | {"front": not beaten(point)} for point in points]


def _front(facts: Facts, what: str, text: Callable[[Any], str]) -> Figure | None:
    """Quality against a cost of all models, None where fewer than two are measured."""
    metric, points = facts.primary, []
    for side in sides(facts):
        x = side.latency if what == "latency" else side.cost.get("bytes")
        y = side.metrics.get(metric)  # of the seed that artefacts and costs are of, not the mean over all
        if n.is_number(x) and n.is_number(y):
            points.append({"name": "control" if side.name == BASELINE else side.name, "x": float(x), "y": y})
    if len(points) < 2:
        return None
    points = front(points)
    best = [p for p in points if p["front"]]
    told = "; ".join(
        f"{p['name']}: {p['y']:.2f} at {text(p['x'])}" + (" (front)" if p["front"] else "") for p in points
    )
    unit = "bytes" if what == "bytes" else "ms for one image"
    title = f"Quality against {what}" + (f", seed {facts.lead.seed}" if len(facts.members) > 1 else "")
    drawn = plots.scatter(f"front-{what}", title, points, unit, unit_of(metric), f"{title}. {told}.")
    names = Markup(", ").join(said(p["name"]) for p in best)
    return Figure(drawn, Markup("{}. The front, on which nothing else is better in both: {}.").format(title, names))
