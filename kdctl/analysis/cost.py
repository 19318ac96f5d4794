"""What a run's student and teacher cost to serve, what the student cost to make, and after how many images that is won
back."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kdctl import runs
from kdctl.analysis.teachers import saved_teachers
from kdctl.bench import cost
from kdctl.bench.latency import Cell, Row, measure, processor
from kdctl.config.schema import Experiment
from kdctl.data.prepare import Data
from kdctl.errors import MissingError
from kdctl.models.record import load_model
from kdctl.runs import Run

BATCHES = (1, 32)
THREADS = 1
OPENER = "kdctl.evaluate:open_torch"
_ALIKE = 0.05
"""The part of the teacher's time below which a difference is noise of measuring."""


def measure_cost(
    run: Run,
    experiment: Experiment,
    data: Callable[[], Data],
    say: Callable[[str], None] = print,
    timed: bool = True,
    seconds: float = 1.5,
) -> dict[str, Any]:
    """The document of analysis/cost.json.

    timed: whether latencies are measured, in PyTorch in fp32, each cell in a fresh process; seconds: for each cell. The
    latency of several teachers is the sum of theirs, for all are asked. Where the teacher is not there, `say` is told.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            teachers = saved_teachers(run, experiment, Path(folder), data)
        except MissingError as error:
            say(f"what the teacher costs is not measured: {error}")
            teachers = []
        stems = {"student": [(run / "student").resolve()], "teacher": [teacher.stem for teacher in teachers]}
        rows = _time(stems, seconds) if timed else {}
        models = {who: describe_models(own, rows.get(who, [])) if own else None for who, own in stems.items()}
    training = describe_training(run, experiment)
    return {
        "processor": processor(),
        "threads": THREADS,
        "models": models,
        "training": training,
        "break_even": break_even(models, training, taught=bool(experiment.student_stage.teachers)),
    }


def known_costs(stem: Path) -> dict[str, int]:
    """`bytes` of the weights, `parameters`, and `macs` of one image, of a saved model."""
    model = load_model(stem)
    return {
        "bytes": cost.file_bytes(stem.with_name(stem.name + ".safetensors")),
        "parameters": cost.parameters(model.net),
        "macs": cost.macs(model),
    }


def describe_models(stems: Sequence[Path], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Kind, costs and timings of one model, or of several that are asked together: the sums of theirs."""
    costs = [known_costs(stem) for stem in stems]
    kind = " + ".join(load_model(stem).record.kind for stem in stems)
    return {"kind": kind} | {name: sum(own[name] for own in costs) for name in costs[0]} | {"rows": rows}


def _time(stems: dict[str, list[Path]], seconds: float) -> dict[str, list[dict[str, Any]]]:
    """Of student and teacher a row a batch size."""
    named = [(who, stem) for who, own in stems.items() for stem in own]
    cells = [Cell(who, OPENER, {"path": str(stem)}, batch, THREADS) for who, stem in named for batch in BATCHES]
    measured = measure(cells, seconds=seconds)
    return {
        who: [added([row for row in measured if (row.what, row.batch) == (who, batch)]) for batch in BATCHES]
        for who, own in stems.items()
        if own
    }


def added(rows: Sequence[Row]) -> dict[str, Any]:
    """One row for models that are asked one after the other: times add up, memory is that of the largest."""
    first = rows[0].as_dict()
    if len(rows) == 1:
        return first
    times = {name: sum(getattr(row, name) for row in rows) for name in ("p50_ms", "p95_ms", "cpu_ms")}
    speed, peak = 1000 * rows[0].batch / times["p50_ms"], max(row.peak_bytes for row in rows)
    return first | times | {"samples_per_second": speed, "peak_bytes": peak, "calls": min(row.calls for row in rows)}


def describe_training(run: Run, experiment: Experiment) -> dict[str, Any]:
    """What the run's training took.

    student_seconds, teacher_seconds: of the stages of each (assistants count as teachers; 0 for a teacher that was
    given). asking_seconds: the part of the student's in which the teacher was asked. peak_bytes: the most of any stage;
    energy_joules: of all stages, None unless each of them was measured.
    """
    seconds = run.info.get("seconds", {})
    stages = [stage for stage in experiment.train_stages if stage.role != "compressed"]
    students = {stage.name for stage in stages if stage.role == "student"}
    asked = [line.get("times", {}).get("teacher", 0.0) for line in run.metrics() if line["stage"] in students]
    made = [runs.read_json(path) for s in stages if (path := run.stage_dir(s.name) / "result.json").is_file()]
    peaks = [result["peak_bytes"] for result in made if result.get("peak_bytes") is not None]
    joules = [result.get("energy_joules") for result in made if result.get("epochs", 0) > 0]
    sources = dict.fromkeys(result["energy_source"] for result in made if result.get("energy_source"))
    return {
        "student_seconds": sum(value for name, value in seconds.items() if name in students),
        "teacher_seconds": sum(seconds.get(stage.name, 0.0) for stage in stages if stage.name not in students),
        "asking_seconds": sum(asked),
        "peak_bytes": max(peaks, default=None),
        "energy_joules": sum(joules) if joules and None not in joules else None,
        "energy_source": "; ".join(sources) or "not measured",
    }


def break_even(
    models: dict[str, dict[str, Any] | None], training: dict[str, Any], taught: bool = False
) -> dict[str, Any]:
    """After how many single images the seconds of training are won back by asking the student instead of the teacher.

    The teacher's training counts where it was trained here.
    By the least processor time of a call, which other programs disturb least: `inferences`, `saved_ms` (None where they
    cannot be told), and `text`, which says it in one sentence. Times that differ by less than two measurements of one
    net may are called equal. taught: whether there was a teacher, be it that it is not there to be measured.
    """
    single = {}
    for who, model in models.items():
        row = next((row for row in (model or {}).get("rows", []) if row["batch"] == 1), None)
        single[who] = None if row is None else float(row["cpu_ms"])
    student, teacher = single.get("student"), single.get("teacher")
    if models.get("teacher") is None:
        text = "the teacher could not be measured"
        if not taught:
            text = "there is no teacher that the student could stand in for"
        return {"inferences": None, "saved_ms": None, "text": text}
    if student is None or teacher is None:
        return {"inferences": None, "saved_ms": None, "text": "latencies were not measured"}
    times = f"{student:.3g} ms of processor time an image, the teacher {teacher:.3g} ms"
    saved = teacher - student
    if abs(saved) < _ALIKE * teacher:
        text = f"student and teacher are about equally fast ({times}): whether serving it wins back its training "
        return {"inferences": None, "saved_ms": saved, "text": text + "cannot be told"}
    if saved <= 0:
        text = f"the student is not faster than the teacher ({times}): serving it never wins back its training"
        return {"inferences": None, "saved_ms": saved, "text": text}
    taught = training["teacher_seconds"]
    spent = training["student_seconds"] + taught
    inferences = math.ceil(1000 * spent / saved)
    whose = f" ({taught:,.1f} s of them the teacher's)" if taught else ""
    text = f"the {spent:,.1f} s of training{whose} are won back after {inferences:,} images: the student takes {times}"
    return {"inferences": inferences, "saved_ms": saved, "text": text}
