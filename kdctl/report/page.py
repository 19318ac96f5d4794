"""The report: one HTML page that holds all it shows and opens without a network. It reads run directories alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kdctl import __version__, runs
from kdctl.errors import counted
from kdctl.report import claims, curves, origin, price, quality
from kdctl.report.blocks import Section
from kdctl.report.facts import Facts, collect
from kdctl.report.numbers import said
from kdctl.report.side_by_side import comparison
from kdctl.runs import Run

FILE = "report.html"
SECONDS = 3
"""After how long a page that follows a training is loaded again."""


def write_report(
    given: Sequence[Run], path: Path | None = None, *, notes: Sequence[str] = (), refresh: bool = False
) -> tuple[Path, Facts]:
    """Writes the page of the runs and returns where it is, and what it was made of.

    path: report.html in the first run when left out. notes: what the reader should know beside what the runs say.
    refresh: the page loads itself again every few seconds, for as long as something is training.
    """
    facts = collect(given)
    page = render(facts, notes=notes, refresh=refresh and facts.training)
    place = path or facts.lead.run / FILE
    runs.write_text(place, page)
    return place, facts


def render(facts: Facts, *, notes: Sequence[str] = (), refresh: bool = False) -> str:
    """The page as text. Equal files give the same page, but for the time at its foot."""
    environment = _environment()
    name = str(facts.lead.info.get("name") or facts.lead.run.path.name)
    text = environment.get_template("page.html.j2").render(
        title=f"{name}: report of kdctl",
        name=said(name),
        subtitle=_subtitle(facts),
        sections=sections(facts, list(notes)),
        refresh=SECONDS if refresh else None,
        version=said(__version__),
        made=said(datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
    )
    return re.sub(r"\n\s*\n+", "\n", text)


def sections(facts: Facts, notes: list[str]) -> list[Section]:
    """The parts of the page in their order."""
    command = f"kdctl report {facts.lead.run}"
    parts = [
        claims.summary(facts),
        *([comparison(facts)] if facts.others else []),
        claims.seeds(facts),
        curves.curves(facts),
        quality.fidelity(facts),
        quality.calibration(facts),
        quality.classes(facts),
        quality.robustness(facts, command),
        quality.layers(facts, command),
        price.cost(facts, command),
        origin.origin(facts),
    ]
    return [*parts, origin.limits(facts, notes)]


def _subtitle(facts: Facts) -> Any:
    from markupsafe import Markup

    parts = [Markup("run {}").format(said(facts.lead.run))]
    if len(facts.members) > 1:
        seeds = len({member.seed for member in facts.members})
        parts.append(Markup("{} runs of its group, {}").format(len(facts.members), counted(seeds, "seed")))
    if facts.others:
        parts.append(Markup("compared with {} more").format(len(facts.others)))
    return Markup("; ").join(parts)


def _environment() -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("kdctl", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
