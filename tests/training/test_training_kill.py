"""Kill -9 at random moments of a real `kdctl train`, from its first second on; `kdctl resume` ends where it would."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdctl import runs

FILE = """
name: killed
data: {kind: digits, labels_per_class: 10, augment: [{kind: random_crop, padding: 1}]}
teacher: {kind: digits_cnn, width: 16, train: {epochs: 12, data: {labels_per_class: all}}}
student: {kind: digits_cnn, width: 8}
distill: {T: 4, alpha: 0.9}
optimizer: {kind: adamw, lr: 0.01}
train: {epochs: 20, device: cpu, threads: 1}
"""
MOMENTS = 20


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "kdctl", *arguments],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(folder: Path) -> None:
    """Resumes the run in `run`, or starts it where it had not yet come to be."""
    arguments = ["resume", "run"] if (folder / "run").exists() else ["train", "killed.yaml", "--run-dir", "run"]
    assert start(folder, *arguments).wait(300) == 0


def outcome(folder: Path) -> tuple[bytes, bytes, list[object]]:
    run = runs.Run(folder / "run")
    volatile = ("seconds", "eval_seconds", "times", "samples_per_second")
    lines: list[object] = [{k: v for k, v in line.items() if k not in volatile} for line in run.metrics()]
    return (run / "student.safetensors").read_bytes(), (run / "teacher.safetensors").read_bytes(), lines


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    draw = random.Random(seed)
    print(f"seed {seed}")
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    (undisturbed / "killed.yaml").write_text(FILE)
    began = time.monotonic()
    finish(undisturbed)
    duration = time.monotonic() - began
    expected = outcome(undisturbed)

    unfinished = 0
    for number in range(MOMENTS):
        folder = tmp_path / f"{number:02d}"
        folder.mkdir()
        (folder / "killed.yaml").write_text(FILE)
        moment = draw.uniform(0, duration)
        process = start(folder, "train", "killed.yaml", "--run-dir", "run")
        time.sleep(moment)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        run = runs.Run(folder / "run")
        if not run.path.exists() or run.info["status"] != "done":
            unfinished += 1
            finish(folder)
        assert outcome(folder) == expected, f"killed after {moment:.3f} s"
        print(f"killed after {moment:6.3f} s of {duration:.1f}: identical")
    assert unfinished >= MOMENTS // 2
