"""bench, called as a user calls it, on a run with a student, a smaller model and a file."""

from __future__ import annotations

import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import save_file

from kdctl import runs
from kdctl.bench import cost, latency
from kdctl.bench.latency import Row
from kdctl.cli import app
from kdctl.evaluate import open_torch
from kdctl.export import manifest
from kdctl.export.onnx import Onnx, open_predictor, record_metadata
from kdctl.models.record import ModelRecord, build_model, save_model


def model(width):
    torch.manual_seed(0)
    return build_model(ModelRecord("digits_cnn", {"width": width}, 10, list("0123456789"), [1, 8, 8])).eval()


def describe(folder, predictor, target, file, known):
    """What a stage leaves beside its file."""
    after = {"bytes": 1234, "parameters": cost.parameters(known.net), "macs": cost.macs(known, (1, 8, 8))}
    runs.write_json(folder / "result.json", {"after": after})
    made = manifest.describe(predictor, target=target, variant=folder.name, model=file, source="student", folder=folder)
    runs.write_json(folder / manifest.NAME, made)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("bench")
    run = home / "runs" / "mine" / "001"
    whole, small = model(8), model(4)
    save_model(whole, run / "student")
    runs.write_json(run / "run.json", {"created": "2030", "role": "main", "status": "done"})
    (run / "config.yaml").write_text("student: {kind: digits_cnn}\n")
    (run / "artefacts" / "onnx").mkdir(parents=True)
    file = run / "artefacts" / "onnx" / "model.onnx"
    Onnx().convert(whole, (1, 8, 8), file, record_metadata(whole.record.to_dict()))
    describe(file.parent, open_predictor(file, 1), "onnx", file.name, whole)
    pruned = run / "artefacts" / "prune"
    save_model(small, pruned / "model")
    predictor = open_torch(str(pruned / "model"))
    predictor.input, predictor.output, predictor.class_names = "images", "logits", []
    describe(pruned, predictor, "torch", "model", small)
    return home


@pytest.fixture
def run(home, monkeypatch, capsys):
    monkeypatch.chdir(home)

    def call(*arguments):
        code = app.run(["bench", *arguments])
        seen = capsys.readouterr()
        return code, seen.out, seen.err

    return call


def test_a_run_with_all_that_is_in_it(run, home):
    code, out, _ = run("--batch", "1,4", "--seconds", "0.1", "--json")
    document = json.loads(out)
    assert code == 0 and document["ok"]
    rows = document["rows"]
    cells = [(row["what"], row["runtime"].split()[0], row["batch"], row["threads"]) for row in rows]
    assert cells == [
        ("student", "torch", 1, 1), ("student", "torch", 4, 1), ("onnx", "onnxruntime", 1, 1),
        ("onnx", "onnxruntime", 4, 1), ("prune", "torch", 1, 1), ("prune", "torch", 4, 1),
    ]  # fmt: skip
    student, file, pruned = rows[0], rows[2], rows[4]
    assert student["bytes"] == (home / "runs/mine/001/student.safetensors").stat().st_size and file["bytes"] == 1234
    assert student["parameters"] == file["parameters"] == cost.parameters(model(8).net) > pruned["parameters"]
    assert student["macs"] == cost.macs(model(8), (1, 8, 8)) > pruned["macs"]
    assert file["path"] == "runs/mine/001/artefacts/onnx/model.onnx"
    for row in rows:
        assert 0 < row["p50_ms"] <= row["p95_ms"] and row["samples_per_second"] > 0 and row["peak_bytes"] > 2**20
    assert document["written"] == ["runs/mine/001/bench.json"]
    assert json.loads((home / "runs/mine/001/bench.json").read_text())["rows"] == rows


def test_the_teacher_is_a_row_too(run, home, monkeypatch):
    """One of foreign weights, and one that cannot be loaded; each is opened, as a process would, and not timed."""

    def measure(cells, **_):
        assert [open_torch(cell.arguments["path"]).num_classes for cell in cells] == [10] * len(cells)
        return [Row(cell.what, "torch", cell.batch, cell.threads, 1.0, 1.0, 1.0, 1.0, 1, 1) for cell in cells]

    monkeypatch.setattr(latency, "measure", measure)
    taught = home / "runs" / "taught" / "001"
    save_model(model(4), taught / "student")
    runs.write_json(taught / "run.json", {"created": "2029", "role": "main", "status": "done"})
    save_file(model(8).net.state_dict(), home / "foreign.safetensors")
    (taught / "config.yaml").write_text(
        "{name: taught, data: {kind: digits}, student: {kind: digits_cnn, width: 4}, distill: {T: 2, alpha: 0.5},\n"
        " teacher: {kind: digits_cnn, width: 8, weights: ../../../foreign.safetensors}, train: {epochs: 1}}\n"
    )
    code, out, _ = run("taught", "--batch", "1", "--json")
    student, teacher = json.loads(out)["rows"]
    assert code == 0 and (student["what"], teacher["what"]) == ("student", "teacher")
    assert teacher["parameters"] == cost.parameters(model(8).net) and teacher["macs"] == cost.macs(model(8), (1, 8, 8))
    assert teacher["path"].endswith("foreign.safetensors")
    (home / "foreign.safetensors").unlink()
    code, out, err = run("taught", "--batch", "1", "--json")
    assert code == 0 and [row["what"] for row in json.loads(out)["rows"]] == ["student"]
    assert "is not measured" in err and "foreign.safetensors" in err


def test_an_artefact_with_threads(run):
    code, out, _ = run("runs/mine/001/artefacts/onnx", "--batch", "1", "--threads", "1,2", "--seconds", "0.1")
    lines = out.splitlines()
    assert code == 0 and lines[0].split()[:4] == ["what", "runtime", "batch", "threads"]
    assert [line.split()[0] for line in lines[1:3]] == ["onnx", "onnx"] and "student" not in out
    assert [line.split()[4] for line in lines[1:3]] == ["1", "2"]
    assert lines[-1] == "wrote runs/mine/001/bench.json"


def test_rows_that_are_not_measured_anew_stay(run, home, monkeypatch):
    """But for those of a thing that was made since, or on another processor."""
    run_dir, took = home / "runs/mine/001", [1.0]

    def measure(cells, **_):
        return [Row(cell.what, "torch", cell.batch, cell.threads, took[0], 1.0, 1.0, 1.0, 1, 1) for cell in cells]

    def rows():
        return [(r["what"], r["batch"], r["p50_ms"]) for r in json.loads((run_dir / "bench.json").read_text())["rows"]]

    monkeypatch.setattr(latency, "measure", measure)
    (run_dir / "bench.json").write_text("{")  # damaged
    assert run("--batch", "1,4")[0] == 0
    took[0] = 2.0
    monkeypatch.chdir(run_dir)  # where paths read otherwise
    assert run("artefacts/prune", "--batch", "1,8")[0] == 0
    assert rows() == [
        ("student", 1, 1.0), ("student", 4, 1.0), ("onnx", 1, 1.0), ("onnx", 4, 1.0),
        ("prune", 1, 2.0), ("prune", 4, 1.0), ("prune", 8, 2.0),
    ]  # fmt: skip
    later = time.time() + 60
    os.utime(run_dir / "student.safetensors", (later, later))
    assert run("artefacts/prune", "--batch", "1")[0] == 0
    assert [what for what, _, _ in rows()] == ["onnx", "onnx", "prune", "prune", "prune"]
    monkeypatch.setattr(latency, "processor", lambda: "another")
    assert run("artefacts/prune", "--batch", "1")[0] == 0
    assert rows() == [("prune", 1, 2.0)]
    (run_dir / "bench.json").unlink()


@pytest.mark.parametrize("option", ["--batch", "--threads"])
@pytest.mark.parametrize("text", ["0", "1,x", "", "-1"])
def test_numbers_that_are_none(run, option, text):
    code, _, err = run(option, text)
    assert code == 2 and f"{option} takes whole numbers above 0" in err


def test_a_damaged_artefact_is_not_timed(run, home):
    file = home / "runs/mine/001/artefacts/onnx/model.onnx"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    try:
        code, _, err = run("runs/mine/001/artefacts/onnx")
    finally:
        file.write_bytes(whole)
    assert code == 1 and "model.onnx is damaged: its checksum" in err


def test_a_run_that_is_not_there(run, home):
    code, _, err = run("yours")
    assert code == 4 and "there is no run at 'yours'" in err
    (home / "runs/new/001").mkdir(parents=True, exist_ok=True)
    for name in ("run.json", "config.yaml"):
        (home / "runs/new/001" / name).write_bytes((home / "runs/mine/001" / name).read_bytes())
    code, _, err = run("new")
    shutil.rmtree(home / "runs/new")  # else it would be the latest run of the tests after this one
    assert code == 4 and "no finished student yet" in err
