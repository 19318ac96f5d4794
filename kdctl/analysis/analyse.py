"""Looks closer at a finished run: layers beside the teacher's, corrupted images, costs. Files go to its `analysis/`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdctl import build, runs
from kdctl.analysis.cka import layer_similarity
from kdctl.analysis.cost import measure_cost
from kdctl.analysis.robustness import measure_robustness
from kdctl.analysis.samples import some_of
from kdctl.config.schema import Experiment
from kdctl.data.prepare import Data
from kdctl.errors import ConfigError, MissingError
from kdctl.evaluate import load_student, load_teachers
from kdctl.models.record import Model
from kdctl.runs import Run

FOLDER = "analysis"


def analyse(
    run: Run,
    experiment: Experiment,
    data: Data | None = None,
    say: Callable[[str], None] = print,
    timed: bool = True,
) -> dict[str, Path]:
    """Writes analysis/cka.json, robustness.json and cost.json of a finished run; gives by name those that are there.

    One that is newer than the student is left as it is. data: the experiment's own when left out. timed: whether
    latencies are measured. A run without a teacher has no cka.json. What needs data or a teacher that are not there is
    left out, and `say` is told. Raises MissingError where the run has no finished student.
    """
    weights = run / "student.safetensors"
    if not weights.is_file():
        raise MissingError(f"{run} has no finished student yet", hint=f"`kdctl resume {run}` continues it")
    found, taught = _Found(run, experiment, data), bool(experiment.student_stage.teachers)
    makers: dict[str, Callable[[], dict[str, Any] | None]] = {
        "cka": lambda: _cka(found, say),
        "robustness": lambda: _robustness(found, say),
        "cost": lambda: measure_cost(run, experiment, found.data, say, timed),
    }
    written = {}
    for name, make in makers.items():
        path = run / FOLDER / f"{name}.json"
        if not _is_fresh(path, weights, name == "cost" and timed, name == "cost" and taught):
            say(f"analysing {run}: {name}")
            try:
                document = make()
            except MissingError as error:
                say(f"{name} was left out: {error}")
                document = None
            if document is not None:
                runs.write_json(path, document)
        if path.is_file():
            written[name] = path
    return written


def _is_fresh(path: Path, weights: Path, timed: bool, taught: bool) -> bool:
    """Whether a file is newer than the student and, where that is asked, holds latencies, and the teacher's costs."""
    if not path.is_file() or path.stat().st_mtime_ns < weights.stat().st_mtime_ns:
        return False
    try:
        document = runs.read_json(path)
        models = document["models"] if timed or taught else {}
        return (not timed or bool(models["student"]["rows"])) and (not taught or models["teacher"] is not None)
    except (MissingError, KeyError, TypeError):  # damaged
        return False


class _Found:
    """The data and models of a run, each loaded once and only when it is asked for."""

    def __init__(self, run: Run, experiment: Experiment, data: Data | None) -> None:
        self.run, self.experiment = run, experiment
        self._data = data
        self._teachers: list[Model] | None = None

    def data(self) -> Data:
        if self._data is None:
            self._data = build.build_data(self.experiment)
        return self._data

    def teachers(self) -> list[Model]:
        if self._teachers is None:
            self._teachers = load_teachers(self.run, self.experiment, self.data())
        return self._teachers

    def student(self) -> Model:
        return load_student(self.run, self.experiment)


def _cka(found: _Found, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The first teacher is the one that is compared."""
    if not found.experiment.student_stage.teachers:
        return None
    split = found.data().measured
    teachers = found.teachers()
    if len(teachers) > 1:
        say("cka: of several teachers the first is compared")
    try:
        mine, other, matrix, count = layer_similarity(found.student(), teachers[0], some_of(found.data().split(split)))
    except ConfigError as error:
        raise MissingError(str(error)) from None
    return {"split": split, "samples": count, "student_layers": mine, "teacher_layers": other, "cka": matrix}


def _robustness(found: _Found, say: Callable[[str], None]) -> dict[str, Any]:
    split, task = found.data().measured, build.build_task(found.experiment)
    if found.data().tokens is not None:
        raise MissingError("its corruptions are of images, and the data are texts")
    samples = some_of(found.data().split(split))
    teachers: list[Model] = []
    try:
        teachers = found.teachers()
    except MissingError as error:
        say(f"robustness of the teacher was left out: {error}")
    size = found.experiment.data.eval_batch_size
    rows = measure_robustness(found.student(), teachers, samples, task, size)
    return {"split": split, "samples": len(samples), "rows": rows}
