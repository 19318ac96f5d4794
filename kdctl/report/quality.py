"""The sections of a report on what the student does: fidelity, calibration, classes, robustness, layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from kdctl.report import numbers as n
from kdctl.report import plots
from kdctl.report.blocks import Block, Cell, Figure, Figures, Matrix, Prose, Section, Table
from kdctl.report.claims import label
from kdctl.report.facts import BASELINE, Document, Facts
from kdctl.report.numbers import NONE, said
from kdctl.report.plots import Series

_MATRIX_NUMBERS, _MATRIX_SHADES, _DOTS, _ALL_CLASSES = 20, 100, 30, 100
"""Up to how many classes: the confusions as numbers, as shades; a drawing by class; a row for each class."""
_WORST = 20
_NAMES = {"top1": "top-1", "ap": "average precision"}
"""The metric of single classes."""


def _evaluated_by(facts: Facts) -> str:
    return f"kdctl eval {facts.lead.run} --split {facts.lead.split}"


def _of_seed(facts: Facts) -> list[Block]:
    """Says of which seed a section is, where there are several."""
    if len(facts.members) < 2:
        return []
    return [Prose(Markup("Of seed {}, best checkpoint.").format(n.name(facts.lead.seed)), "note")]


# ------------------------------------------------------------------------------------------------------------ fidelity


def fidelity(facts: Facts) -> Section:
    """How like its teacher the student is, which is another question than how good it is."""
    section = Section("fidelity", "Fidelity to the teacher")
    known = facts.lead.evaluation.get("fidelity")
    if not known:
        if facts.lead.summary and not facts.lead.summary.get("teacher"):
            return section.missing("The stage that made the student had no teacher to be faithful to")
        if facts.lead.evaluation.get("teacher"):
            return section.missing("The agreement is in the summary; more is measured of classifiers alone")
        return section.missing("Fidelity is not measured", _evaluated_by(facts))
    section.blocks += _of_seed(facts)
    rows: list[list[Cell]] = [
        ["same class chosen, %", n.percent(known.get("agreement")), "higher is more faithful"],
        ["KL(teacher || student), nats", n.metric("kl", known.get("kl")), "0 where both say the same"],
        ["Jensen-Shannon, nats", n.metric("js", known.get("js")), Markup("from 0 to ln 2")],
        ["both wrong with the same class, % of all", n.percent(known.get("same_wrong")), "errors that look passed on"],
        ["teacher's errors repeated, %", n.percent(known.get("inherited_errors")), "of the teacher's errors"],
    ]
    section.blocks.append(Table("Student against teacher, at temperature 1", ["measure", "value", "how to read"], rows))
    quadrants: list[list[Cell]] = [
        ["student right", n.percent(known.get("both_right")), n.percent(known.get("student_only"))],
        ["student wrong", n.percent(known.get("teacher_only")), n.percent(known.get("both_wrong"))],
    ]
    head: list[Cell] = ["", "teacher right", "teacher wrong"]
    section.blocks.append(Table("Who is right, % of the labelled samples", head, quadrants))
    rows = [
        [n.name(row["seed"]), n.percent(row["student"].get("agreement")), _control_agreement(row)]
        for row in facts.seeds
    ]
    if len(rows) > 1:
        note = "A control that never saw the teacher agrees with it wherever both are right."
        section.blocks.append(
            Table("Agreement with the teacher by seed, %", ["seed", "student", label(BASELINE)], rows, note)
        )
    return section


def _control_agreement(row: Document) -> Markup:
    return n.percent((row.get(BASELINE) or {}).get("agreement"))


# --------------------------------------------------------------------------------------------------------- calibration


def calibration(facts: Facts) -> Section:
    """Whether confidence means what it says, before and after temperature scaling on validation."""
    section = Section("calibration", "Calibration")
    quality = facts.lead.evaluation.get("quality") or {}
    models = {name: quality[name] for name in ("student", "teacher") if quality.get(name)}
    control = facts.control()
    mine = ((control.evaluation.get("quality") or {}).get("student") if control else None) or None
    if mine:
        models[BASELINE] = mine
    if not models and quality:
        return section.missing("Calibration is measured of classifiers alone: of those that choose one class")
    if not models:
        return section.missing("Calibration is not measured", _evaluated_by(facts))
    section.blocks += _of_seed(facts)
    rows: list[list[Cell]] = []
    for name, model in models.items():
        rows.append([label(name), "as trained", *_scores(model), NONE])
        if model.get("scaled"):
            scaled = [label(name), "scaled", *_scores(model["scaled"]), n.metric("temperature", model["temperature"])]
            rows.append(scaled)
    head: list[Cell] = ["model", "logits", "ECE, %", "adaptive ECE, %", "NLL, nats", "Brier", "temperature"]
    note = "Scaled: logits divided by the temperature that fits the validation split best (Guo et al. 2017)."
    section.blocks.append(Table("Calibration, lower is better", head, rows, note))
    section.blocks.append(Figures([_reliability(models)]))
    return section


def _scores(model: Document) -> list[Cell]:
    return [
        n.percent(model.get("ece")), n.percent(model.get("adaptive_ece")), n.metric("nll", model.get("nll")),
        n.metric("brier", model.get("brier")),
    ]  # fmt: skip


def _reliability(models: dict[str, Document]) -> Figure:
    series, told = [], []
    for name, model in models.items():
        bins = [b for b in model.get("reliability") or [] if b.get("samples") and n.is_number(b.get("accuracy"))]
        xs, ys = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
        series.append(Series(label(name), xs, ys, plots.look_of(name)))
        told.append(f"{label(name)}: ECE {model['ece']:.2f} %" if n.is_number(model.get("ece")) else label(name))
    text = "Reliability diagram in 15 bins. " + "; ".join(told) + "."
    drawn = plots.reliability("reliability", "Reliability", series, text)
    return Figure(drawn, "Accuracy by confidence in bins. Below the dotted line a model is too sure of itself.")


# ------------------------------------------------------------------------------------------------------------- classes


def classes(facts: Facts) -> Section:
    """Each class beside control and teacher, groups by frequency, and what is taken for what."""
    section = Section("classes", "Classes")
    evaluation = facts.lead.evaluation
    own = evaluation.get("per_class")
    if own == []:
        return section.missing("What the model says is no class")
    if not own:
        return section.missing("Classes are not measured one by one", _evaluated_by(facts))
    section.blocks += _of_seed(facts)
    control = facts.control()
    others = (control.evaluation.get("per_class") or []) if control else []
    metric = next(name for name in _NAMES if name in own[0])
    without = {row["name"]: row.get(metric) for row in others}
    teacher = _teacher_classes(evaluation)
    section.blocks += _overall(evaluation.get("quality") or {})
    if len(own) <= _DOTS:
        section.blocks.append(Figures([_class_dots(own, metric, without, teacher)]))
    section.blocks.append(_class_table(own, metric, without, evaluation, bool(control)))
    section.blocks += _confusions(evaluation, [row["name"] for row in own])
    return section


def _teacher_classes(evaluation: Document) -> list[tuple[int, int]]:
    """Of each class how many samples the teacher gets right, and how many there are; from its confusions."""
    matrix = (evaluation.get("confusion") or {}).get("teacher")
    return [(row[i], evaluation["per_class"][i]["samples"]) for i, row in enumerate(matrix)] if matrix else []


def _overall(quality: Document) -> list[Block]:
    """Balanced accuracy, macro F1, the worst class and the groups by frequency, of student and teacher."""
    models = {name: quality[name] for name in ("student", "teacher") if quality.get(name)}
    if not models:
        return []
    rows: list[list[Cell]] = []
    for name, model in models.items():
        worst = model.get("worst_class") or {}
        rows.append([
            label(name), n.percent(model.get("balanced_accuracy")), n.percent(model.get("macro_f1")),
            n.percent(worst.get("top1")), said(worst.get("name", "-")),
        ])  # fmt: skip
    head: list[Cell] = ["model", "balanced accuracy, %", "macro F1, %", "worst class, top-1 %", "which"]
    blocks: list[Block] = [Table("All classes alike", head, rows)]
    groups = {name: model["groups"] for name, model in models.items() if model.get("groups")}
    if groups:
        rows = [
            [label(name), group, n.count(one.get("classes")), n.count(one.get("samples")), n.percent(one.get("top1"))]
            for name, of_model in groups.items()
            for group, one in of_model.items()
        ]
        note = "Many: more than 100 training samples of a class, few: less than 20 (Liu et al. 2019)."
        head = ["model", "shots", "classes", "samples", "top-1, %"]
        blocks.append(Table("Classes by how often they are trained on", head, rows, note))
    return blocks


def _class_dots(
    own: Sequence[Document], metric: str, without: dict[str, float | None], teacher: Sequence[tuple[int, int]]
) -> Figure:
    names = [str(row["name"]) for row in own]
    series: list[tuple[str, Sequence[float | None], int]] = []
    if teacher:
        shares = [100 * right / samples if samples else None for right, samples in teacher]
        series.append(("teacher", shares, plots.look_of("teacher")))
    if without:
        series.append((label(BASELINE), [without.get(row["name"]) for row in own], plots.look_of(BASELINE)))
    series.append(("student", [row[metric] for row in own], plots.look_of("student")))
    told = "; ".join(
        f"{row['name']}: student {row[metric]:.1f}"
        + (f", control {without[row['name']]:.1f}" if n.is_number(without.get(row["name"])) else "")
        for row in own
        if n.is_number(row[metric])
    )
    title = f"{_NAMES[metric].capitalize()} by class"
    drawn = plots.dots("classes-plot", title, names, series, f"{_NAMES[metric]}, %", f"{title}: {told}.")
    return Figure(drawn, f"{title}. A long bar between the markers: the models differ.")


def _class_table(
    own: Sequence[Document], metric: str, without: dict[str, float | None], evaluation: Document, with_control: bool
) -> Table:
    teacher = _teacher_classes(evaluation)
    order = sorted(range(len(own)), key=lambda i: (own[i][metric] is None, own[i][metric] or 0))
    shown = order if len(own) <= _ALL_CLASSES else order[:_WORST]
    rows: list[list[Cell]] = []
    for i in shown:
        row = own[i]
        cells: list[Cell] = [said(row["name"]), n.count(row["samples"]), n.percent(row[metric])]
        if with_control:
            other = without.get(row["name"])
            cells += [n.percent(other), n.difference(metric, row[metric], other)]
        if teacher:
            right, samples = teacher[i]
            share = f"100 * {right} / {samples}" if samples else ""
            cells.append(n.shown(100 * right / samples, n.two_places, share) if samples else NONE)
        rows.append(cells)
    head: list[Cell] = ["class", "samples", f"student, {_NAMES[metric]} %"]
    head += ["control", "change"] if with_control else []
    head += ["teacher"] if teacher else []
    caption: Cell = "Classes, the worst of the student first"
    if len(shown) < len(own):
        caption = Markup("The {} worst of {} classes of the student").format(len(shown), len(own))
    return Table(caption, head, rows, tall=len(rows) > 12)


def _confusions(evaluation: Document, names: Sequence[str]) -> list[Block]:
    blocks: list[Block] = []
    for who, matrix in (evaluation.get("confusion") or {}).items():
        if not matrix:
            continue
        shares = [[cell / max(1, sum(row)) for cell in row] for row in matrix]
        if len(matrix) <= _MATRIX_NUMBERS:
            cells = [[n.count(cell) for cell in row] for row in matrix]
            caption = f"Confusions of the {who}: a row a true class, a column what was chosen, samples"
            heads = [said(name) for name in names]
            blocks.append(Matrix(caption, "true \\ chosen", heads, cells, shares))
        elif len(matrix) <= _MATRIX_SHADES:
            blocks.append(Figures([_confusion_heat(who, matrix, shares, names)]))
    pairs = evaluation.get("confused") or []
    if pairs:
        rows = [[said(p["truth"]), said(p["chosen"]), n.count(p["samples"])] for p in pairs]
        blocks.append(Table("What the student confuses most", ["true class", "chosen", "samples"], rows))
    return blocks


def _confusion_heat(who: str, matrix: Any, shares: list[list[float]], names: Sequence[str]) -> Figure:
    diagonal = [row[i] for i, row in enumerate(shares)]
    there = [i for i, row in enumerate(matrix) if sum(row)]  # a class without samples is not the worst
    text = f"Confusions of the {who} over {len(matrix)} classes"
    if there:
        worst = min(there, key=diagonal.__getitem__)
        text += f"; the least share on the diagonal is that of {names[worst]}, {100 * diagonal[worst]:.1f} %."
    title = f"Confusions of the {who}"
    few = list(names) if len(names) <= _MATRIX_NUMBERS else []
    drawn = plots.heat(f"confusion-{who}", title, shares, few, few, "chosen class", "true class", text)
    return Figure(drawn, f"{title}: a row a true class, as shares of its samples. Classes in the order of the data.")


# --------------------------------------------------------------------------------------------------- robustness, layers


def robustness(facts: Facts, command: str) -> Section:
    """The primary metric under corruptions of growing severity."""
    section = Section("robustness", "Robustness")
    known, metric = facts.lead.analysis("robustness"), n.unit_of(facts.primary)
    if facts.lead.of_texts:
        return section.missing("Its corruptions are of images, and the data are texts")
    if not known.get("rows"):
        return section.missing("Robustness is not measured", command)
    control = facts.control()
    without = {_place(row): row for row in (control.analysis("robustness") if control else {}).get("rows", [])}
    section.blocks += _of_seed(facts)
    kinds = [kind for kind in dict.fromkeys(row["corruption"] for row in known["rows"]) if kind != "none"]
    section.blocks.append(Figures([_corruption(kind, known["rows"], without, metric) for kind in kinds]))
    rows: list[list[Cell]] = [
        [
            str(row["corruption"]), n.count(row["severity"]), n.shown(row.get("level"), lambda v: f"{v:.3g}"),
            n.percent(row["student"]), n.percent((without.get(_place(row)) or {}).get("student")),
            n.percent(row.get("teacher")),
        ]
        for row in known["rows"]
    ]  # fmt: skip
    place = (metric[0].upper() + metric[1:], n.count(known.get("samples")), known.get("split"))
    caption = Markup("{} on {} samples of the {} split").format(*place)
    head: list[Cell] = ["corruption", "severity", "level", "student", label(BASELINE), "teacher"]
    note = "Level: standard deviation of noise, radius of blur in pixels, factor of contrast."
    section.blocks.append(Table(caption, head, rows, note, tall=True))
    return section


def _place(row: Document) -> tuple[str, int]:
    return str(row["corruption"]), int(row["severity"])


def _corruption(kind: str, rows: Sequence[Document], without: dict[tuple[str, int], Document], metric: str) -> Figure:
    mine = sorted((row for row in rows if row["corruption"] in (kind, "none")), key=lambda row: row["severity"])
    columns = {
        "student": [row.get("student") for row in mine],
        BASELINE: [(without.get(_place(row)) or {}).get("student") for row in mine],
        "teacher": [row.get("teacher") for row in mine],
    }
    series, told = [], []
    for name, values in columns.items():
        points = [(row["severity"], v) for row, v in zip(mine, values, strict=True) if n.is_number(v)]
        if points:
            xs, ys = [x for x, _ in points], [float(v) for _, v in points if v is not None]
            series.append(Series(label(name), xs, ys, plots.look_of(name)))
            told.append(f"{label(name)} from {ys[0]:.1f} to {ys[-1]:.1f}")
    text = f"{metric} under {kind}, severity 0 to 5: " + "; ".join(told) + "."
    drawn = plots.lines(f"robust-{kind}", f"Under {kind}", series, "severity", metric, text)
    return Figure(drawn, Markup("{} under {} of growing severity; 0: as it is.").format(metric, kind))


def layers(facts: Facts, command: str) -> Section:
    """How alike the layers of student and teacher represent the same samples."""
    section = Section("layers", "Layers of student and teacher")
    known = facts.lead.analysis("cka")
    if not known.get("cka"):
        if facts.lead.summary and not facts.lead.summary.get("teacher"):
            return section.missing("The stage that made the student had no teacher to compare layers with")
        return section.missing("The layers are not compared", command)
    section.blocks += _of_seed(facts)
    matrix, mine, theirs = known["cka"], known["student_layers"], known["teacher_layers"]
    best = [max((v, theirs[j]) for j, v in enumerate(row) if n.is_number(v)) for row in matrix]
    told = "; ".join(f"{name}: {value:.2f} with {other}" for name, (value, other) in zip(mine, best, strict=True))
    cells = [[v if n.is_number(v) else 0.0 for v in row] for row in matrix]
    text = f"Linear CKA between layers; the most alike of the teacher: {told}."
    drawn = plots.heat(
        "cka", "Linear CKA", cells, mine, theirs, "teacher's layer", "student's layer", text, numbers=True
    )
    rows: list[list[Cell]] = [
        [said(name), said(other), n.shown(value, n.two_places)] for name, (value, other) in zip(mine, best, strict=True)
    ]
    caption = Markup("Linear CKA (Kornblith et al. 2019) on {} samples: 1 is the same up to rotation and scale.")
    section.blocks.append(Figures([Figure(drawn, caption.format(n.count(known.get("samples"))))]))
    head: list[Cell] = ["student's layer", "most alike of the teacher", "CKA"]
    section.blocks.append(Table("Nearest layers", head, rows))
    return section
