"""The first sections of a report: what the numbers say, the models side by side, and every seed and control."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from kdctl.report import numbers as n
from kdctl.report import plots
from kdctl.report.blocks import Cell, Figure, Figures, Items, Prose, Section, Table
from kdctl.report.facts import BASELINE, STUDENT, Document, Facts, RunFacts
from kdctl.report.numbers import NONE, said, shown, unit_of

WITH_CONTROL = "kdctl train CONFIG --with-baseline --seeds 5"
PLACEBOS = "kdctl train CONFIG --with-baseline --seeds 5 --controls random_teacher,shuffled_labels"


def label(name: str) -> str:
    """How a model is called on the page: the baseline is the control, `random_teacher` a random teacher."""
    return "control (no teacher)" if name == BASELINE else name.replace("_", " ")


@dataclass(frozen=True)
class Side:
    """One model of the comparison. metrics: of the lead's seed; intervals: over seeds, where there are several."""

    name: str
    role: str
    metrics: Document
    intervals: dict[str, Document]
    agreement: Any
    cost: Document
    latency: Any
    """Milliseconds of one image, median, one thread."""


def sides(facts: Facts) -> list[Side]:
    """Student, control, teacher and artefacts, as far as they are measured."""
    lead = facts.lead
    found = [_side_of_run(facts, lead)] if lead.measured else []
    control = facts.control()
    if control is not None and control is not lead:
        found.append(_side_of_run(facts, control))
    teacher = lead.summary.get("teacher")
    if teacher:
        cost = lead.cost_of("teacher")
        measured = lead.evaluation.get("teacher") or teacher.get(lead.split, {})
        found.append(Side("teacher", "teacher", measured, {}, None, cost, _latency(cost)))
    for made in lead.artefacts:
        after = made["after"]
        name, spent = str(made.get("variant", made.get("target"))), (after.get("latency_ms") or {}).get("1")
        found.append(
            Side(name, "artefact", after.get("metrics", {}), {}, made.get("agreement_teacher"), after, spent)
        )  # fmt: skip
    return found


def _side_of_run(facts: Facts, run: RunFacts) -> Side:
    is_control = run.name == BASELINE
    known = {metric: facts.intervals(metric, run.name) for metric in run.measured}
    cost = run.cost_of(STUDENT)
    if is_control:
        lead = facts.lead.cost_of(STUDENT)
        if all(cost.get(name) == lead.get(name) for name in ("kind", "parameters")):
            cost = lead  # the same net: what two measurements of it differ by is noise
    return Side(
        run.name, run.name, run.measured, {m: i for m, i in known.items() if i and i.get("n", 1) > 1}, run.agreement,
        cost, _latency(cost),
    )  # fmt: skip


def _latency(cost: Document) -> Any:
    rows = [row for row in cost.get("rows") or [] if (row.get("batch"), row.get("threads", 1)) == (1, 1)]
    return rows[0].get("p50_ms") if rows else None


# ------------------------------------------------------------------------------------------------------------ sections


def summary(facts: Facts) -> Section:
    """What the numbers say, in words, and the models side by side."""
    section = Section("summary", "Summary")
    section.blocks += _statements(facts)
    models = sides(facts)
    if not models:
        return section.missing("No student is measured yet")
    metrics = list(dict.fromkeys([facts.primary, *models[0].metrics]))
    head: list[Cell] = ["model", *map(unit_of, metrics), "agreement with the teacher, %", "bytes", "parameters"]
    rows = [
        [
            _named(side),
            *(n.interval(m, side.intervals.get(m)) if m in side.intervals else n.metric(m, side.metrics.get(m))
              for m in metrics),
            n.percent(side.agreement), shown(side.cost.get("bytes"), n.bytes_text),
            n.count(side.cost.get("parameters")), shown(side.cost.get("macs"), n.large_text),
            shown(side.latency, n.millis_text),
        ]
        for side in models
    ]  # fmt: skip
    last = facts.lead.summary.get("student", {}).get("last", {}).get(facts.lead.split)
    if last and last != facts.lead.measured:
        rows.insert(1, ["its last epoch", *(n.metric(m, last.get(m)) for m in metrics), *[NONE] * 5])
    caption: Cell = Markup("Measured on the {} split").format(facts.lead.split)
    if facts.lead.evaluation.get("samples"):
        caption += Markup(" of {} labelled samples").format(n.count(facts.lead.evaluation["samples"]))
    several = any(side.intervals for side in models)
    note = "Square brackets: 95 % interval of the mean over the seeds. " if several else ""
    note += f"Last epoch, artefacts, agreement, size and costs: of seed {facts.lead.seed}. " if several else ""
    note += "Latency: median of one image on one thread. A dash: not measured."
    section.blocks.append(Table(caption, [*head, "MACs", "latency"], rows, note))
    if any(side.latency is None for side in models):
        section.missing("Some latencies are not measured", f"kdctl bench {facts.lead.run}")
    return section


def _named(side: Side) -> Cell:
    if side.role == "artefact":
        return Markup("artefact {}").format(said(side.name))
    kind = side.cost.get("kind")
    return Markup("{} {}").format(label(side.name), Markup("<small>{}</small>").format(said(kind)) if kind else "")


def _statements(facts: Facts) -> Iterator[Prose | Items]:
    """The main claim and what else the numbers say; of a run alone, that it shows nothing about its teacher."""
    lead, result = facts.lead, facts.result
    texts = result.get("statements") or ([result["verdict"]] if result.get("verdict") else [])
    if texts:
        yield Prose(Markup("{}{}").format(about(facts), said(texts[0])), "claim")
        if texts[1:]:
            yield Items([said(text) for text in texts[1:]])
    elif facts.training or facts.unfinished or not lead.done:
        yield Prose(_progress(facts), "claim")
    elif not lead.taught:
        yield Prose("One run without a teacher: nothing is shown about distillation.", "claim")
    else:
        text = "One run, no control: nothing is shown about the teacher's help. "
        yield Prose(Markup("{}<code>{}</code> shows it.").format(text, WITH_CONTROL), "claim")


def about(facts: Facts) -> str:
    """What the claim of a group is about; nothing where no control was trained."""
    known = "gain" in facts.result.get("summary", {})
    return f"Student against {label(BASELINE)}, {unit_of(facts.primary)}: " if known else ""


def _progress(facts: Facts) -> Markup:
    """How far an unfinished run, or group, is."""
    halted = [m for m in facts.members if m.info["status"] not in ("done", "running")]
    run = next((m for m in facts.members if m.info["status"] == "running"), (halted or [facts.lead])[0])
    text = Markup("{} is {}: the report shows what is there so far.").format(said(run.run), run.info["status"])
    if run.lines:
        last = run.lines[-1]
        text += Markup(" Stage {}, epoch {}.").format(said(last.get("stage")), n.count(last.get("epoch")))
    if facts.group is not None and facts.unfinished:
        done, whole = sum(m.done for m in facts.members), len(facts.group.get("members", []))
        text += Markup(" {} of {} runs of the group are done.").format(done, whole)
    return text


# --------------------------------------------------------------------------------------------------- seeds and controls


def seeds(facts: Facts) -> Section:
    """Every seed's value, the paired differences, and what the placebos gain."""
    section = Section("seeds", "Seeds and controls")
    if not facts.seeds:
        text = "One run: what another seed, or no teacher, would have given is not known"
        if facts.group is not None:
            text = "The group is not finished: differences are shown once all of its runs are done"
            return section.missing(text)
        return section.missing(text, WITH_CONTROL)
    names = [name for name, _ in comparisons(facts)]
    section.blocks.append(_seed_table(facts, names))
    if not names:
        return section.missing("No control was trained: whether the teacher helps is not known", WITH_CONTROL)
    section.blocks.append(_difference_figures(facts, names))
    section.blocks.append(_control_table(facts))
    if not any(one.get("placebo") for one in _controls(facts).values()):
        section.missing("No placebo was trained, which would show what any soft label does", PLACEBOS)
    return section


def _controls(facts: Facts) -> dict[str, Document]:
    return facts.result.get("summary", {}).get("controls") or {}


def comparisons(facts: Facts) -> list[tuple[str, Document]]:
    """(name of a control, paired gain of the student over it), the baseline first."""
    known = {name: one["gain"] for name, one in _controls(facts).items() if one.get("gain")}
    gain = facts.result.get("summary", {}).get("gain")
    return list((({BASELINE: gain} if gain else {}) | known).items())


def value_of(row: Document, name: str, metric: str) -> Any:
    """The value of a control, or of the student, in the row of a seed."""
    if name == STUDENT:
        return row[STUDENT]["test"].get(metric)
    one = (row.get("controls") or {}).get(name) or (row.get(BASELINE) if name == BASELINE else None) or {}
    return (one.get("test") or {}).get(metric)


def _seed_table(facts: Facts, names: list[str]) -> Table:
    metric = facts.primary
    head: list[Cell] = ["seed", "student", *map(label, names)]
    if BASELINE in names:
        head.append("student - control")
    rows: list[list[Cell]] = []
    for row in facts.seeds:
        values = {name: value_of(row, name, metric) for name in [STUDENT, *names]}
        cells: list[Cell] = [n.name(row["seed"]), *(n.metric(metric, value) for value in values.values())]
        if BASELINE in names:
            cells.append(n.difference(metric, values[STUDENT], values[BASELINE]))
        rows.append(cells)
    total = facts.result["summary"]
    cells = ["mean", n.interval(metric, facts.intervals(metric, STUDENT))]
    for name in names:
        known = facts.intervals(metric, BASELINE) if name == BASELINE else _controls(facts)[name].get("values")
        cells.append(n.interval(metric, known))
    if BASELINE in names:
        cells.append(n.interval(metric, total.get("gain"), signed=True))
    caption = Markup("{} on the {} split by seed, best checkpoint").format(unit_of(metric), facts.lead.split)
    return Table(caption, head, [*rows, cells], "In a row all models see the same pixels in the same order.")


def _difference_figures(facts: Facts, names: list[str]) -> Figures:
    metric = facts.primary
    gains = [
        {"name": label(name), "mean": gain["mean"], "ci95": gain.get("ci95"), "values": _gaps(facts, STUDENT, name)}
        for name, gain in comparisons(facts)
    ]
    figures = [_forest(facts, "gain", "Student minus each control", gains)]
    others = [
        {"name": label(name), "mean": one["against_baseline"]["mean"], "ci95": one["against_baseline"].get("ci95"),
         "values": _gaps(facts, name, BASELINE)}
        for name, one in _controls(facts).items()
        if one.get("against_baseline") and name != BASELINE
    ]  # fmt: skip
    if others:
        title = f"Each control minus the student without a teacher, {unit_of(metric)}"
        figures.append(_forest(facts, "placebo", title, others))
    return Figures(figures)


def _forest(facts: Facts, key: str, title: str, rows: list[dict[str, Any]]) -> Figure:
    told = "; ".join(
        f"{row['name']}: {row['mean']:+.2f}"
        + (f", interval {row['ci95'][0]:+.2f} to {row['ci95'][1]:+.2f}" if row["ci95"] else ", no interval")
        for row in rows
    )
    drawn = plots.forest(f"{key}-plot", title, rows, f"difference, {unit_of(facts.primary)}", told)
    text = ". Diamond: mean of the seeds; bar: 95 % interval; rings: seeds. A bar that holds 0: no difference is shown."
    return Figure(drawn, title + text)


def _gaps(facts: Facts, name: str, other: str) -> list[float]:
    pairs = [(value_of(row, name, facts.primary), value_of(row, other, facts.primary)) for row in facts.seeds]
    return [a - b for a, b in pairs if a is not None and b is not None]


def _control_table(facts: Facts) -> Table:
    metric, summary = facts.primary, facts.result["summary"]
    rows: list[list[Cell]] = []
    for name, gain in comparisons(facts):
        one = _controls(facts).get(name, {})
        values = one.get("values") or (summary.get(BASELINE) if name == BASELINE else None)
        verdict = one.get("verdict") or (facts.result.get("verdict") if name == BASELINE else None)
        against = one.get("against_baseline")
        rows.append([
            label(name),
            said(one["what"]) if one.get("what") else "the same student and budget, without its teacher",
            "placebo" if one.get("placebo") else "control",
            n.interval(metric, values), n.interval(metric, gain, signed=True), shown(gain.get("p_value"), n.p_text),
            n.interval(metric, against, signed=True), shown((against or {}).get("p_value"), n.p_text),
            said(verdict) if verdict else NONE,
        ])  # fmt: skip
    head = ["control", "what it is", "kind", unit_of(metric), "student - it", "p", "it - control", "p", "verdict"]
    note = (
        "p: two-sided paired t-test over the seeds. A placebo teaches nothing true: a gain of it is not the teacher's."
    )
    return Table("Controls", head, rows, note)
