"""`kdctl clean`: what could be deleted, and why; with --yes it is. Nothing but what kdctl made itself."""

from __future__ import annotations

import contextlib
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from kdctl import runs
from kdctl.cli import console, debris
from kdctl.cli.debris import HOUR, Item
from kdctl.cli.verb import Argument, Option, Options, Reply
from kdctl.errors import KdctlError, MissingError, Problem, UsageError
from kdctl.runs import Run

_UNITS = {"m": 60, "h": HOUR, "d": 24 * HOUR, "w": 7 * 24 * HOUR}


def clean(
    options: Options,
    what: Annotated[list[str] | None, Argument(metavar="RUN", help="whole runs to delete")] = None,
    older: Annotated[str | None, Option("--older", help="runs made longer ago than 30d, 12h or 2w")] = None,
    cache: Annotated[bool, Option("--cache", help="the stores of teacher outputs that all runs share")] = False,
    checkpoints: Annotated[bool, Option("--checkpoints", help="of finished runs the checkpoints alone")] = False,
    yes: Annotated[bool, Option("--yes", help="Delete; without it nothing is touched.")] = False,
) -> Reply:
    """What could be deleted, its bytes and why; with --yes it is deleted.

    Without RUN and options: what killed processes left half made (files and folders written aside), and the files of
    groups whose runs are all gone. Runs that stopped or failed stay, for `kdctl resume` continues them: name them.
    --checkpoints deletes the training state of finished runs, of all or of those named, often most of their bytes: they
    can still be evaluated, compressed and exported, but not with `eval --checkpoint last`.

    Only what kdctl made goes: files that it does not know stay where they are, and links are not followed. A run that
    is at work is never deleted; one that `latest` names, that is another run's teacher, or whose group is unfinished
    is deleted only where RUN names it.
    """
    age = None if older is None else _seconds(older)
    kept: list[dict[str, str]] = []
    items: list[Item] = []
    named = list({run.path.resolve(): run for run in map(_named, what or [])}.values())
    if checkpoints:
        items += _checkpoints(named or runs.all_runs(), age, kept)
    elif named or age is not None:
        items += _runs(named, age, kept)
    if cache:
        items += _stores(age)
    if not (named or cache or checkpoints or age is not None):
        items += debris.leftovers(runs.ROOT, kept)
    document = {"items": [item.as_dict() for item in items], "kept": kept, "bytes": sum(item.bytes for item in items)}
    if not yes:
        return Reply(document | {"deleted": False}, _show)
    problems = [problem for item in items if (problem := _delete(item)) is not None]
    debris.forget_latest(runs.ROOT)
    done = document | {"deleted": True, "items": [item.as_dict() for item in items]}
    return Reply(done, _show, KdctlError(*problems) if problems else None)


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", text.strip())
    if found is None:
        raise UsageError(f"--older takes a time such as 30d, 12h, 2w or 90m, not '{text}'")
    return float(found[1]) * _UNITS[found[2]]


def _named(text: str) -> Run:
    """The run that a word names; of a name with several runs none, for deleting is no matter of guessing."""
    if text == "latest":
        return runs.find()
    for path in (Path(text), runs.ROOT / text):
        if path.is_symlink():
            raise UsageError(f"{path} is a link, and links are not followed", hint=f"name {path.resolve()} itself")
        if runs.is_run(path):
            return Run(path)
        inside = sorted(p for p in path.glob("[0-9]*") if runs.is_run(p) and not p.is_symlink())
        if len(inside) == 1:
            return Run(inside[0])
        if inside:
            shown = ", ".join(map(str, inside[:5])) + (", ..." if len(inside) > 5 else "")
            raise UsageError(f"'{text}' has several runs: {shown}", hint="name those that are to be deleted")
    hint = "`kdctl list runs` shows the runs; only what kdctl made is deleted"
    raise MissingError(f"there is no run at '{text}'", hint=hint)


# ------------------------------------------------------------------------------------------------------ what would go


def _runs(named: list[Run], age: float | None, kept: list[dict[str, str]]) -> list[Item]:
    """The runs that were named, else all; those that are not old enough, at work or needed are kept."""
    by_name = {run.path.resolve() for run in named}
    candidates = []
    for run in named or runs.all_runs():
        if age is not None and _age(run) < age:
            if named:
                kept.append({"path": str(run), "why": f"made {_date(run)}, which is not that long ago"})
            continue
        why = debris.at_work(run) or (None if by_name else debris.needed(run))
        if run.path.is_symlink() or debris.is_linked(run.path, runs.ROOT):
            why = "a link, which is not followed"
        if why:
            kept.append({"path": str(run), "why": why})
        else:
            candidates.append(run)
    pupils = debris.pupils_of(candidates)
    items = []
    for run in candidates:
        others = pupils.get(run.path.resolve(), [])
        teaches = f"teacher of {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}"
        if others and not by_name:
            kept.append({"path": str(run), "why": teaches})
            continue
        info = run.info
        why = f"{info['role']}, {info['status']}, made {_date(run)}" + (f"; {teaches}" if others else "")
        known, unknown = debris.contents(run.path)
        items.append(Item("run", run.path, why, known, unknown))
    return items


def _checkpoints(candidates: list[Run], age: float | None, kept: list[dict[str, str]]) -> list[Item]:
    items = []
    for run in candidates:
        if age is not None and _age(run) < age:
            continue
        if run.info["status"] != "done" or debris.at_work(run):
            kept.append({"path": str(run), "why": "not finished: `kdctl resume` needs its checkpoints"})
            continue
        for folder in sorted(run.path.glob("stages/*/checkpoints")):
            states = [p for p in sorted(folder.glob("*.pt")) if not debris.is_linked(p, run.path)]
            items += [Item("checkpoints", folder, f"{run} is done", states)] if states else []
    return items


def _stores(age: float | None) -> list[Item]:
    """The stores of teacher outputs, as `kdctl cache clear` deletes them."""
    home = runs.cache_home() / "teachers"
    if not home.is_dir():
        return []
    console.say("loading torch ...")
    from kdctl.teachers.store import own_files

    items = []
    for folder in sorted(p for p in home.iterdir() if p.is_dir() and not p.is_symlink()):
        known = [folder / name for name in own_files(folder)]
        unused = time.time() - max((p.stat().st_mtime for p in known), default=0)
        if known and (age is None or unused >= age):
            unknown = sorted(p.name for p in folder.iterdir() if p not in known)
            why = "what a teacher said; filled again when it is needed"
            items.append(Item("store", folder, why, known, unknown))
    return items


def _age(run: Run) -> float:
    """Seconds since the run was made; 0 where its record does not say when."""
    with contextlib.suppress(ValueError, TypeError):
        made = datetime.fromisoformat(str(run.info["created"]))
        return (datetime.now(UTC) - (made if made.tzinfo else made.replace(tzinfo=UTC))).total_seconds()
    return 0.0


def _date(run: Run) -> str:
    return str(run.info["created"])[:10]


def _delete(item: Item) -> Problem | None:
    try:
        item.delete()
    except OSError as error:
        return Problem(f"cannot be deleted: {error.strerror or error}", file=str(error.filename or item.path))
    except KdctlError as error:
        return error.problems[0]
    return None


def _show(document: dict[str, Any]) -> None:
    items = document["items"]
    if items:
        rows = [[item["path"], item["kind"], f"{item['bytes']:,}", item["files"], item["why"]] for item in items]
        console.print_table(["path", "what", "bytes", "files", "why"], rows)
    for item in items:
        if item["unknown"]:
            console.out(f"kept in {item['path']}: {', '.join(item['unknown'])}, which kdctl did not make")
    for entry in document["kept"]:
        console.out(f"kept: {entry['path']}: {entry['why']}")
    if not items:
        console.out("nothing to delete")
    elif document["deleted"]:
        console.out(f"deleted {sum(i['bytes'] for i in items if i['deleted']):,} bytes")
    else:
        console.out(f"{document['bytes']:,} bytes; nothing was deleted: --yes deletes it")
