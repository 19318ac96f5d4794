"""What a comparison is of: what the words of `kdctl compare` stand for, each a row to be."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdctl import runs
from kdctl.errors import MissingError, Problem
from kdctl.report.facts import BASELINE, STUDENT, Document, RunFacts
from kdctl.runs import Run


@dataclass
class Entry:
    """One row to be: the runs of one role of a group, a run, or the artefact of this name in each of them."""

    what: str
    members: list[RunFacts]
    artefact: str | None = None
    scope: str = ""
    """What the seeds are seeds of: the group's file, or the run. Rows of one scope are compared seed by seed."""

    @property
    def lead(self) -> RunFacts:
        return self.members[0]

    def documents(self) -> list[tuple[RunFacts, Document]]:
        """Each member that has it, with the artefact's result.json."""
        found = ((m, d) for m in self.members for d in m.artefacts if d.get("variant") == self.artefact)
        return list(found)


def find_entries(word: str, notes: list[str]) -> list[Entry]:
    """What a word stands for: a row, and one for each artefact of its runs; of a group's file also its controls."""
    path = Path(word)
    if (path / "manifest.json").is_file():
        facts = RunFacts(_run_of(path), notes)
        return [Entry(str(Run(path)), [facts], path.resolve().name, _scope(facts))]
    if path.is_file():
        members = _group_members(path, notes)
        roles = sorted({m.name for m in members}, key=lambda name: (name != STUDENT, name != BASELINE, name))
        return [entry for role in roles for entry in _with_artefacts(members, role, path)]
    facts = RunFacts(runs.find(word), notes)
    group = facts.info.get("group")
    file = facts.run.path.parent / group if group else None
    if file is not None and file.is_file():
        with contextlib.suppress(MissingError):  # none of them is finished yet
            members = _group_members(file, notes)
            if sum(m.name == facts.name for m in members) > 1:
                return _with_artefacts(members, facts.name, file)
    mine = Entry(str(facts.run), [facts], scope=_scope(facts))
    if not facts.summary:
        notes.append(f"{facts.run} is {facts.info['status']}: nothing of it is measured yet")
    return [mine, *_artefacts_of(mine)]


def _run_of(artefact: Path) -> Run:
    run = Run(artefact.resolve().parent.parent)
    if not runs.is_run(run.path):
        raise MissingError(f"{artefact} lies in no run", hint="an artefact is compared where kdctl made it")
    return run


def _scope(facts: RunFacts) -> str:
    group = facts.info.get("group")
    return str((facts.run.path.parent / group if group else facts.run.path).resolve())


def _group_members(path: Path, notes: list[str]) -> list[RunFacts]:
    """The measured runs of a group, by seed."""
    document = runs.read_json(path)
    if not isinstance(document, dict) or not isinstance(document.get("members"), list):
        raise MissingError(Problem("this is not the file of a group", file=str(path), hint="runs/NAME/groups/001.json"))
    home = path.resolve().parent.parent
    places = [home / str(m["run"]) for m in document["members"] if m.get("run")]
    found = [RunFacts(Run(place), notes) for place in places if runs.is_run(place)]
    measured = sorted((m for m in found if m.summary), key=lambda m: m.seed)
    if len(measured) < len(document["members"]):
        notes.append(f"{path}: {len(measured)} of its {len(document['members'])} runs are there and finished")
    if not measured:
        raise MissingError(f"no run of {path} is finished", hint="`kdctl resume` continues it")
    return measured


def _with_artefacts(members: list[RunFacts], role: str, path: Path) -> list[Entry]:
    mine = [m for m in members if m.name == role]
    name = str(Run(path)).removesuffix(".json") + ("" if role == STUDENT else f" {role}")
    entry = Entry(name, mine, scope=str(path.resolve()))
    return [entry, *_artefacts_of(entry)]


def _artefacts_of(entry: Entry) -> list[Entry]:
    names = sorted({str(d["variant"]) for m in entry.members for d in m.artefacts if "variant" in d})
    return [Entry(f"{entry.what}/artefacts/{name}", entry.members, name, entry.scope) for name in names]


def unique(entries: list[Entry]) -> list[Entry]:
    """Each thing once, however often and by whichever of its names it was named."""
    found: dict[tuple[Any, ...], Entry] = {}
    for entry in entries:
        found.setdefault((entry.artefact, *(m.run.path.resolve() for m in entry.members)), entry)
    return list(found.values())
