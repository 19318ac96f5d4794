"""The run directory: where things lie in it, how it is made, found, locked and listed. Plain files, no torch.

    runs/<name>/<NNN>/           one run; never overwritten
    runs/<name>/groups/<NNN>.json    the runs of one --seeds / --with-baseline call
    runs/latest                  a text file that names the newest main run

Every file is written aside and renamed; a directory gets its number only once it is complete enough to be resumed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, Literal

from kdctl import __version__
from kdctl.errors import KdctlError, MissingError, Problem, UsageError, did_you_mean

FORMAT = 1
ROOT = Path("runs")
RESERVED = ("latest", "groups")
"""Names under ROOT that mean something else."""
Status = Literal["running", "interrupted", "failed", "done"]


def cache_home() -> Path:
    """Where what can always be made again is kept: KDCTL_CACHE, or kdctl/ in XDG_CACHE_HOME, else in ~/.cache."""
    own = os.environ.get("KDCTL_CACHE")
    if own:
        return Path(own).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kdctl"
    except RuntimeError:  # a user without a home, as in many containers
        return Path(tempfile.gettempdir()) / f"kdctl-{getattr(os, 'getuid', int)()}"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name once it is whole and on the disk: readers see the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    with writing(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, document: Any) -> None:
    write_text(path, json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """The value with null for every number that is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """Reads a JSON file of a run. Raises MissingError where it is not there or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingError(Problem("there is no such file", file=str(path))) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise MissingError(Problem(f"the file is damaged: {error}", file=str(path))) from None


class Run:
    """One run directory, by path; everything else is read from its files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __str__(self) -> str:
        """The path as the user would type it."""
        with contextlib.suppress(ValueError):
            return str(self.path.resolve().relative_to(Path.cwd()))
        return str(self.path)

    @property
    def info(self) -> dict[str, Any]:
        """run.json: format, name, number, role, control (which it is), group, seed, parent, status, stages, created,
        command."""
        path = self / "run.json"
        info = read_json(path)
        if not isinstance(info, dict) or not {"role", "status", "created"} <= set(info):
            raise MissingError(Problem("the file is damaged: it is not the record of a run", file=str(path)))
        return info

    def update(self, **changes: Any) -> dict[str, Any]:
        """Changes fields of run.json and returns the whole."""
        info = self.info | changes
        write_json(self / "run.json", info)
        return info

    def set_stage(self, name: str, status: Status) -> None:
        self.update(stages=self.info["stages"] | {name: status})

    @property
    def config(self) -> Path:
        return self / "config.yaml"

    @property
    def artefacts(self) -> list[Path]:
        """The finished artefact directories, by name."""
        return sorted(p.parent for p in self.path.glob("artefacts/[!.]*/manifest.json"))

    def stage_dir(self, name: str) -> Path:
        return self.path / "stages" / name

    def log(self, text: str) -> None:
        """Appends a line to log.txt."""
        with open(self / "log.txt", "a", encoding="utf-8") as file:
            file.write(text.rstrip("\n") + "\n")

    def append_metrics(self, line: dict[str, Any]) -> int:
        """Appends one line to metrics.jsonl and returns the size of the file after it."""
        with open(self / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
            file.flush()
            return file.tell()

    def metrics_size(self) -> int:
        path = self / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    def cut_metrics(self, size: int) -> None:
        """Drops what was appended to metrics.jsonl after it had this size."""
        path = self / "metrics.jsonl"
        if path.exists() and path.stat().st_size > size:
            os.truncate(path, size)

    def metrics(self) -> list[dict[str, Any]]:
        path = self / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Holds the run for this process; a second process is refused."""
        return locked(self / "run.lock", str(self))


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Holds a lock file for this process; a second process is refused. The lock dies with its process."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock: there nothing is guarded
        yield
        return
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            hint = "wait for it, or stop it first"
            raise KdctlError(f"{what} is in use by another kdctl process", hint=hint) from None
        except OSError:  # a file system without locks: there nothing is guarded
            pass
        yield


# ----------------------------------------------------------------------------------------------------------- creating


def create(
    name: str,
    config: str,
    source: str,
    *,
    stages: list[str],
    seed: int,
    role: Literal["main", "control"] = "main",
    control: str | None = None,
    group: str | None = None,
    parent: str | None = None,
    run_dir: Path | None = None,
    files: dict[str, Path] | None = None,
    agents: Sequence[str] = (),
    root: Path = ROOT,
) -> Run:
    """Makes a run directory that can be resumed from the moment it has its name.

    config is the resolved experiment, source the file the user wrote, files what else it is given: name in the run ->
    file to copy (the user's own components, a teacher that another run of the group trained). agents: the torchruns
    that it is made under, which find it again when they restart their processes.
    Raises UsageError when `run_dir` exists and is not empty.
    """
    if name in RESERVED:
        raise UsageError(f"a run cannot be called '{name}'", hint="give the experiment another `name:`")
    home = run_dir.parent if run_dir else root / name
    if run_dir and run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        hint = "name another directory, or `kdctl resume` it"
        raise UsageError(f"{run_dir} is there already; a run is never overwritten", hint=hint)
    home.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=home, prefix=".new-"))
    try:
        os.chmod(aside, 0o755)
        (aside / "config.yaml").write_text(config, encoding="utf-8")
        (aside / "config.source.yaml").write_text(source, encoding="utf-8")
        for place, file in (files or {}).items():
            (aside / place).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, aside / place)
        write_json(aside / "env.json", environment())
        info: dict[str, Any] = {
            "format": FORMAT, "name": name, "number": None, "role": role, "control": control, "group": group,
            "seed": seed, "parent": parent, "status": "running", "stages": dict.fromkeys(stages, "waiting"),
            "created": datetime.now(UTC).isoformat(), "command": sys.argv, "agents": list(agents),
        }  # fmt: skip
        path = _take_name(aside, home, run_dir, info)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if role == "main":
        inside = path.resolve().is_relative_to(root.resolve())
        write_text(root / "latest", f"{path.resolve().relative_to(root.resolve()) if inside else path.resolve()}\n")
    return Run(path)


def _take_name(aside: Path, home: Path, run_dir: Path | None, info: dict[str, Any]) -> Path:
    """Renames the finished directory to its final name: `run_dir`, or the next free number under `home`."""
    while True:
        number = None if run_dir else 1 + max((int(p.name) for p in home.iterdir() if p.name.isdigit()), default=0)
        path = run_dir or home / f"{number:03d}"
        write_json(aside / "run.json", info | {"number": number})
        try:
            os.rename(aside, path)
            return path
        except OSError:
            if run_dir or not path.exists():
                raise


def environment() -> dict[str, Any]:
    """What the run was made with: versions, machine, command. Read without importing anything heavy."""
    packages = {}
    for package in ("torch", "torchvision", "numpy", "onnx", "onnxruntime", "safetensors", "timm", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[package] = metadata.version(package)
    return {
        "kdctl": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "packages": packages,
        "command": sys.argv,
        "directory": str(Path.cwd()),
        "threads_environment": os.environ.get("OMP_NUM_THREADS"),
    }


def create_group(name: str, document: dict[str, Any], root: Path = ROOT) -> Path:
    """Writes runs/<name>/groups/<NNN>.json under the next free number and returns its path."""
    home = root / name / "groups"
    home.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(p.stem) for p in home.glob("*.json") if p.stem.isdigit()), default=0)
    while True:
        path = home / f"{number:03d}.json"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            number += 1
            continue
        write_json(path, document)
        return path


# ------------------------------------------------------------------------------------------------------------ finding


def is_run(path: Path) -> bool:
    return (path / "run.json").is_file() and (path / "config.yaml").is_file()


def group_of(run: Run) -> Path:
    """The file of a run's group; no file where it has none."""
    return run.path.parent / (run.info.get("group") or "")


def check_unfinished(run: Run) -> None:
    """Raises KdctlError where neither the run nor its group has anything left to do."""
    if run.info["status"] == "done" and not group_of(run).is_file():
        raise KdctlError(f"{run} is done: there is nothing to resume", hint="`kdctl train` starts a new run")


def holds_model(weights: str) -> bool:
    """Whether weights are kdctl's own: a run directory, or a file with its record beside it."""
    path = Path(weights)
    if path.is_dir():
        return not any((path / name).is_file() for name in ("model.safetensors", "config.json"))  # a published model's
    return path.suffix in {".safetensors", ".json"} and path.with_suffix(".json").is_file()


def all_runs(root: Path = ROOT) -> list[Run]:
    """Every run under `root` whose run.json can be read, oldest first."""
    created = []
    for path in root.glob("*/[!.]*/run.json"):
        with contextlib.suppress(MissingError, KeyError, TypeError):
            created.append((str(Run(path.parent).info["created"]), path.parent))
    return [Run(path) for _, path in sorted(created)]


def find(text: str | None = None, root: Path = ROOT) -> Run:
    """The run that the user means: a directory, `<name>` or `<name>/<NNN>` under `root`, or `latest` (also None).

    Raises MissingError, naming what is there.
    """
    if text is None or text == "latest":
        return _latest(root)
    for path in (Path(text), root / text):
        if is_run(path):
            return Run(path)
        numbered = [Run(p) for p in path.glob("[0-9]*") if p.name.isdigit() and is_run(p)]
        main = [run for run in numbered if run.info["role"] == "main"]
        if main:
            return max(main, key=lambda run: int(run.path.name))
    known = [str(run) for run in all_runs(root)]
    if "artefacts" in Path(text).parts:
        known = [str(folder) for run in all_runs(root) for folder in run.artefacts]
    hint = did_you_mean(text, known) or "`kdctl list runs` shows what is there"
    raise MissingError(f"there is no run at '{text}'", hint=hint)


def _latest(root: Path) -> Run:
    try:
        named = root / (root / "latest").read_text(encoding="utf-8").strip()
    except OSError:
        named = None
    if named and is_run(named):
        return Run(named)
    main = [run for run in all_runs(root) if run.info["role"] == "main"]  # a moved tree, or a crash before `latest`
    if not main:
        hint = "`kdctl train CONFIG` makes one; `kdctl init` writes a CONFIG to start from"
        raise MissingError(f"there is no run under {root.resolve()}", hint=hint)
    return main[-1]
