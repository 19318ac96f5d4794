"""Checks of `kdctl doctor` on what lies around the libraries: threads, clock, cache, and what kdctl itself requires."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterable
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import kdctl
from kdctl import runs

Check = dict[str, Any]
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_PINNING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
_ROOM_BYTES = 2 * 2**30
_DAY_S = 86_400


def check(name: str, status: str, detail: str, fix: str | None = None) -> Check:
    """status: ok, warn (works, could be better), fail (kdctl needs it), absent and broken (optional)."""
    return {"name": name, "status": status, "detail": detail, "fix": fix}


def threads(cores: float) -> Check:
    """What the environment says of threads, against the cores that this process may use."""
    given = {name: os.environ[name] for name in _COUNTS if os.environ.get(name)}
    detail = ", ".join(f"{name}={value}" for name, value in given.items())
    for name, value in given.items():
        first = value.split(",")[0].strip()
        if not first.isdecimal() or int(first) == 0:
            return check("threads", "warn", f"{name}='{value}' is no number of threads", f"unset {name}")
        if int(first) > max(1, int(cores)):
            fix = f"export {name}={max(1, int(cores))}, or unset it: training measures what is fastest"
            return check(
                "threads", "warn", f"{detail}, more than the {cores:g} cores: threads wait for each other", fix
            )
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "active":
        detail = "OMP_WAIT_POLICY=active: threads that wait use a core up"
        return check("threads", "warn", detail, "unset OMP_WAIT_POLICY")
    pinned = [name for name in _PINNING if os.environ.get(name, "").lower() not in ("", "false", "disabled", "none")]
    if pinned:
        detail = f"{', '.join(pinned)} ties threads to cores: two runs, or loading processes, then share them"
        return check("threads", "warn", detail, f"unset {' '.join(pinned)}")
    return check("threads", "ok", detail or "the environment sets none: training measures what is fastest")


def clock() -> Check:
    """Whether the clock can be right: runs are ordered by it, and stores remember when they were made."""
    now = time.time()
    installed = Path(kdctl.__file__).stat().st_mtime
    created = [datetime.fromisoformat(str(run.info["created"])).timestamp() for run in runs.all_runs()[-1:]]
    detail = datetime.fromtimestamp(now).astimezone().isoformat(" ", "minutes")
    for what, moment in [("kdctl was installed", installed), *(("the newest run was made", m) for m in created)]:
        if now < moment - _DAY_S:
            later = datetime.fromtimestamp(moment).astimezone().isoformat(" ", "minutes")
            fix = "set the clock (timedatectl set-ntp true): the order of runs hangs on it"
            return check("clock", "warn", f"{detail}, before {what} ({later})", fix)
    return check("clock", "ok", detail)


def cache() -> Check:
    """Where stores and other things that can be made again go: room there, and whether it can be written."""
    home = runs.cache_home()
    there = next(place for place in (home, *home.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    detail = f"{home}, {free / 2**30:.1f} GiB free"
    elsewhere = "export KDCTL_CACHE=... names another place"
    if not there.is_dir() or not os.access(there, os.W_OK):
        return check("cache", "warn", f"{home} cannot be written: nothing measured is remembered", elsewhere)
    if free < _ROOM_BYTES:
        return check("cache", "warn", detail, f"stores of teacher outputs grow there: make room, or {elsewhere}")
    return check("cache", "ok", detail)


def requirements() -> Check:
    """Whether what kdctl requires is installed in versions that it takes: another package may have replaced some."""
    try:
        listed = metadata.requires("kdctl") or []
    except metadata.PackageNotFoundError:
        return check("requirements", "ok", "not known: kdctl runs from its source")
    wrong = list(_unmet(text for text in listed if ";" not in text))
    if not wrong:
        return check("requirements", "ok", "every package that kdctl requires is there, and new enough")
    detail = ", ".join(
        f"{name} {has or 'is missing'}{', needed: >=' if has else ' >='}{least}" for name, has, least in wrong
    )
    fix = "pip install " + " ".join(f"'{name}>={least}'" for name, _, least in wrong)
    return check("requirements", "warn", detail, fix)


def _unmet(listed: Iterable[str]) -> Iterable[tuple[str, str | None, str]]:
    """(name, installed version, least version) of each `name>=version` that does not hold."""
    for text in listed:
        found = re.match(r"([\w.-]+)\s*\(?>=\s*([\d.]+)", text)
        if found is None:
            continue
        try:
            has = metadata.version(found[1])
        except metadata.PackageNotFoundError:
            yield found[1], None, found[2]
            continue
        if _numbers(has) < _numbers(found[2]):
            yield found[1], has, found[2]


def _numbers(version: str) -> list[int]:
    """The release of a version: 2.13.0+cpu -> [2, 13]; trailing zeros say nothing."""
    release = [int(n) for n in re.match(r"[\d.]*", version)[0].strip(".").split(".") if n]  # type: ignore[index]
    while release and release[-1] == 0:
        release.pop()
    return release
