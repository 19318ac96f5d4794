"""What kdctl leaves on disk and may take away again: which files are its own, who is at work, who needs a run."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdctl import runs
from kdctl.errors import MissingError
from kdctl.runs import Run

HOUR = 3600.0
_RUN_ENTRIES = {
    "run.json", "run.lock", "config.yaml", "config.source.yaml", "env.json", "metrics.jsonl", "summary.json", "log.txt",
    "stages", "teachers", "code", "eval", "analysis", "bench.json", "artefacts", "plots", "report.html", "README.md",
    "provenance.json", "loggers.json", "tensorboard", "mlflow", "wandb",
}  # fmt: skip
"""What kdctl itself puts at the top of a run."""
_MODELS = re.compile(r"(student|teacher|assistant|compressed)\.(safetensors|json)")
_RANDOM = r"[a-z0-9_]{8}"  # as tempfile makes them
_OURS = "json|jsonl|yaml|safetensors|npz|pt|txt|csv|html|md|svg|png|onnx|latest"
_ASIDE_FILE = re.compile(rf"\.(.+\.)?({_OURS})\.{_RANDOM}")
_ASIDE_FOLDER = re.compile(rf"\.(new|old|stage)-{_RANDOM}")
_ASIDE_ARTEFACT = re.compile(rf"\.[\w.-]+-{_RANDOM}")
_WEIGHTS = re.compile(r"^[\s-]*weights: +(.+?)\s*$", re.MULTILINE)


@dataclass
class Item:
    """Something that can be deleted. known: the files and folders of it that go. unknown: names in it that stay."""

    kind: str
    path: Path
    why: str
    known: Sequence[Path]
    unknown: Sequence[str] = ()
    deleted: bool = False
    bytes: int = field(init=False)
    files: int = field(init=False)

    def __post_init__(self) -> None:
        self.bytes, self.files = measured(self.known)

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": str(Run(self.path)), "kind": self.kind, "bytes": self.bytes, "files": self.files, "why": self.why,
            "unknown": list(self.unknown), "deleted": self.deleted,
        }  # fmt: skip

    def delete(self) -> None:
        """Deletes it. A run loses its name first, so that half a run is never taken for a whole one.

        Raises OSError, or KdctlError where a process has begun to work on it.
        """
        if self.kind == "run":
            lock = self.path / "run.lock"
            with runs.locked(lock, str(Run(self.path))) if lock.is_file() else contextlib.nullcontext():
                self._delete_run()
            _prune(self.path.parent)
        else:
            for path in self.known:
                _remove(path)
            if self.kind in ("store", "checkpoints"):
                with contextlib.suppress(OSError):
                    self.path.rmdir()
            if self.kind == "group":
                _prune(self.path.parent.parent)
        self.deleted = True

    def _delete_run(self) -> None:
        aside = Path(tempfile.mkdtemp(dir=self.path.parent, prefix=".old-"))
        if not self.unknown:
            os.rename(self.path, aside / self.path.name)
        else:
            for path in self.known:
                os.rename(path, aside / path.name)
        shutil.rmtree(aside)


def measured(paths: Sequence[Path]) -> tuple[int, int]:
    """Bytes and number of files of trees; links are not followed, and a file with several names counts once."""
    total, count, seen = 0, 0, set()
    for path in paths:
        for file in _files(path):
            with contextlib.suppress(OSError):
                status = os.lstat(file)
                if (status.st_dev, status.st_ino) not in seen:
                    seen.add((status.st_dev, status.st_ino))
                    total += status.st_size if stat.S_ISREG(status.st_mode) else 0
                    count += 1
    return total, count


def _files(path: Path) -> Iterator[Path]:
    if path.is_symlink() or not path.is_dir():
        yield path
        return
    for place, folders, names in os.walk(path):
        yield from (Path(place, name) for name in names)
        yield from (Path(place, name) for name in folders if os.path.islink(os.path.join(place, name)))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_linked(path: Path, home: Path) -> bool:
    """Whether a link leads to a path below a folder."""
    return any(p.is_symlink() for p in (path, *path.parents) if p != home and p.is_relative_to(home))


def _prune(folder: Path) -> None:
    """Removes the folder of a name, and its folder of groups, where nothing is left in them."""
    for place in (folder / "groups", folder):
        if place.resolve() != runs.ROOT.resolve():
            with contextlib.suppress(OSError):
                place.rmdir()


# ----------------------------------------------------------------------------------------------------------------- runs


def contents(run: Path) -> tuple[list[Path], list[str]]:
    """The entries of a run that kdctl made, and the names of those that it did not: links among them."""
    known, unknown = [], []
    for path in sorted(run.iterdir()):
        name = path.name
        own = name in _RUN_ENTRIES or _MODELS.fullmatch(name) or _ASIDE_FOLDER.fullmatch(name)
        aside = _ASIDE_FILE.fullmatch(name) and not path.is_dir()
        if (own or aside) and not path.is_symlink():
            known.append(path)
        else:
            unknown.append(name)
    return known, unknown


def at_work(run: Run) -> str | None:
    """Why a run must be left alone: a process holds it, or it says that it runs and was changed within an hour."""
    if _is_held(run / "run.lock"):
        return "in use by a kdctl process"
    quiet = time.time() - _last_change(run.path)
    if run.info["status"] == "running" and quiet < HOUR:
        return f"says that it is running, and was changed {quiet / 60:.0f} min ago"
    return None


def needed(run: Run) -> str | None:
    """Why a run is deleted only by its own name."""
    info = run.info
    if info["status"] == "running":
        return "says that it is running; name it if its process was killed"
    named = _latest(runs.ROOT)
    if named is not None and named.resolve() == run.path.resolve():
        return "the run that `latest` names"
    group = run.path.parent / info["group"] if info.get("group") else None
    if group is not None and group.is_file():
        if _is_held(group.with_suffix(".lock")):
            return "its group is in use by a kdctl process"
        with contextlib.suppress(MissingError, AttributeError):
            if not runs.read_json(group).get("result"):
                return f"its group {Run(group)} is not finished"
    return None


def pupils_of(doomed: Sequence[Run]) -> dict[Path, list[str]]:
    """By the path of a run: the runs, themselves to stay, whose configuration takes weights out of it."""
    homes = {run.path.resolve() for run in doomed}
    found: dict[Path, list[str]] = {}
    for other in runs.all_runs():
        if other.path.resolve() in homes:
            continue
        with contextlib.suppress(OSError, UnicodeDecodeError):
            for weights in _WEIGHTS.findall(other.config.read_text(encoding="utf-8")):
                place = (other.path / weights.strip("'\"")).resolve()
                for home in homes & {place, *place.parents}:
                    if str(other) not in found.setdefault(home, []):
                        found[home].append(str(other))
    return found


def _latest(root: Path) -> Path | None:
    try:
        return root / (root / "latest").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def forget_latest(root: Path) -> None:
    """Removes the file `latest` where the run that it names is gone; the newest of the others then stands for it."""
    named = _latest(root)
    if named is not None and not named.exists():
        (root / "latest").unlink(missing_ok=True)


def _is_held(lock: Path) -> bool:
    """Whether another process holds a lock file; nothing of it is changed."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock: there nothing is guarded
        return False
    if lock.is_symlink() or not lock.is_file():
        return False
    with open(lock, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        return False


def _last_change(path: Path) -> float:
    """When anything in a tree was changed last."""
    newest = path.lstat().st_mtime
    for file in _files(path):
        with contextlib.suppress(OSError):
            newest = max(newest, os.lstat(file).st_mtime)
    return newest


# ------------------------------------------------------------------------------------------------------------ leftovers


def leftovers(root: Path, kept: list[dict[str, str]]) -> list[Item]:
    """What killed processes left aside below the folder of runs, and the files of groups without runs."""
    if not root.is_dir():
        return []
    asides: list[Path] = [p for p in _inside(root) if _ASIDE_FILE.fullmatch(p.name) and p.is_file()]
    items: list[Item] = []
    for home in (p for p in _inside(root) if p.is_dir() and not p.name.startswith(".")):
        asides += [p for p in _inside(home) if _ASIDE_FOLDER.fullmatch(p.name)]
        for run in (Run(p) for p in _inside(home) if runs.is_run(p)):
            with contextlib.suppress(MissingError):
                mine = list(_asides_of(run.path))
                why = at_work(run) if mine else None
                if why:
                    kept.append({"path": str(run), "why": why})
                else:
                    asides += mine
        groups = home / "groups"
        if groups.is_dir() and not groups.is_symlink():
            asides += [p for p in _inside(groups) if _ASIDE_FILE.fullmatch(p.name) and p.is_file()]
            items += [item for p in sorted(groups.glob("*.json")) if (item := _empty_group(p)) is not None]
    old = (p for p in asides if time.time() - _last_change(p) >= HOUR)
    return [*(Item("leftover", p, "written aside by a process that did not end well", [p]) for p in old), *items]


def _inside(folder: Path) -> list[Path]:
    """The entries of a folder that are no links."""
    return sorted(p for p in folder.iterdir() if not p.is_symlink())


def _asides_of(run: Path) -> Iterator[Path]:
    """What lies aside in a run: folders of stages and artefacts, and files that never got their name."""
    for place, folders, names in os.walk(run):
        here = Path(place)
        in_artefacts = here.name == "artefacts" and here.parent == run
        for name in list(folders):
            aside = _ASIDE_ARTEFACT if in_artefacts else _ASIDE_FOLDER
            if aside.fullmatch(name) and not (here / name).is_symlink():
                folders.remove(name)
                yield here / name
        if here.name not in ("code", "plots"):
            yield from (here / name for name in names if _ASIDE_FILE.fullmatch(name) and not (here / name).is_symlink())


def _empty_group(path: Path) -> Item | None:
    """The files of a group none of whose runs is there any more, unless a process is at it."""
    try:
        members = [m["run"] for m in runs.read_json(path)["members"]]
    except (MissingError, KeyError, TypeError):
        return None
    there = any(run is not None and (path.parent.parent / str(run)).exists() for run in members)
    if there or path.is_symlink() or _is_held(path.with_suffix(".lock")) or time.time() - path.stat().st_mtime < HOUR:
        return None
    files = [p for p in (path, *(path.with_suffix(s) for s in (".yaml", ".lock", ".code"))) if p.exists()]
    return Item("group", path, "none of its runs is there any more", files)
