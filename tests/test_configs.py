"""Every file under configs/: valid, runs for two steps, and begins by saying its command and what to expect."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from kdctl.cli import app
from kdctl.config.expand import load_experiment
from kdctl.smoke import smoke
from kdctl.watch import Reporter

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
NAMES = [path.relative_to(ROOT).as_posix() for path in CONFIGS]
TWINS = {path: path.parent / "small" / path.name for path in CONFIGS if (path.parent / "small" / path.name).is_file()}
"""Configs of full size that have a small twin: it runs in their place, they themselves with -m slow."""
LONG = {ROOT / "configs/compression" / name for name in ("pipeline.yaml", "int8.yaml")} | {
    ROOT / "configs/text" / f"{name}.yaml" for name in ("tinybert", "distilbert", "pkd", "minilmv2", "mobilebert")
}
"""Configs whose two steps take long; prune_recover.yaml and the commands of docs/compression.md go the same ways, and
tests/training/test_training_recipes.py runs those of texts with narrow models."""
RUN = [
    pytest.param(path, id=name, marks=[pytest.mark.slow] if path in {*TWINS, *LONG} else [])
    for path, name in zip(CONFIGS, NAMES, strict=True)
]


def heading(path: Path) -> list[str]:
    """The comment lines that a file begins with, without their `#`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return [line[1:].removeprefix(" ") for line in lines[:end]]


def commands(path: Path) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in heading(path) if line.lstrip().startswith("kdctl ")]


def test_there_are_configs() -> None:
    assert "configs/quickstart.yaml" in NAMES and len(NAMES) > 5


@pytest.mark.parametrize("path", RUN)
def test_loads_and_runs_two_steps(path: Path) -> None:
    small = ["data.batch_size=8", "train.threads=1"]  # as many steps, less arithmetic
    if path.stem in ("factor_transfer", "fsp"):  # the features of a teacher with fresh weights are astronomical
        small.append("train.clip_norm=0.01")
    experiment = load_experiment(path, small, require_files=False).experiment
    document = smoke(experiment, Reporter())
    assert document["status"] == "smoke" and document["stages"] == [stage.name for stage in experiment.stages]


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_begins_with_its_command(path: Path) -> None:
    own = 0
    for verb, *words in commands(path):
        known = typer.main.get_command(app.app).get_command(None, verb)  # type: ignore[attr-defined]
        assert known is not None, verb
        known.make_context(verb, list(words))
        for name in [word for word in words if word.endswith(".yaml")]:
            # A template is used from the repository (configs/...), or as the file that `kdctl init` writes.
            assert path in (ROOT / name, path.parent / name), f"{name} is not this file"
            own += 1
        overrides = [word for word in words if re.match(r"[a-z_.]+=", word)]
        load_experiment(path, overrides, require_files=False)
    assert own, "no command names the file"


@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_says_what_it_is_and_what_to_expect(path: Path) -> None:
    first, *rest = heading(path)
    assert first.endswith(".") and len(first) > 20
    assert re.search(r"Expect .*\d", " ".join(rest)), "say `Expect` and a number"


@pytest.mark.parametrize("path", TWINS, ids=lambda path: path.stem)
def test_a_twin_is_the_same_experiment_but_small(path: Path) -> None:
    """What runs in minutes has the terms, weights, methods and stages of what it stands for."""
    large, small = (load_experiment(p, require_files=False).experiment for p in (path, TWINS[path]))
    assert large.name != small.name
    assert [stage.name for stage in large.stages] == [stage.name for stage in small.stages]
    for one, other in zip(large.train_stages, small.train_stages, strict=True):
        assert (one.method.kind, one.ensemble.kind, one.role) == (other.method.kind, other.ensemble.kind, other.role)
        assert [term.kind for term in one.losses] == [term.kind for term in other.losses]
        for term, twin in zip(one.losses, other.losses, strict=True):
            assert isinstance(term.weight, dict) or term.weight == twin.weight
            assert len(term.taps) == len(twin.taps)
        assert other.epochs < one.epochs
