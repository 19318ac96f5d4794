"""`kdctl report`: one HTML page about a run, its group or several runs, which opens without a network."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from kdctl import runs
from kdctl.cli import console
from kdctl.cli.verb import Argument, Option, Options, Reply
from kdctl.errors import KdctlError, MissingError, UsageError

if TYPE_CHECKING:
    from kdctl.report.facts import Facts


def report(
    options: Options,
    what: Annotated[
        list[str] | None, Argument(metavar="RUN", help="runs or files of groups; the first is shown in full")
    ] = None,
    output: Annotated[
        str | None, Option("-o", "--output", metavar="FILE", help="the page; report.html in the first run")
    ] = None,
    follow: Annotated[bool, Option("--follow", help="rewrite the page while the run is training")] = False,
    no_analysis: Annotated[
        bool, Option("--no-analysis", help="only what is measured already: no robustness, layers or cost")
    ] = False,
) -> Reply:
    """Write one page about a run with its seeds and controls, or about several: it opens offline, light and dark."""
    given = list({run.path.resolve(): run for run in map(_find, what or ["latest"])}.values())
    path = Path(output) if output else None
    if path is not None and path.is_dir():
        raise UsageError(f"{path} is a directory", hint="name a file, such as report.html")
    from kdctl.report.page import write_report

    if follow:
        _follow(given, path)
    notes = [] if no_analysis else _analyse(given)
    place, facts = write_report(given, path, notes=notes)
    return Reply(_document(place, facts, notes), show)


def show(document: dict[str, Any]) -> None:
    """Where the page is, and what it lacks."""
    for note in document["notes"]:
        console.out(f"note: {note}")
    console.out(f"wrote {document['report']} ({document['bytes'] / 1000:,.0f} kB)")


def _document(place: Path, facts: Facts, notes: list[str]) -> dict[str, Any]:
    shown = [str(run.run) for run in (*facts.members, *facts.others)]
    told = [*facts.notes, *notes]
    return {"report": str(runs.Run(place)), "bytes": place.stat().st_size, "runs": shown, "notes": told}


def _find(text: str) -> runs.Run:
    """The run that a word means; of the file of a group its first student."""
    path = Path(text)
    if not path.is_file():
        return runs.find(text)
    document = runs.read_json(path) if path.suffix == ".json" else None
    members = document.get("members") if isinstance(document, dict) else None
    if not isinstance(members, list):
        raise MissingError(f"{text} is neither a run nor the file of a group", hint="runs/NAME/001, NAME or latest")
    places = [path.resolve().parent.parent / str(m["run"]) for m in members if m.get("run") and m["role"] == "main"]
    found = next(filter(runs.is_run, places), None)
    if found is None:
        raise MissingError(f"no student of {text} has begun yet", hint="`kdctl list runs` shows what is there")
    return runs.Run(found)


def _follow(given: list[runs.Run], path: Path | None) -> None:
    """Rewrites the page every few seconds until nothing of the first run or its group is training."""
    from kdctl.report.page import SECONDS, write_report

    told = False
    while True:
        place, facts = write_report(given, path, refresh=True)
        if not facts.training:
            return
        if not told:
            console.say(f"{runs.Run(place)} shows what is there and loads itself again; Ctrl-C stops")
            told = True
        time.sleep(SECONDS)


def _analyse(given: list[runs.Run]) -> list[str]:
    """Measures what the page shows and no file holds yet, of the first run and of its control; what failed, as notes.

    Nothing is measured of a run that is not done. The control's net is the student's: its latency is not measured.
    """
    from kdctl.report.facts import collect

    facts, notes = collect(given), []
    for member in filter(None, (facts.lead, facts.control())):
        if not member.done or not (member.run / "student.safetensors").is_file() or not member.lacking:
            continue
        console.say(f"measuring {', '.join(member.lacking)} of {member.run}; --no-analysis leaves that out")
        from kdctl.analysis.analyse import analyse
        from kdctl.experiment import load_run

        def say(text: str) -> None:
            console.say(text)
            if "left out" in text:
                notes.append(text)

        try:
            analyse(member.run, load_run(member.run), say=say, timed=member is facts.lead)
        except KdctlError as error:
            notes.append(f"{member.run} was not analysed: {error}")
    return notes
