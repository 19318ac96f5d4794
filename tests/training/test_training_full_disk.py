"""A full disk: a clear error, and the run as it was. On a small tmpfs, which takes the right to mount one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kdctl.cli import app


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 600 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no right to mount a tmpfs here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def files_of(folder: Path) -> dict[str, bytes]:
    names = (p for p in folder.rglob("*") if p.is_file() and p.name not in ("log.txt", "run.lock"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in names}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--quantize", "int8"],
        pytest.param(["--low-rank", "0.5"], marks=pytest.mark.slow),
        pytest.param(["--prune", "0.3", "--finetune", "1"], marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_leaves_the_run_as_it_was(
    run_it: Callable[..., Any], small_disk: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    made, _ = run_it("train.epochs=1")
    run = small_disk / "run"
    shutil.copytree(made.path, run)
    (run / "log.txt").write_text("")
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "filler").write_bytes(b"x" * (free - 16_384))  # enough to begin, too little to end
    before = files_of(run)
    code = app.run(["compress", str(run), *arguments])
    assert code == 1
    said = capsys.readouterr().err
    assert "No space left on device" in said and "Traceback" not in said
    assert files_of(run) == before
