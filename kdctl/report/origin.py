"""The last sections of a report: how everything was made, what was noted, and what the page does not show."""

from __future__ import annotations

import shlex
from typing import Any

from markupsafe import Markup

from kdctl.report import numbers as n
from kdctl.report.blocks import Cell, Items, Prose, Section, Table, Verbatim
from kdctl.report.claims import label
from kdctl.report.facts import STUDENT, Facts
from kdctl.report.numbers import NONE, said


def command_text(command: Any) -> str:
    """A command line as one would type it; the program by its name alone."""
    if isinstance(command, str) or not command:
        return str(command or "")
    first, *rest = (str(word) for word in command)
    return shlex.join([first.replace("\\", "/").rsplit("/", 1)[-1], *rest])


def origin(facts: Facts) -> Section:
    """Runs, configuration, environment, hashes."""
    section = Section("origin", "How it was made")
    lead = facts.lead
    section.blocks.append(_runs(facts))
    commands = dict.fromkeys(command_text(member.info.get("command")) for member in facts.members)
    section.blocks += [Prose(Markup("Begun by <code>{}</code>").format(said(text))) for text in commands if text]
    section.blocks.append(Verbatim("Configuration, resolved (config.yaml)", lead.config_text))
    if lead.provenance:
        section.blocks.append(_provenance(lead.provenance))
    else:
        section.missing("There is no provenance.json: a run of this kdctl writes it at its end")
    environment = lead.environment
    packages = environment.get("packages") or {}
    rows: list[list[Cell]] = [
        [said(name), said(value)]
        for name, value in [*environment.items(), *packages.items()]
        if not isinstance(value, dict | list) and value is not None
    ]
    if rows:
        section.blocks.append(Table("Environment (env.json)", ["what", "value"], rows, tall=True))
    return section


def _runs(facts: Facts) -> Table:
    rows: list[list[Cell]] = [
        [
            said(member.run), label(member.name), n.name(member.seed), str(member.info["status"]),
            said(str(member.info["created"])[:19]),
        ]
        for member in facts.members
    ]  # fmt: skip
    return Table("Runs", ["run", "role", "seed", "status", "begun (UTC)"], rows, tall=len(rows) > 12)


def _provenance(known: dict[str, Any]) -> Table:
    data = known.get("data") or {}
    samples = Markup(", ").join(
        Markup("{} {}").format(split, n.count(count)) for split, count in (data.get("samples") or {}).items()
    )
    rows: list[list[Cell]] = [
        ["command", said(command_text(known.get("command")))],
        ["configuration, SHA-256", _hash(known.get("config_sha256"))],
        ["data", said(data.get("kind", "-"))],
        ["data, fingerprint", _hash(data.get("fingerprint"))],
        ["samples", samples or NONE],
    ]
    for teacher in known.get("teachers") or []:
        rows.append(["teacher", said(f"{teacher.get('kind')} {teacher.get('weights') or ''}".strip())])
        rows.append(["teacher, SHA-256", _hash(teacher.get("sha256"))])
        if "tokenizer_sha256" in teacher:
            rows.append(["its tokenizer, SHA-256 of the file", _hash(teacher["tokenizer_sha256"])])
    for source in known.get("inherited") or []:
        rows.append(["the student begins with weights of", said(source.get("source", "-"))])
        rows.append(["these weights, SHA-256 of the file", _hash(source.get("sha256"))])
    student = known.get("student") or {}
    rows += [["student", said(student.get("kind", "-"))], ["student, SHA-256", _hash(student.get("sha256"))]]
    for name, own in (known.get("code") or {}).items():
        rows.append([said(f"code/{name}, SHA-256"), _hash(own)])
    return Table("Provenance (provenance.json)", ["what", "value"], rows)


def _hash(value: Any) -> Markup:
    return Markup('<code class="hash">{}</code>').format(said(value)) if value else NONE


def limits(facts: Facts, notes: list[str]) -> Section:
    """Notes of the runs, and what a reader might think that the page shows."""
    section = Section("limits", "Notes, and what this report does not show")
    told = [
        *facts.lead.summary.get("notes", []),
        *facts.result.get("notes", []),
        *facts.lead.evaluation.get("notes", []),
        *facts.notes,
        *notes,
    ]
    told += [note for made in facts.lead.artefacts for note in made.get("notes", [])]
    if told:
        section.blocks.append(Items([said(note) for note in dict.fromkeys(told)]))
    section.blocks.append(Prose("It does not show:"))
    section.blocks.append(Items(not_shown(facts)))
    return section


def not_shown(facts: Facts) -> list[Cell]:
    """Sentences on what cannot be read from the numbers, those that apply."""
    several = len({member.seed for member in facts.members if member.name == STUDENT}) > 1
    found: list[Cell] = []
    if not several:
        found.append("How much another seed would change: there is one. Differences of the size of that are noise.")
    else:
        found.append(
            "Uncertainty from the choice of the test samples: intervals are over seeds, on one split of one data set."
        )
        if facts.lead.taught:
            found.append("What another teacher would have given: all seeds of a group share one.")
        found.append("Fidelity, calibration, classes, robustness and layers of the other seeds.")
    if not _has_control(facts):
        found.append("Whether the teacher helped: there is no run without it under the same budget.")
    else:
        found.append("A control that was tuned for itself: it has the student's learning rate and schedule.")
    found.append("Other data than these: images from elsewhere, other cameras, other classes, attacks.")
    found.append("Latency on another processor, or while the machine does something else.")
    return found


def _has_control(facts: Facts) -> bool:
    return any(member.name != STUDENT for member in facts.members)
