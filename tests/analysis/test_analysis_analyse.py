"""The files of an analysis: what is in them, when they are made again, and what is missing where something is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from kdctl import runs
from kdctl.analysis import analyse as analysing
from kdctl.analysis import cost
from kdctl.analysis.analyse import analyse
from kdctl.analysis.teachers import saved_teachers
from kdctl.bench.latency import Row
from kdctl.build import build_data
from kdctl.config.expand import load_experiment
from kdctl.control import control
from kdctl.experiment import load_run
from kdctl.models.record import load_model
from kdctl.report.facts import RunFacts

ROW = Row("student", "torch 2", 1, 1, 2.0, 3.0, 1.5, 500.0, 1000, 10)


@pytest.fixture
def look(run: runs.Run) -> Callable[..., tuple[dict[str, Any], list[str]]]:
    """Analyses the run without timing; its documents, and what was said."""

    def go(*overrides: str, **named: Any) -> tuple[dict[str, Any], list[str]]:
        said: list[str] = []
        experiment = named.pop("experiment", None) or load_run(run, overrides)
        files = analyse(run, experiment, say=said.append, timed=False, **named)
        assert all(path == run / "analysis" / f"{name}.json" for name, path in files.items())
        return {name: runs.read_json(path) for name, path in files.items()}, said

    return go


def test_all_three_and_none_of_them_twice(run: runs.Run, look: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found, said = look()
    assert set(found) == {"cka", "robustness", "cost"} and len(said) == 3
    cka = found["cka"]
    assert cka["split"] == "test" and cka["samples"] == 500
    assert np.shape(cka["cka"]) == (len(cka["student_layers"]), len(cka["teacher_layers"])) == (4, 4)
    rows = found["robustness"]["rows"]
    measured = runs.read_json(run / "eval/test.json")
    assert rows[0]["student"] == pytest.approx(measured["metrics"]["top1"]) and found["robustness"]["samples"] == 500
    assert rows[0]["teacher"] == pytest.approx(measured["teacher"]["top1"]) and len(rows) == 16
    assert look()[1] == []
    (run / "analysis/cka.json").unlink()
    assert [text.split(": ")[-1] for text in look()[1]] == ["cka"]
    later = (run / "analysis/cka.json").stat().st_mtime_ns + 10**9
    os.utime(run / "student.safetensors", ns=(later, later))  # as if it was trained again
    assert len(look()[1]) == 3
    monkeypatch.setattr(
        cost, "measure", lambda cells, seconds: [replace(ROW, what=c.what, batch=c.batch) for c in cells]
    )
    files = analyse(run, load_run(run), say=said.append, timed=True)
    assert said[-1].endswith("cost") and len(runs.read_json(files["cost"])["models"]["teacher"]["rows"]) == 2


def test_costs_of_a_teacher_of_foreign_weights(run: runs.Run, look: Any) -> None:
    document = look()[0]["cost"]
    student, teacher = document["models"]["student"], document["models"]["teacher"]
    assert student["bytes"] == (run / "student.safetensors").stat().st_size and student["parameters"] == 1182
    assert teacher["kind"] == "digits_cnn" and teacher["parameters"] > 2 * 1182 and teacher["macs"] > student["macs"]
    assert student["rows"] == teacher["rows"] == [] and document["threads"] == 1 and document["processor"]
    training = document["training"]
    assert training["student_seconds"] == sum(run.info["seconds"].values()) > training["asking_seconds"] > 0
    assert training["teacher_seconds"] == 0 and training["peak_bytes"] > 2**20
    assert training["energy_source"] and (training["energy_joules"] is None) == ("not" in training["energy_source"])
    assert document["break_even"] == {"inferences": None, "saved_ms": None, "text": "latencies were not measured"}


def test_without_its_teacher(trained: Path, run: runs.Run, look: Any) -> None:
    weights = trained / "foreign.safetensors"
    aside = weights.rename(weights.with_name("aside"))
    try:
        found, said = look()
    finally:
        aside.rename(weights)
    assert set(found) == {"robustness", "cost"} and found["cost"]["models"]["teacher"] is None
    assert found["cost"]["break_even"]["text"] == "the teacher could not be measured"
    assert "cost" in RunFacts(run).lacking
    assert look()[0]["cost"]["models"]["teacher"] is not None  # it is back, and so is its cost
    assert all(row["teacher"] is None for row in found["robustness"]["rows"])
    assert sum("foreign.safetensors" in text for text in said) == 3


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_file_is_not_taken_for_a_fresh_one(text: str, tmp_path: Path) -> None:
    (tmp_path / "weights").touch()
    (tmp_path / "cost.json").write_text(text)
    assert not analysing._is_fresh(tmp_path / "cost.json", tmp_path / "weights", timed=False, taught=True)


def test_without_its_data(run: runs.Run, look: Any) -> None:
    nowhere = load_experiment(run.config, ["data.kind=npz", "data.path=nowhere.npz"], require_files=False).experiment
    found, said = look(experiment=nowhere)
    assert set(found) == {"cost"} and found["cost"]["models"]["student"]["parameters"] == 1182
    assert sum("nowhere.npz" in text for text in said) == 3


def test_a_control_has_no_layers_to_compare(run: runs.Run, look: Any) -> None:
    found, said = look(experiment=control(load_run(run)))
    assert set(found) == {"robustness", "cost"} and not any("left out" in text for text in said)
    assert found["cost"]["break_even"]["text"] == "there is no teacher that the student could stand in for"


def test_an_unfinished_run(run: runs.Run) -> None:
    (run / "student.safetensors").unlink()
    with pytest.raises(analysing.MissingError, match="no finished student"):
        analyse(run, load_run(run))


def test_teachers_on_disk(trained: Path, run: runs.Run, tmp_path: Path) -> None:
    """Foreign weights are saved as a model of ours; a model of ours is taken as it is, without the data."""
    experiment = load_run(run)
    (made,) = saved_teachers(run, experiment, tmp_path, lambda: build_data(experiment))
    saved, given = load_model(made.stem).net.state_dict(), load_file(trained / "foreign.safetensors")
    assert made.stem.parent == tmp_path and made.named.endswith("foreign.safetensors")
    assert all((saved[name] == value).all() for name, value in given.items())

    def none() -> Any:
        raise AssertionError("the data were asked for")

    shutil.copytree(run.path, tmp_path / "other")
    for weights in ("other", "other/student.safetensors"):
        (tmp_path / "own.yaml").write_text(
            run.config.read_text().replace(str(trained / "foreign.safetensors"), weights)
        )
        own = load_experiment(tmp_path / "own.yaml", ["stages.0.teacher.width=4"]).experiment
        (found,) = saved_teachers(run, own, tmp_path, none)
        assert found.stem == (tmp_path / "other/student").resolve()
    assert saved_teachers(run, control(experiment), tmp_path, none) == []


# ----------------------------------------------------------------------------------------------------------- break-even


def models(student: float, teacher: float) -> dict[str, Any]:
    return {who: {"rows": [{"batch": 32, "cpu_ms": 99.0}, {"batch": 1, "cpu_ms": ms}]} for who, ms in
            (("student", student), ("teacher", teacher))}  # fmt: skip


def test_break_even_by_hand() -> None:
    training = {"student_seconds": 60.0, "teacher_seconds": 40.0}
    found = cost.break_even(models(0.5, 3.0), training)
    assert found["inferences"] == 40_000 and found["saved_ms"] == 2.5
    assert found["text"] == (
        "the 100.0 s of training (40.0 s of them the teacher's) are won back after 40,000 images: "
        "the student takes 0.5 ms of processor time an image, the teacher 3 ms"
    )
    given = cost.break_even(models(0.5, 3.0), training | {"teacher_seconds": 0.0})
    assert given["inferences"] == 24_000 and "teacher's)" not in given["text"]


@pytest.mark.parametrize("teacher", [0.5, 0.49, 0.52])
def test_a_student_that_is_about_as_fast(teacher: float) -> None:
    found = cost.break_even(models(0.5, teacher), {"student_seconds": 60.0, "teacher_seconds": 0.0})
    assert found["inferences"] is None and found["text"].startswith("student and teacher are about equally fast")


@pytest.mark.parametrize("teacher", [0.45, 0.4])
def test_a_student_that_is_not_faster(teacher: float) -> None:
    found = cost.break_even(models(0.5, teacher), {"student_seconds": 60.0, "teacher_seconds": 0.0})
    assert found["inferences"] is None and found["saved_ms"] == pytest.approx(teacher - 0.5)
    assert "not faster" in found["text"]


def test_several_teachers_are_asked_one_after_the_other() -> None:
    other = replace(ROW, p50_ms=3.0, cpu_ms=2.5, peak_bytes=5000, calls=7)
    found = cost.added([ROW, other])
    assert (found["p50_ms"], found["p95_ms"], found["cpu_ms"]) == (5, 6, 4)
    assert found["samples_per_second"] == 200 and found["peak_bytes"] == 5000 and found["calls"] == 7
    assert cost.added([ROW]) == ROW.as_dict()


def test_energy_of_all_stages_or_none(run: runs.Run) -> None:
    experiment = load_run(run)
    path = run.stage_dir(experiment.student_stage.name) / "result.json"
    result = runs.read_json(path)
    runs.write_json(path, result | {"energy_joules": 12.5, "energy_source": "Intel RAPL", "peak_bytes": 77})
    found = cost.describe_training(run, experiment)
    assert (found["energy_joules"], found["energy_source"], found["peak_bytes"]) == (12.5, "Intel RAPL", 77)
    runs.write_json(path, {key: value for key, value in result.items() if not key.startswith(("energy", "peak"))})
    older = cost.describe_training(run, experiment)
    assert older["energy_joules"] is older["peak_bytes"] is None and older["energy_source"] == "not measured"
