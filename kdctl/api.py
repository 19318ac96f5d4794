"""The verbs as functions, for notebooks and programs, on the same files and run directories as the command line.

    from kdctl import api

    run = api.train("digits.yaml", "optimizer.lr=0.005")["run"]
    api.evaluate(run)["metrics"]
    api.compress(run, {"kind": "quantize", "dtype": "int8"})[-1]["after"]
    student = api.load_student(run)         # a torch.nn.Module: images in [0, 1] or token numbers in, logits out

What is wrong with a file, an override or a run raises a KdctlError, whose text is what the command line prints. No
progress is shown unless `progress=True`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdctl import experiment, extension, runs
from kdctl.cli.progress import TextReporter
from kdctl.config.expand import load_experiment
from kdctl.config.overrides import locating
from kdctl.config.recipe import recipe_of_options, with_stages
from kdctl.control import BASELINE, parse_controls
from kdctl.errors import UsageError
from kdctl.evaluate import evaluate_run
from kdctl.models.record import Model, load_model

__all__ = ["compress", "evaluate", "load_student", "resume", "train"]
LATEST = "latest"


def train(
    config: str | Path,
    *overrides: str,
    seeds: int = 1,
    baseline: bool = False,
    controls: Sequence[str] = (),
    run_dir: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Runs every stage of an experiment file; the document of `kdctl train --json`, of a run or of a group.

    overrides: as on the command line, `train.epochs=5`. seeds: repeat with this many. baseline, controls: also train
    the student without a teacher, and the controls that `kdctl train --help` names. run_dir: where a single run is
    written. Raises ConfigError or MissingError before anything is written. A gate that an artefact misses is no error
    here: its document has it under `gates`.
    """
    loaded = load_experiment(Path(config), overrides)
    if run_dir is not None and (seeds > 1 or baseline or controls):
        raise UsageError("run_dir names one run, and a group has several", hint="leave run_dir out")
    asked = parse_controls(",".join([BASELINE, *controls])) if baseline or controls else []
    source = Path(config).read_text(encoding="utf-8")
    plan = experiment.Plan(loaded.experiment, source, seeds, asked, Path(run_dir) if run_dir else None)
    with locating(loaded.document):
        return experiment.train(plan, TextReporter(not progress))


def resume(run: str | Path = LATEST, *overrides: str, progress: bool = False) -> dict[str, Any]:
    """Finishes an interrupted run, or the group that it belongs to; the document of `train`."""
    return experiment.resume(runs.find(str(run)), TextReporter(not progress), overrides)


def evaluate(run: str | Path = LATEST, *overrides: str, split: str = "test", device: str = "cpu") -> dict[str, Any]:
    """Measures a run's student, re-loaded from disk, and its teacher; the document of `kdctl eval --json`.

    overrides: such as `data.root=FOLDER`, where the data lie elsewhere now.
    """
    found = runs.find(str(run))
    loaded = load_experiment(found.config, overrides, require_files=False).experiment
    return evaluate_run(found, loaded, split=split, device=device) | {"run": str(found)}


def compress(
    run: str | Path = LATEST, *stages: Mapping[str, Any], overrides: Sequence[str] = (), progress: bool = False
) -> list[dict[str, Any]]:
    """Runs stages of compression and export on a run, each as in a file: `{"kind": "quantize", "dtype": "int8"}`,
    `{"kind": "export", "target": "onnx"}`. What each artefact measures, re-loaded and in its own runtime, in order.
    """
    if not stages:
        raise UsageError("no stage is named", hint='such as {"kind": "quantize", "dtype": "int8"}')
    found = runs.find(str(run))
    more = with_stages(found.config, overrides, recipe_of_options([dict(stage) for stage in stages]))
    return extension.extend(found, more, TextReporter(not progress))


def load_student(run: str | Path = LATEST) -> Model:
    """The student that a run ships, or the model of a stem or .safetensors file, in eval mode."""
    path = Path(run)
    return load_model(path if path.suffix or path.is_dir() else runs.find(str(run)).path)
