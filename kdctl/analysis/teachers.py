"""The teachers of a run as models on disk, which a measuring process can open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kdctl import build
from kdctl.config.schema import Experiment, TeacherSpec
from kdctl.data.prepare import Data
from kdctl.errors import MissingError
from kdctl.models.record import save_model
from kdctl.runs import Run, holds_model


@dataclass(frozen=True)
class SavedTeacher:
    """A teacher on disk. stem: of its weights and record. named: where its weights came from, as text."""

    stem: Path
    named: str


def saved_teachers(run: Run, experiment: Experiment, folder: Path, data: Callable[[], Data]) -> list[SavedTeacher]:
    """The teachers of the stage that made the shipped student, none where it had none.

    One whose weights are not a model of this package is built and saved in `folder`; only then are the data asked for.
    Raises MissingError where a teacher or the data are not there.
    """
    stage = experiment.student_stage
    found = [_on_disk(run, spec) for spec in stage.teachers]
    if None not in found:
        return [teacher for teacher in found if teacher is not None]
    models = build.build_teachers(stage, data(), experiment.train.seed, lambda name: run.stage_dir(name) / "model")
    saved = []
    for number, (known, spec, model) in enumerate(zip(found, stage.teachers, models, strict=True)):
        if known is None:
            save_model(model, folder / f"teacher{number}")
            known = SavedTeacher(folder / f"teacher{number}", str(spec.weights or spec.kind))
        saved.append(known)
    return saved


def _on_disk(run: Run, spec: TeacherSpec) -> SavedTeacher | None:
    """The teacher where it is a model on disk as it is; None where it has to be built first."""
    if spec.classes is not None:
        return None
    if spec.stage is not None:
        path = run.stage_dir(spec.stage) / "model"
    elif spec.weights and holds_model(spec.weights):
        path = Path(spec.weights)
        path = path / "student" if path.is_dir() else path.with_suffix("")
    else:
        return None
    if not path.with_name(path.name + ".safetensors").is_file():
        raise MissingError(f"there is no teacher at {path}", hint="is the run whole? `kdctl resume` continues it")
    return SavedTeacher(path.resolve(), str(path))
