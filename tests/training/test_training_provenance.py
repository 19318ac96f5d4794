"""provenance.json: hashes that are those of the things themselves, and a run that repeats bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdctl import build, runs
from kdctl.cli import app
from kdctl.experiment import load_run
from kdctl.models.record import load_model, save_model
from kdctl.provenance import write_provenance
from kdctl.teachers.key import weights_hash


def test_each_hash_is_that_of_the_thing(run_it: Callable[..., tuple[runs.Run, Any]]) -> None:
    run, _ = run_it()
    said = runs.read_json(run / "provenance.json")
    assert said["config_sha256"] == hashlib.sha256((run / "config.yaml").read_bytes()).hexdigest()
    assert said["student"] == {"kind": "digits_cnn", "sha256": weights_hash(load_model(run / "student").net)}
    (teacher,) = said["teachers"]
    assert teacher["sha256"] == weights_hash(load_model(run / "teacher").net)
    assert (teacher["kind"], teacher["weights"]) == ("digits_cnn", "teacher")
    assert said["data"]["samples"] == {"train": 300, "val": 130, "test": 500}
    assert said["data"]["fingerprint"] == build.build_data(load_run(run)).fingerprint()
    assert said["command"] == run.info["command"]


def test_a_changed_teacher_or_other_data_have_another_hash(run_it: Callable[..., tuple[runs.Run, Any]]) -> None:
    run, _ = run_it()
    before = runs.read_json(run / "provenance.json")
    teacher = load_model(run / "teacher")
    with torch.no_grad():
        next(teacher.net.parameters()).view(-1)[0] += 1e-6
    save_model(teacher, run.stage_dir("teacher") / "model")
    experiment = load_run(run, ["data.split_seed=1"])
    write_provenance(run, experiment, build.build_data(experiment))
    after = runs.read_json(run / "provenance.json")
    assert after["teachers"][0]["sha256"] not in (None, before["teachers"][0]["sha256"])
    assert after["data"]["fingerprint"] != before["data"]["fingerprint"] and after["student"] == before["student"]


def test_weights_have_one_hash_in_whatever_file_they_are(
    run_it: Callable[..., tuple[runs.Run, Any]], folder: Path
) -> None:
    run, _ = run_it("train.epochs=1")
    (own,) = runs.read_json(run / "provenance.json")["teachers"]
    torch.save(load_model(run / "teacher").net.state_dict(), folder / "foreign.pth")
    again, _ = run_it("train.epochs=1", "teacher.train=null", f"teacher.weights={folder / 'foreign.pth'}")
    (foreign,) = runs.read_json(again / "provenance.json")["teachers"]
    assert foreign == {"kind": "digits_cnn", "weights": str(folder / "foreign.pth"), "sha256": own["sha256"]}


def test_own_code_and_inherited_weights_are_hashed(run_it: Callable[..., tuple[runs.Run, Any]], folder: Path) -> None:
    first, _ = run_it("train.epochs=1")
    said = runs.read_json(first / "provenance.json")
    assert said["inherited"] == [] and said["code"] == {}
    (folder / "own.py").write_text(
        "from kdctl.losses.kd import KD\n\n\nclass Own(KD):\n"
        '    """The same under another name."""\n\n    def __init__(self) -> None:\n        super().__init__()\n'
    )
    run, _ = run_it("train.epochs=1", f"student.inherit.source={first}", f"losses=[{{kind: '{folder}/own.py:Own'}}]",
                    "distill=null")  # fmt: skip
    said = runs.read_json(run / "provenance.json")
    (source,) = said["inherited"]
    assert source["sha256"] == hashlib.sha256((first / "student.safetensors").read_bytes()).hexdigest()
    assert said["code"] == {"own.py": hashlib.sha256((folder / "own.py").read_bytes()).hexdigest()}
    (first / "student.safetensors").unlink()
    write_provenance(run, load_run(run), build.build_data(load_run(run)))
    assert runs.read_json(run / "provenance.json")["inherited"] == [{"source": source["source"], "sha256": None}]


def test_a_teacher_that_is_gone_has_no_hash(run_it: Callable[..., tuple[runs.Run, Any]]) -> None:
    run, _ = run_it("train.epochs=1")
    (run.stage_dir("teacher") / "model.safetensors").unlink()
    write_provenance(run, load_run(run), build.build_data(load_run(run)))
    assert runs.read_json(run / "provenance.json")["teachers"][0]["sha256"] is None


def test_the_config_of_a_run_repeats_it_bit_for_bit(
    run_it: Callable[..., tuple[runs.Run, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, document = run_it()
    assert app.run(["train", str(run / "config.yaml"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    other = runs.Run(Path(again["run"]))
    assert other.path != run.path and again["student"] == document["student"]
    first, second = (runs.read_json(r / "provenance.json") for r in (run, other))
    for key in ("config_sha256", "data", "teachers", "inherited", "student", "code"):
        assert first[key] == second[key]
    assert (run / "eval" / "test.npz").read_bytes() == (other / "eval" / "test.npz").read_bytes()
