"""Malformed files, generated: each ends in exit 3 or 4 with a message and, where there is one, file and line.

No traceback, nothing left behind, and never long to wait for.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from kdctl.config.expand import load_experiment
from kdctl.errors import ConfigError, MissingError

GOOD = """\
name: good
task: {kind: classification}
data:
  kind: digits
  batch_size: 64
  val_fraction: 0.1
  augment:
    - {kind: random_crop, padding: 1}
  views: fresh
student:
  kind: digits_cnn
  width: 4
teacher:
  kind: digits_cnn
  width: 32
  train:
    epochs: 3
losses:
  - {kind: ce, weight: 0.1}
  - {kind: kd, weight: 0.9, temperature: 4.0}
optimizer:
  kind: sgd
  lr: 0.05
  momentum: 0.9
schedule:
  kind: cosine
  warmup_epochs: 1
train:
  epochs: 4
  seed: 0
  precision: fp32
compress:
  - {kind: quantize, dtype: int8}
export:
  - {kind: onnx}
"""
LINES = GOOD.splitlines()


def with_line(number: int, text: str) -> str:
    return "\n".join([*LINES[: number - 1], text, *LINES[number:]]) + "\n"


def line_of(start: str, after: int = 0) -> int:
    return next(i for i, line in enumerate(LINES, 1) if i > after and line.strip().startswith(start))


def misspelt() -> dict[str, tuple[str, int]]:
    """One letter of each key doubled or dropped."""
    draw, cases = random.Random(0), {}
    for number, line in enumerate(LINES, 1):
        key = line.split(":")[0].strip(" -")
        if line.strip().startswith("- {"):
            key = line.split(",")[1].split(":")[0].strip() if "," in line else "kind"
        at = draw.randrange(1, len(key))
        wrong = key[:at] + key[at] + key[at:] if draw.random() < 0.5 else key[:at] + key[at + 1 :] + "x"
        cases[f"misspelt {number} {wrong}"] = (with_line(number, line.replace(f"{key}:", f"{wrong}:", 1)), number)
    return cases


def wrong_types() -> dict[str, tuple[str, int]]:
    """A value of another type for each scalar."""
    cases = {}
    for number, line in enumerate(LINES, 1):
        key, _, value = line.partition(": ")
        if line.strip().startswith("-") or not value or value.startswith("{"):
            continue
        for wrong in ("[1, 2]", "{a: 1}", "-1e400" if number % 2 else "9" * 4000, ".nan"):
            cases[f"type {number} {key.strip()} {wrong[:9]}"] = (with_line(number, f"{key}: {wrong}"), number)
    return cases


def duplicates() -> dict[str, tuple[str, int]]:
    cases = {}
    for number, line in enumerate(LINES, 1):
        if ": " in line and not line.strip().startswith("-") and "{" not in line:
            text = "\n".join([*LINES[:number], line, *LINES[number:]]) + "\n"
            cases[f"duplicate {number}"] = (text, number + 1)
    return cases


def tabs_and_noise() -> dict[str, tuple[str | bytes, int | None]]:
    draw = random.Random(1)
    bomb = "\n".join([f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(12)])
    cases: dict[str, tuple[str | bytes, int | None]] = {
        "empty": ("", None),
        "spaces": ("  \n \n", None),
        "comment": ("# nothing\n", None),
        "list": ("- a\n", 1),
        "number": ("3\n", 1),
        "recursive map": (GOOD + "x: &x {y: *x}\n", len(LINES) + 1),
        "recursive list": (GOOD + "x: &x\n  - *x\n", len(LINES) + 2),
        "alias bomb": (GOOD + bomb, None),
        "quoted number": (with_line(line_of("lr"), "  lr: '0.05'"), line_of("lr")),
        "yes for true": (with_line(line_of("momentum"), "  nesterov: yes"), line_of("momentum")),
        "deep": ("a: " + "[" * 100_000, 1),
        "deep braces": ("{a: " * 100_000, 1),
        "deep indentation": ("\n".join(" " * i + "a:" for i in range(2000)), None),
        "long line": ("a: [" + ", ".join(["1"] * 100_000) + "]", 1),
        "many keys": ("\n".join(f"k{i}: 1" for i in range(15_000)), None),
        "many unknown arguments": (
            GOOD.replace("width: 4", "".join(f"w{i}: 1\n  " for i in range(5000)) + "w: 1"),
            None,
        ),
        "many wrong losses": (GOOD + "method: {kind: distill, x: [" + "a, " * 5000 + "]}\n", len(LINES) + 1),
        "long key": (GOOD + "k" * 100_000 + ": 1\n", len(LINES) + 1),
        "extends nothing": (GOOD + "extends: nothing.yaml\n", len(LINES) + 1),
        "extends itself": (GOOD + "extends: exp.yaml\n", len(LINES) + 1),
        "extends a nul": (GOOD + 'extends: "a\\0b"\n', len(LINES) + 1),
        "python tag": (GOOD + "x: !!python/object/apply:os.system ['touch pwned']\n", len(LINES) + 1),
        "missing weights": (GOOD.replace("  train:\n    epochs: 3", "  weights: none.pth"), 16),
        "weights with a nul": (GOOD.replace("  train:\n    epochs: 3", '  weights: "a\\0b"'), 16),
        "weights too long": (GOOD.replace("  train:\n    epochs: 3", f"  weights: {'w' * 5000}"), 16),
        "unknown home": (GOOD.replace("  train:\n    epochs: 3", "  weights: ~nobody_here/x.pth"), 16),
        "missing data": (GOOD.replace("kind: digits\n", "kind: cifar10\n"), None),
        "missing own file": (with_line(line_of("kind: cosine"), "  kind: ./none.py:X"), line_of("kind: cosine")),
        "long own file": (with_line(line_of("kind: cosine"), f"  kind: ./{'n' * 5000}.py:X"), line_of("kind: cosine")),
        "kind with a nul": (with_line(line_of("kind: cosine"), '  kind: "a\\0.py:X"'), line_of("kind: cosine")),
        "odd kinds": (with_line(line_of("kind: cosine"), "  kind: '..:X'"), line_of("kind: cosine")),
        "odder kinds": (with_line(line_of("kind: cosine"), "  kind: ':'"), line_of("kind: cosine")),
        "utf-16": (GOOD.encode("utf-16"), 1),
        "latin-1": (GOOD.replace("name: good", "name: gööd").encode("latin-1"), 1),
        "surrogate": (GOOD.encode() + b"x: \xed\xa0\x80\n", len(LINES) + 1),
        "escaped surrogate": (GOOD + 'x: "\\ud800"\n', None),
    }
    for number in draw.sample([i for i, line in enumerate(LINES, 1) if line.startswith("  ")], 8):
        cases[f"tab {number}"] = (with_line(number, "\t" + LINES[number - 1].strip()), None)
    for index in range(8):
        cases[f"binary {index}"] = (draw.randbytes(200 * (index + 1)), None)
        raw = bytearray(GOOD.encode())
        raw[draw.randrange(len(raw))] = draw.choice([0, 7, 0x80, 0xFF])
        cases[f"flipped byte {index}"] = (bytes(raw), None)
    return cases


CASES: dict[str, tuple[str | bytes, int | None]] = {**misspelt(), **wrong_types(), **duplicates(), **tabs_and_noise()}


def test_the_file_that_they_are_made_from_is_good(write):
    load_experiment(write(GOOD))


def test_there_are_more_than_a_hundred():
    assert len(CASES) > 150


@pytest.mark.parametrize("name", CASES)
def test_a_malformed_file(write, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    text, line = CASES[name]
    path = write(text)
    with pytest.raises((ConfigError, MissingError)) as caught:
        load_experiment(path)
    error = caught.value
    assert error.code in (3, 4) and len(str(error)) < 120_000
    for problem in error.problems:
        assert problem.message and problem.file == str(path)
    if line is not None:
        assert line in [problem.line for problem in error.problems], error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exp.yaml"]


@pytest.mark.parametrize("seed", range(100))
def test_a_file_with_lines_lost_doubled_or_mixed_up(write, seed):
    draw = random.Random(seed)
    lines = list(LINES)
    for _ in range(draw.randrange(1, 4)):
        at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
        action = draw.choice(["drop", "double", "swap", "indent", "cut"])
        if action == "drop":
            del lines[at]
        elif action == "double":
            lines.insert(at, lines[at])
        elif action == "swap":
            lines[at], lines[other] = lines[other], lines[at]
        elif action == "indent":
            lines[at] = " " + lines[at]
        else:
            lines[at] = lines[at][: draw.randrange(len(lines[at]) + 1)]
    path = write("\n".join(lines) + "\n")
    try:
        load_experiment(path)
    except (ConfigError, MissingError) as error:
        assert all(problem.file == str(path) and problem.line is not None for problem in error.problems)


def test_missing_file(tmp_path):
    with pytest.raises(MissingError):
        load_experiment(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["misspelt 1 nname", "binary 0", "recursive map", "missing weights", "empty", "deep"])
def test_the_command_line_says_it_without_a_traceback(write, tmp_path, name):
    key = name if name in CASES else next(k for k in CASES if k.startswith("misspelt 1 "))
    path = write(CASES[key][0])
    command = [sys.executable, "-m", "kdctl", "check", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == (4 if name == "missing weights" else 3), done.stderr
    assert "Traceback" not in done.stderr and "exp.yaml" in done.stderr and done.stdout == ""
    assert [p.name for p in Path(tmp_path).iterdir()] == ["exp.yaml"]
