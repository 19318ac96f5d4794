"""Expansion into stages: shorthands and their long forms come to the same, and a dump is a fixed point."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kdctl.config.dump import dump_yaml, origin_rows
from kdctl.config.expand import expand, load_experiment
from kdctl.config.json_schema import json_schema
from kdctl.config.schema import ExperimentFile, LossSpec

STUDENT = "data: {kind: digits}\nstudent: {kind: digits_cnn, width: 4}\n"
TEACHER = "teacher: {kind: digits_cnn, width: 32, train: {epochs: 3}}\n"
FULL = (
    STUDENT
    + """\
teacher:
  - {kind: digits_cnn, width: 32, name: big, train: {epochs: 7, data: {labels_per_class: all}, losses: [{kind: ce}]}}
  - {kind: mlp, hidden: [64], control: true}
losses:
  - {kind: ce, weight: 1e-1, label_smoothing: 0.1}
  - {kind: kd, weight: {0: 0, 5: 0.9}, T: 2}
  - {kind: at, name: maps, taps: [conv1, {student: conv2, teacher: conv2}]}
optimizer: {kind: adamw, lr: 3e-3, betas: [0.9, 0.99]}
schedule: {kind: multistep, milestones: [2, 4]}
train: {epochs: 5, seed: 3, max_minutes: 1, ema: 0.99, clip_norm: 1}
compress: [{kind: quantize}, {kind: quantize}, {kind: quantize, calibration: entropy}]
export: [{kind: onnx, opset: 19}]
"""
)
STAGES = (
    STUDENT
    + """\
teacher: {from: big, kind: digits_cnn, width: 32}
distill: {alpha: 0.5}
train: {epochs: 5}
stages:
  - {name: big, role: teacher, student: {kind: digits_cnn, width: 32}, epochs: 2}
  - {name: middle, role: assistant, student: {kind: digits_cnn, width: 8}}
  - {name: hints, losses: [{kind: logit_mse}], epochs: 1}
  - {name: logits, teacher: {from: middle}, optimizer: {kind: sgd, lr: 0.01}}
  - {name: alone, teacher: null, losses: [{kind: ce}], from: fresh}
  - {kind: quantize}
  - {kind: export, target: onnx}
"""
)


@pytest.fixture
def load(write):
    def call(text: str, *overrides: str):
        return load_experiment(write(text), overrides)

    return call


def test_a_student_alone(load):
    experiment = load(STUDENT).experiment
    (stage,) = experiment.stages
    assert (experiment.name, stage.name, stage.role, stage.start, stage.teacher) == (
        "exp",
        "student",
        "student",
        "fresh",
        None,
    )
    assert [(loss.kind, loss.weight) for loss in stage.losses] == [("supervised", 1.0)]
    assert stage.student == experiment.student and stage.method.kind == "distill" and stage.epochs == 30
    assert stage.optimizer.arguments["lr"] == 0.05 and stage.schedule.arguments["warmup_epochs"] == 0.0


def test_a_teacher_with_weights_is_no_stage(load, write):
    write("x", "t.safetensors")
    experiment = load(STUDENT + "teacher: {kind: digits_cnn, width: 32, weights: t.safetensors}\n").experiment
    assert [stage.name for stage in experiment.stages] == ["student"]


def test_a_teacher_without_weights_is_the_stage_before(load):
    text = (
        "teacher: {kind: digits_cnn, width: 32, normalize: none, train: {epochs: 3, data: {labels_per_class: all}}}\n"
    )
    text += "optimizer: {kind: adamw}\ntrain: {epochs: 5, keep: last}\n"
    first, second = load(STUDENT.replace("digits}", "digits, labels_per_class: 4}") + text).experiment.train_stages
    assert (first.name, first.role, first.epochs, first.keep, first.start) == ("teacher", "teacher", 3, "last", "fresh")
    assert first.teachers == [] and [loss.kind for loss in first.losses] == ["supervised"]
    assert first.student.arguments["width"] == 32 and first.student.normalize == "none"
    assert first.data.labels_per_class == "all" and second.data.labels_per_class is None
    assert (second.epochs, second.start) == (5, "fresh")
    (teacher,) = second.teachers
    assert (teacher.stage, teacher.train, teacher.arguments["width"], teacher.normalize) == (
        "teacher",
        None,
        32,
        "none",
    )
    assert first.optimizer == second.optimizer and first.optimizer.kind == "adamw"


def test_the_shorthand_and_its_long_form_are_identical(load):
    long = "losses: [{kind: ce, weight: 0.1}, {kind: kd, weight: 0.9, temperature: 4}]\n"
    texts = ["distill: {T: 4, alpha: 0.9}\n", "distill: {temperature: 4.0, alpha: 0.9}\n", "distill: {}\n", "", long]
    texts.append(long.replace("ce", "supervised").replace("temperature", "T"))
    forms = [load(STUDENT + TEACHER + text).experiment for text in texts]
    assert all(form == forms[0] for form in forms)
    assert len({dump_yaml(form) for form in forms}) == 1
    assert [loss.weight for loss in forms[0].train_stages[1].losses] == [0.1, 0.9]
    assert load(STUDENT + TEACHER + "distill: {T: 5}\n").experiment != forms[0]


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1), st.floats(0.01, 100))
def test_alpha_is_the_share_of_the_teacher(alpha, temperature):
    model = {"kind": "digits_cnn"}
    sections = {"data": {"kind": "digits"}, "student": model, "teacher": {**model, "control": True}}
    file = ExperimentFile.model_validate({**sections, "distill": {"T": temperature, "alpha": alpha}})
    supervised, kd = expand(file).train_stages[0].losses
    assert kd.weight == alpha and kd.arguments["temperature"] == temperature
    assert abs(supervised.weight + kd.weight - 1) < 1e-9 and supervised.weight >= 0


def test_the_shorthand_for_output(load):
    stages = load(FULL).experiment.products
    assert [(s.kind, s.name) for s in stages] == [
        ("quantize", "int8"), ("quantize", "int8-2"), ("quantize", "int8-3"), ("export", "onnx"),
    ]  # fmt: skip
    assert stages[2].arguments["calibration"] == "entropy" and stages[0].arguments["samples"] == 512
    assert stages[3].arguments == {"target": "onnx", "opset": 19}


def test_aliases_become_names_everywhere(load):
    experiment = load(FULL).experiment
    text = dump_yaml(experiment)
    assert {loss.kind for s in experiment.train_stages for loss in s.losses} == {
        "supervised",
        "kd",
        "attention_transfer",
    }
    assert "kind: ce" not in text and "kind: at\n" not in text and "T:" not in text
    assert experiment.train_stages[-1].losses[2].label == "maps"


def test_stages_take_what_they_do_not_set(load):
    big, middle, hints, logits, alone = load(STAGES).experiment.train_stages
    assert (big.teachers, big.epochs, [loss.kind for loss in big.losses]) == ([], 2, ["supervised"])
    assert middle.teachers[0].stage == "big" and middle.epochs == 5 and middle.role == "assistant"
    assert [loss.weight for loss in middle.losses] == [0.5, 0.5]
    assert [loss.kind for loss in hints.losses] == ["logit_mse"] and hints.student.arguments["width"] == 4
    assert logits.teachers[0].stage == "middle" and logits.teachers[0].arguments["width"] == 8
    assert logits.optimizer.arguments["lr"] == 0.01 and hints.optimizer.arguments["lr"] == 0.05
    assert alone.teachers == []
    assert [s.start for s in (big, middle, hints, logits, alone)] == ["fresh", "fresh", "fresh", "hints", "fresh"]


def test_previous_when_written_is_the_stage_before(load):
    text = STUDENT + "stages: [{name: a, role: teacher, student: {kind: mlp, hidden: []}}, {name: b, from: previous}]\n"
    assert load(text).experiment.train_stages[1].start == "a"


@pytest.mark.parametrize("text", [STUDENT, STUDENT + TEACHER, FULL, STAGES])
def test_a_dump_is_a_file_that_comes_to_the_same(load, write, text):
    experiment = load(text).experiment
    dumped = dump_yaml(experiment)
    again = load_experiment(write(dumped, "config.yaml"))
    assert again.experiment == experiment and dump_yaml(again.experiment) == dumped
    assert expand(ExperimentFile.model_validate(yaml_of(dumped))) == experiment


def yaml_of(text: str):
    from kdctl.config import yaml_io

    return yaml_io._plain(yaml_io._Reader("x").read(text), "x", "file")[0]


def test_a_dump_is_readable_by_others_and_shows_every_hyperparameter(load):
    experiment = load(FULL + "").experiment
    other = yaml.safe_load(dump_yaml(experiment))
    stage = other["stages"][1]
    assert list(stage)[:3] == ["kind", "name", "role"]
    assert stage["losses"][0] == {
        "kind": "supervised",
        "weight": 0.1,
        "taps": [],
        "force": False,
        "label_smoothing": 0.1,
    }
    assert stage["losses"][1]["weight"] == {0: 0.0, 5: 0.9} and stage["losses"][1]["standardize"] is False
    assert stage["optimizer"]["eps"] == 1e-8 and stage["optimizer"]["lr"] == 3e-3
    assert other["train"]["max_minutes"] == 1.0 and "epochs" not in other["train"]


def test_overrides_of_a_resolved_experiment(load, write):
    path = write(dump_yaml(load(FULL).experiment), "config.yaml")
    experiment = load_experiment(path, ["stages.student.epochs=9", "stages.student.losses.kd.temperature=7"]).experiment
    assert (
        experiment.train_stages[1].epochs == 9 and experiment.train_stages[1].losses[1].arguments["temperature"] == 7.0
    )


def test_every_component_is_completed(load, write):
    write("x", "more.npz")
    text = """\
data: {kind: digits, augment: [{kind: horizontal_flip}], transfer: [{kind: npz, path: more.npz}]}
student: {kind: digits_cnn}
stages: [{data: {augment: [{kind: random_crop}], batch_size: 8}}]
"""
    experiment = load(text).experiment
    stage = experiment.train_stages[0]
    assert experiment.data.augment[0].arguments["p"] == 0.5
    assert (
        stage.data.augment is not None and "padding" in stage.data.augment[0].arguments and stage.data.batch_size == 8
    )
    assert len(experiment.data.transfer[0].arguments) > 1 and experiment.student.arguments["width"]
    assert experiment.data.transfer[0].arguments["path"].startswith("/")


@pytest.mark.parametrize(
    ("file", "name"),
    [("my run (2).yaml", "my-run-2"), ("..yaml", "experiment"), ("ü.yaml", "experiment"), ("a.b.yaml", "a.b")],
)
def test_the_name_is_the_stem(write, file, name):
    assert load_experiment(write(STUDENT, file)).experiment.name == name
    assert load_experiment(write(STUDENT + "name: own\n", file)).experiment.name == "own"


# -------------------------------------------------------------------------------------------------------------- origins


def test_where_each_value_came_from(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("x", "sub/t.safetensors")
    write(STUDENT + "optimizer:\n  kind: sgd\n  lr: 0.3\n", "base.yaml")
    text = "extends: base.yaml\nteacher: {kind: digits_cnn, weights: sub/t.safetensors}\ndistill: {alpha: 0.7}\n"
    loaded = load_experiment(Path(write(text).name), ["train.epochs=4", "distill.temperature=2"])
    rows = {key: (value, origin) for key, value, origin in origin_rows(loaded)}
    assert rows["student.width"] == (4, "base.yaml:2")
    assert rows["stages.0.student.width"] == (4, "base.yaml:2")
    assert rows["stages.0.optimizer.lr"] == (0.3, "base.yaml:5")
    assert rows["stages.0.optimizer.momentum"] == (0.0, "default")
    assert rows["stages.0.epochs"] == (4, "override 1")
    assert rows["stages.0.losses.0.weight"] == (0.3, "exp.yaml:3") and rows["stages.0.losses.1.weight"] == (
        0.7,
        "exp.yaml:3",
    )
    assert rows["stages.0.losses.1.temperature"] == (2.0, "override 2")
    assert rows["stages.0.teacher.weights"] == ("sub/t.safetensors", "exp.yaml:2")
    assert rows["train.seed"] == (0, "default")


def test_origins_of_stages_and_outputs(load):
    rows = {key: origin.rpartition(":")[2] for key, _, origin in origin_rows(load(FULL))}
    assert rows["stages.0.epochs"] == "4" and rows["stages.0.student.width"] == "4"
    assert rows["stages.1.teacher.1.hidden"] == "5" and rows["stages.1.losses.1.temperature"] == "8"
    assert rows["stages.1.losses.2.taps.1.student"] == "9" and rows["stages.1.clip_norm"] == "12"
    assert rows["stages.4.calibration"] == "13" and rows["stages.5.target"] == "14" and rows["stages.5.opset"] == "14"
    staged = {key: origin.rpartition(":")[2] for key, _, origin in origin_rows(load(STAGES))}
    assert (
        staged["stages.3.optimizer.lr"] == "10"
        and staged["stages.2.epochs"] == "9"
        and staged["stages.1.epochs"] == "5"
    )


# --------------------------------------------------------------------------------------------------------- JSON Schema


def test_the_json_schema_knows_kinds_and_arguments():
    schema = json_schema()
    json.dumps(schema)
    assert {"data", "student", "extends", "distill"} <= set(schema["properties"])
    loss = schema["$defs"]["LossSpec"]
    kinds = loss["properties"]["kind"]["anyOf"][0]["enum"]
    assert {"kd", "ce", "at", "supervised"} <= set(kinds)
    rule = next(r["then"] for r in loss["allOf"] if "kd" in r["if"]["properties"]["kind"]["enum"])
    number, curve = rule["properties"]["temperature"]["anyOf"]
    assert number == {"type": "number", "exclusiveMinimum": 0} and rule["properties"]["temperature"]["default"] == 4.0
    assert curve["type"] == "object" and curve["additionalProperties"] == number
    assert {"T", "weight", "taps", "standardize"} <= set(rule["propertyNames"]["enum"])
    sgd = schema["$defs"]["optimizers"]["allOf"][0]["then"]
    assert sgd["required"] == ["lr"] and "params" not in sgd["properties"]
    references = set()

    def collect(value):
        if isinstance(value, dict):
            references.update([value["$ref"]] if "$ref" in value else [])
            for item in value.values():
                collect(item)
        elif isinstance(value, list):
            for item in value:
                collect(item)

    collect(schema)
    assert {reference.rpartition("/")[2] for reference in references} <= set(schema["$defs"])


def test_every_key_of_the_schema_is_described_or_a_section():
    fields = {name: info for name, info in LossSpec.model_fields.items() if name != "kind"}
    assert all(info.description for info in fields.values())


# ------------------------------------------------------------------------------------------------------------ no torch


def test_loading_an_experiment_imports_no_torch(write):
    path = write(FULL + "")
    code = (
        "import sys, pathlib; from kdctl.config.expand import *; from kdctl.config.dump import *; "
        "from kdctl.config.json_schema import *; "
        "l = load_experiment(pathlib.Path(sys.argv[1])); origin_rows(l); dump_yaml(l.experiment); json_schema(); "
        "print([m for m in ('torch', 'numpy', 'torchvision', 'onnx', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
