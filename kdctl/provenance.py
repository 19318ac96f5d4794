"""What a run's numbers come from: the hashes of its configuration, data, teachers and student, and the command."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

from kdctl import runs
from kdctl.config.schema import Experiment
from kdctl.data.prepare import Data
from kdctl.data.tokenizer import file_of
from kdctl.errors import MissingError
from kdctl.evaluate import load_teachers
from kdctl.models.record import load_model
from kdctl.runs import Run
from kdctl.teachers.key import weights_hash

FILE = "provenance.json"
_IN_FOLDERS = ("model.safetensors", "student.safetensors")


def write_provenance(run: Run, experiment: Experiment, data: Data) -> None:
    """Writes provenance.json of a finished run.

    Hashes are SHA-256: of config.yaml, of images, labels and splits (`Data.fingerprint`), and of the names, shapes and
    values of each model's weights, which are the same whatever file they came in. Of the user's own component files,
    of which the run has copies, of weights that a student inherits from a source of its own, and of a teacher's own
    tokenizer, they are of the file. What is not there any more has none.
    """
    splits = {name: getattr(data, name) for name in ("train", "val", "test")}
    student = load_model(run / "student")
    document = {
        "command": run.info["command"],
        "config_sha256": hashlib.sha256(run.config.read_bytes()).hexdigest(),
        "data": {
            "kind": experiment.data.kind,
            "fingerprint": data.fingerprint(),
            "samples": {name: len(split) for name, split in splits.items() if split is not None},
        },
        "teachers": _teachers(run, experiment, data),
        "inherited": _inherited(experiment),
        "student": {"kind": student.record.kind, "sha256": weights_hash(student.net)},
        "code": {path.name: _file_hash(path) for path in sorted((run / "code").glob("*")) if path.is_file()},
    }
    runs.write_json(run / FILE, document)


def _inherited(experiment: Experiment) -> list[dict[str, Any]]:
    """The sources other than their teachers that the stages' students begin with weights of."""
    wishes = [stage.student.inherit for stage in experiment.train_stages if stage.student is not None]
    sources = dict.fromkeys(wish.source for wish in wishes if wish is not None and wish.source != "teacher")
    return [{"source": source, "sha256": _file_hash(_weights_file(Path(source)))} for source in sources]


def _weights_file(path: Path) -> Path:
    """The file with the weights that a run directory, an encoder's folder, or one of a model's two files names."""
    if path.is_dir():
        return next((path / name for name in _IN_FOLDERS if (path / name).is_file()), path)
    return path.with_suffix(".safetensors") if path.suffix == ".json" else path


def _file_hash(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def renew_config_hash(run: Run) -> None:
    """Takes down the hash of config.yaml anew, to which `kdctl compress` and `kdctl export` add the stages they run."""
    if (run / FILE).is_file():
        changed = {"config_sha256": hashlib.sha256(run.config.read_bytes()).hexdigest()}
        runs.write_json(run / FILE, runs.read_json(run / FILE) | changed)


def _teachers(run: Run, experiment: Experiment, data: Data) -> list[dict[str, Any]]:
    specs = experiment.student_stage.teachers
    hashes: list[str | None] = [None] * len(specs)
    if specs:
        with contextlib.suppress(MissingError):
            hashes = [weights_hash(model.net) for model in load_teachers(run, experiment, data)]
    return [
        {"kind": s.kind, "weights": s.weights or s.stage, "sha256": own}
        | ({"tokenizer_sha256": _file_hash(file_of(Path(s.tokenizer)))} if s.tokenizer else {})
        for s, own in zip(specs, hashes, strict=True)
    ]
