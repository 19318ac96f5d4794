"""The document of a comparison as a table for people, as Markdown, CSV or a page of HTML. A missing number is '-'."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdctl.report.compare import COSTS, Document

MISSING = "-"
_EXPLAINED = (
    "value: of several seeds their mean [95 % interval]; against: minus {baseline}, seed by seed within a group, else "
    "by Welch's test; agree: % of samples decided as the teacher does, of a control as its student's teacher; ms: "
    "median of one image; front: no other row is better at these bytes, at these ms"
)
Cells = list[list[str]]


def table(document: Document) -> tuple[list[str], Cells]:
    """Head and rows for people. A column that no row has a number for is left out."""
    rows = document["rows"]
    metrics = {row["metric"] for row in rows if row["metric"]}
    columns: list[tuple[str, Callable[[Document], str | None]]] = [
        ("what", lambda r: r["what"]),
        ("student", lambda r: r["student"]),
        ("terms", lambda r: r["method"] if r["kind"] != "artefact" else r["runtime"]),
        ("seeds", lambda r: str(r["seeds"])),
        (metrics.pop() if len(metrics) == 1 else "metric", _value),
        ("against", _difference),
        ("agree", lambda r: _number(r["agreement"], ".2f")),
        ("ece", lambda r: _number(r["ece"], ".2f")),
        ("bytes", lambda r: _number(r["bytes"], ",.0f")),
        ("parameters", lambda r: _number(r["parameters"], ",.0f")),
        ("MACs", lambda r: _number(r["macs"], ",.0f")),
        ("ms", lambda r: _number(r["latency_ms"], ".3f")),
        ("epochs", lambda r: _number(r["epochs"], "g")),
        ("train s", lambda r: _number(r["seconds"], ",.1f")),
        ("front", _front),
    ]
    shown = [(name, [cell(row) for row in rows]) for name, cell in columns]
    shown = [(name, cells) for name, cells in shown if any(cell is not None for cell in cells)]
    body = [[MISSING if cell is None else cell for cell in line] for line in zip(*(c for _, c in shown), strict=True)]
    return [name for name, _ in shown], body


def differences(document: Document) -> tuple[list[str], Cells]:
    """Head and rows of the configuration keys that differ."""
    rows = document["differences"]
    if not rows:
        return [], []
    names = list(rows[0]["values"])
    body = [[row["key"], *(_brief(row["values"].get(name)) for name in names)] for row in rows]
    return ["key", *names], body


def _brief(value: Any) -> str:
    """A value of a configuration; of a whole section that others lack its kind."""
    if isinstance(value, dict) and "kind" in value:
        return str(value["kind"])
    return _plain(value)


def explained(document: Document) -> list[str]:
    """What the columns are, and the notes."""
    return [_EXPLAINED.format(baseline=document["baseline"]), *(f"note: {note}" for note in document["notes"])]


def same(document: Document) -> str:
    return f"{document['same']} configuration keys are the same"


def markdown(document: Document) -> str:
    parts = [_markdown_table(*table(document)), "\n".join(f"- {line}" for line in explained(document))]
    head, body = differences(document)
    if body:
        parts.append(_markdown_table(head, body))
    return "\n\n".join([*parts, same(document)]) + "\n"


def comma_separated(document: Document) -> str:
    """All numbers in full, one row a row; the mean, its interval and the difference in columns of their own."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    plain = ["what", "kind", "student", "method", "runtime", "seeds", "metric", "split", "samples"]
    costs = ["agreement", "ece", "bytes", "parameters", "macs", "latency_ms", "epochs", "seconds"]
    own = ["mean", "std", "low", "high"]
    other = ["difference", "difference_low", "difference_high", "p_value", "test"]
    writer.writerow([*plain, *own, *other, *costs, *(f"front_{cost}" for cost in COSTS)])
    for row in document["rows"]:
        value, against = row["value"] or {}, row["against_baseline"] or {}
        cells = [
            *(row[name] for name in plain), value.get("mean"), value.get("std"), *(value.get("ci95") or (None, None)),
            against.get("mean"), *(against.get("ci95") or (None, None)), against.get("p_value"), against.get("test"),
            *(row[name] for name in costs), *(row["pareto"][cost] for cost in COSTS),
        ]  # fmt: skip
        writer.writerow([_plain(cell) for cell in cells])
    return out.getvalue()


def page(document: Document) -> str:
    """One self-contained page: no script, nothing loaded from elsewhere."""
    import jinja2

    template = Path(__file__).with_name("compare.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    head, body = table(document)
    keys, values = differences(document)
    return environment.from_string(template).render(
        head=head, body=body, keys=keys, values=values, explained=explained(document), same=same(document)
    )


# --------------------------------------------------------------------------------------------------------------- cells


def _value(row: Document) -> str | None:
    return _with_interval(row["value"])


def _difference(row: Document) -> str | None:
    return _with_interval(row["against_baseline"], "+")


def _with_interval(value: Document | None, sign: str = "") -> str | None:
    """A mean and, where there is one, its interval."""
    if value is None:
        return None
    ends = value["ci95"]
    return f"{value['mean']:{sign}.2f}" + (f" [{ends[0]:{sign}.2f}, {ends[1]:{sign}.2f}]" if ends else "")


def _front(row: Document) -> str | None:
    """The costs at which no other row is better; None where neither is known."""
    known = [(name, row["pareto"][cost]) for name, cost in zip(("bytes", "ms"), COSTS, strict=True)]
    if all(on is None for _, on in known):
        return None
    return " ".join(name for name, on in known if on) or "no"


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _plain(value: Any) -> str:
    """A value of a configuration or a number in full."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_plain(v)}" for k, v in value.items()) + "}"
    return f"[{', '.join(map(_plain, value))}]" if isinstance(value, list | tuple) else str(value)


def _markdown_table(head: list[str], body: Cells) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, body)])
