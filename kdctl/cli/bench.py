"""`kdctl bench`: latency, throughput and memory of models and files, each in a fresh process, and what they cost."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from kdctl import runs
from kdctl.cli import console
from kdctl.cli.verb import Argument, Option, Options, Reply
from kdctl.errors import ConfigError, MissingError, UsageError

if TYPE_CHECKING:
    from kdctl.bench.latency import Cell

TORCH = "torch"
"""The target of artefacts that are weights and their record."""


def bench(
    options: Options,
    what: Annotated[list[str] | None, Argument(help="runs (their student and artefacts) or artefacts")] = None,
    batch: Annotated[str, Option("--batch", help="images a call; several as 1,32")] = "1,32",
    threads: Annotated[str, Option("--threads", help="threads that compute; several as 1,2")] = "1",
    seconds: Annotated[float, Option("--seconds", min=0.1, help="how long each cell is measured")] = 1.5,
) -> Reply:
    """Measure latency, throughput and memory of runs and artefacts, in turns, each in a fresh process."""
    batches, counts = _numbers(batch, "--batch"), _numbers(threads, "--threads")
    with tempfile.TemporaryDirectory() as folder:
        things = [thing for text in what or ["latest"] for thing in _things(text, Path(folder))]
        things = list({(thing.run.path.resolve(), thing.path): thing for thing in things}.values())
        from kdctl.bench.latency import measure

        cells = [(thing, thing.cell(size, count)) for thing in things for size in batches for count in counts]
        measured = measure([cell for _, cell in cells], seconds=seconds, progress=console.say)
    rows: dict[Path, list[dict[str, Any]]] = {}
    for (thing, _), row in zip(cells, measured, strict=True):
        rows.setdefault(thing.run.path.resolve(), []).append(row.as_dict() | thing.cost | {"path": str(thing)})
    head: dict[str, Any] = {
        "seconds": seconds, "processor": _processor(), "measured": datetime.now(UTC).isoformat(),
    }  # fmt: skip
    for home, own in rows.items():
        runs.write_json(home / "bench.json", head | {"rows": _beside_earlier(home / "bench.json", own, head)})
    written = [str(runs.Run(home / "bench.json")) for home in rows]
    return Reply(head | {"rows": [row for own in rows.values() for row in own], "written": written}, show)


def _beside_earlier(path: Path, own: list[dict[str, Any]], head: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with those that the run's file has of other cells, each of which says how long and when it was measured.

    What was measured on another processor, or of a student or artefact that is gone or was made anew, is left out.
    """
    run = runs.Run(path.parent)
    files = {"student": run / "student.safetensors"} | {made.name: made / "manifest.json" for made in run.artefacts}

    def holds(row: dict[str, Any]) -> bool:
        file = files.get(row["what"])
        if file is None:
            return bool(row["what"].startswith("teacher"))
        return file.is_file() and file.stat().st_mtime <= datetime.fromisoformat(row["measured"]).timestamp()

    def cell(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["what"], row["batch"], row["threads"]

    try:
        earlier = runs.read_json(path)
        since = {name: earlier[name] for name in ("seconds", "measured")}
        rows = [since | row for row in earlier["rows"] if earlier["processor"] == head["processor"]]
        kept = {cell(row): row for row in rows if holds(row)}
    except (MissingError, KeyError, TypeError, ValueError):  # there is none, or it is damaged
        kept = {}
    return list((kept | {cell(row): row for row in own}).values())


def show(document: dict[str, Any]) -> None:
    """A row a cell, then what the columns are and where the numbers were written."""
    several = len({str(Path(path).parent) for path in document["written"]}) > 1
    head = ["what", "runtime", "batch", "threads", "p50 ms", "p95 ms", "cpu ms", "samples/s", "peak MB"]
    rows = [
        [
            row["path"] if several else row["what"], " ".join(row["runtime"].split()[:2]),
            row["batch"], row["threads"], f"{row['p50_ms']:.3f}",
            f"{row['p95_ms']:.3f}", f"{row['cpu_ms']:.3f}", f"{row['samples_per_second']:,.0f}",
            f"{row['peak_bytes'] / 1e6:,.0f}", f"{row['bytes']:,}", f"{row['parameters']:,}", f"{row['macs']:,}",
        ]
        for row in document["rows"]
    ]  # fmt: skip
    console.print_table([*head, "bytes", "parameters", "MACs"], rows)
    console.out("cpu: least process time of a call, which other processes disturb least; compare by that")
    for path in document["written"]:
        console.out(f"wrote {path}")


def _numbers(text: str, option: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UsageError(f"{option} takes whole numbers above 0 with commas between them, not '{text}'")
    return list(dict.fromkeys(int(word) for word in words))


# --------------------------------------------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class _Thing:
    """A model or file that is measured. path: the file, or the stem of a model. cost: bytes, parameters and macs.
    named: what the user calls it, where that is not its path."""

    what: str
    run: runs.Run
    target: str
    path: Path
    cost: dict[str, int]
    named: str | None = None

    def __str__(self) -> str:
        """Its path as the user would type it."""
        return self.named or str(runs.Run(self.path))

    def cell(self, batch: int, threads: int) -> Cell:
        from kdctl.bench.latency import Cell
        from kdctl.export import elsewhere, files

        opener, python = "kdctl.evaluate:open_torch", None
        if self.target != TORCH:
            opener, python = files.opener(self.target), elsewhere.python_of(self.target)
        return Cell(self.what, opener, {"path": str(self.path)}, batch, threads, python)


def _things(text: str, folder: Path) -> list[_Thing]:
    """What a word of the command line stands for: an artefact, or a run's student, teachers and all its artefacts.

    folder: where a teacher is saved whose weights are not kdctl's own.
    """
    path = Path(text)
    if (path / "manifest.json").is_file():
        return [_artefact(path)]
    run = runs.find(text)
    if not (run / "student.safetensors").is_file():
        raise MissingError(f"{run} has no finished student yet", hint=f"`kdctl resume {run}` continues it")
    return [_student(run), *_teachers(run, folder), *map(_artefact, run.artefacts)]


def _student(run: runs.Run) -> _Thing:
    console.say("loading torch ...")
    from kdctl.analysis.cost import known_costs

    stem = (run / "student").resolve()
    return _Thing("student", run, TORCH, stem, known_costs(stem))


def _teachers(run: runs.Run, folder: Path) -> list[_Thing]:
    """Those of the student; none, and a line that says why, where they cannot be loaded."""
    from kdctl.analysis.cost import known_costs
    from kdctl.analysis.teachers import saved_teachers
    from kdctl.build import build_data
    from kdctl.experiment import load_run

    try:
        experiment = load_run(run)
        own = Path(tempfile.mkdtemp(dir=folder))
        found = saved_teachers(run, experiment, own, lambda: build_data(experiment))
        return [
            _Thing("teacher" if len(found) == 1 else f"teacher {number}", run, TORCH, it.stem, known_costs(it.stem),
                   it.named if own in it.stem.parents else None)
            for number, it in enumerate(found, 1)
        ]  # fmt: skip
    except (ConfigError, MissingError) as error:
        console.say(f"the teacher of {run} is not measured: {error}")
        return []


def _artefact(folder: Path) -> _Thing:
    """An artefact whose files are those of its manifest; its costs are those that were counted when it was made."""
    from kdctl.export import manifest

    made = manifest.verify(folder)
    result = runs.read_json(folder / "result.json")
    try:
        known = {name: int(result["after"][name]) for name in ("bytes", "parameters", "macs")}
    except (KeyError, TypeError):
        message = f"{folder} was made by an older kdctl: its result.json does not say what it costs"
        raise MissingError(message, hint="make the artefact again") from None
    run = runs.Run(folder.resolve().parent.parent)
    return _Thing(folder.name, run, str(made["target"]), (folder / made["model"]).resolve(), known)


def _processor() -> str:
    from kdctl.bench.latency import processor

    return processor()
