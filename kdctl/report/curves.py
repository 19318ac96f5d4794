"""The section of a report on training: loss of every term, gradient shares, validation and learning rate by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from kdctl.errors import counted
from kdctl.report import numbers as n
from kdctl.report import plots
from kdctl.report.blocks import Cell, Figure, Figures, Prose, Section, Table
from kdctl.report.claims import label
from kdctl.report.facts import BASELINE, Document, Facts, RunFacts
from kdctl.report.numbers import said, shown, unit_of
from kdctl.report.plots import Series

_WIDE = 20.0
"""From which quotient of the largest to the least value on losses are drawn in powers of ten."""


def curves(facts: Facts) -> Section:
    """Four drawings a training stage of the lead run, its control's validation beside its own."""
    section = Section("curves", "Training")
    if not facts.lead.lines and facts.lead.done:
        return section.missing("Nothing was trained: the weights are those that the run was given")
    if not facts.lead.lines:
        return section.missing("No epoch is finished yet", f"kdctl resume {facts.lead.run}")
    section.blocks.append(_stage_table(facts.lead))
    control = facts.control()
    if len(facts.members) > 1:
        section.blocks.append(Prose(Markup("Curves of seed {}.").format(n.name(facts.lead.seed)), "note"))
    for number, stage in enumerate(facts.lead.trained_stages):
        section.blocks.append(Prose(Markup("Stage {}").format(said(stage)), "heading"))
        section.blocks.append(Figures(_of_stage(facts, stage, f"stage{number}", control)))
    return section


def _stage_table(run: RunFacts) -> Table:
    rows: list[list[Cell]] = []
    for stage in run.trained_stages:
        lines, result = run.stage_lines(stage), run.stage_result(stage)
        last = lines[-1]
        seconds = run.info.get("seconds", {}).get(stage)
        rows.append([
            said(stage), n.count(result.get("epochs", last["epoch"])),
            n.count(result.get("best_epoch")), result.get("kept", "-"),
            said(result.get("finished", run.info["stages"].get(stage, "running"))),
            shown(seconds, n.seconds_text), shown(last.get("samples_per_second"), n.count_text),
        ])  # fmt: skip
    head = ["stage", "epochs", "best epoch", "kept", "ended", "time", "samples a second (last epoch)"]
    return Table("Stages that train", head, rows)


def _of_stage(facts: Facts, stage: str, key: str, control: RunFacts | None) -> list[Figure]:
    lines = facts.lead.stage_lines(stage)
    epochs = [line["epoch"] for line in lines]
    figures = [_many(lines, "terms", "Loss of each term, before its weight", "loss", f"{key}-loss", stage, "loss")]
    if any(line.get("gradient_shares") for line in lines):
        title = "Share of each term in the student's gradient"
        figures.append(_many(lines, "gradient_shares", title, "share", f"{key}-share", stage, "share"))
    figures += _validation(facts, stage, key, control)
    rates = [line["lr"] for line in lines if n.is_number(line.get("lr"))]
    if len(rates) == len(lines):
        first, last = rates[0], rates[-1]
        text = f"Learning rate of stage {stage}: {first:.3g} in the first epoch, {last:.3g} in epoch {epochs[-1]}."
        series = [Series("lr", epochs, rates)]
        drawn = plots.lines(f"{key}-lr", "Learning rate", series, "epoch", "learning rate", text)
        caption = Markup("Learning rate: {} after the first epoch, {} after the last.")
        figures.append(Figure(drawn, caption.format(*(shown(rate, lambda v: f"{v:.3g}") for rate in (first, last)))))
    return figures


def _many(lines: Sequence[Document], field: str, title: str, y: str, key: str, stage: str, metric: str) -> Figure:
    """A line for each term of a map that every epoch has."""
    names = list(dict.fromkeys(name for line in lines for name in line.get(field) or {}))
    series = []
    for number, name in enumerate(names):
        points = _points(lines, lambda line, name=name: (line.get(field) or {}).get(name))
        series.append(Series(name, [x for x, _ in points], [v for _, v in points], number % 6))
    values = [value for one in series for value in one.ys]
    log = field == "terms" and bool(values) and min(values) > 0 and max(values) > _WIDE * min(values)
    last: Mapping[str, Any] = lines[-1].get(field) or {}
    ends = ", ".join(f"{name} {value:.4f}" for name, value in last.items() if n.is_number(value))
    text = f"{title}, stage {stage}, over {counted(len(lines), 'epoch')}; in the last one: {ends}."
    drawn = plots.lines(key, title, series, "epoch", y, text, log=log)
    told = Markup(", ").join(
        Markup("{} {}").format(said(name), shown(value, n.four_places)) for name, value in last.items()
    )
    return Figure(drawn, Markup("{}. In the last epoch: {}.").format(title, told))


def _points(lines: Sequence[Document], value: Any) -> list[tuple[int, float]]:
    return [(line["epoch"], value(line)) for line in lines if n.is_number(value(line))]


def _validation(facts: Facts, stage: str, key: str, control: RunFacts | None) -> list[Figure]:
    """The primary metric on validation by epoch, of the lead and of its control."""
    metric, series, told = facts.primary, [], []
    for run in [facts.lead, *([control] if control else [])]:
        points = _points(run.stage_lines(stage), lambda line: (line.get("val") or {}).get(metric))
        if not points:
            continue
        name = "stage " + stage if run is facts.lead else label(BASELINE)
        look = 0 if run is facts.lead else plots.look_of(BASELINE)
        series.append(Series(name, [x for x, _ in points], [v for _, v in points], look))
        told.append((name, max(v for _, v in points), points[-1][1]))
    if not series:
        return []
    ends = "; ".join(f"{name}: best {best:.2f}, last {last:.2f}" for name, best, last in told)
    drawn = plots.lines(f"{key}-val", "Validation", series, "epoch", unit_of(metric), f"Validation {metric}: {ends}.")
    parts = Markup("; ").join(
        Markup("{}: best {}, last {}").format(said(name), n.metric(metric, best), n.metric(metric, last))
        for name, best, last in told
    )
    return [Figure(drawn, Markup("Validation, {}. {}.").format(unit_of(metric), parts))]
