"""Comparing run directories: what stands for what, against what it is held, what is missing, who is on the front."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from kdctl import runs, stats
from kdctl.config.dump import dump_yaml
from kdctl.config.expand import load_experiment
from kdctl.errors import MissingError
from kdctl.report import compare_text
from kdctl.report.compare import compare

FILE = """
name: {name}
data: {{kind: digits{data}}}
teacher: {{kind: digits_cnn, width: 8, train: {{epochs: 2}}}}
student: {{kind: digits_cnn, width: {width}}}
distill: {{T: {heat}, alpha: 0.9}}
train: {{epochs: 3}}
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(place: str, top1: float | None, **changed: Any) -> Path:
    """A run directory as training leaves it, with this accuracy; None of one that is not finished."""
    given = {"width": 4, "heat": 4, "data": "", "role": "main", "control": None, "group": None, "seed": 0, "size": 100}
    given |= changed
    run = Path("runs", place)
    run.mkdir(parents=True)
    name = re.sub(r"\W", "", run.parent.name)
    source = FILE.format(name=name, **{k: given[k] for k in ("data", "width", "heat")})
    (run / "source.yaml").write_text(source)
    (run / "config.yaml").write_text(dump_yaml(load_experiment(run / "source.yaml").experiment))
    info = {k: given[k] for k in ("role", "control", "group", "seed")}
    info |= {"created": f"2030-01-0{given['seed'] + 1}", "status": "running", "seconds": {"teacher": 50, "student": 7}}
    if top1 is not None:
        info["status"] = "done"
        best = {"epoch": 3, "val": {"top1": 1.0}, "test": {"top1": top1, "ece": 2.0}}
        student = {"kind": "digits_cnn", "parameters": 1182, "best": best, "last": best}
        runs.write_json(run / "summary.json", {"epochs": 3, "seconds": 57, "agreement": 90.0, "student": student})
        runs.write_json(run / "eval" / "test.json", {"samples": 500})
        (run / "student.safetensors").write_bytes(b"x" * given["size"])
    runs.write_json(run / "run.json", info)
    return run


def artefact(run: Path, name: str, top1: float, size: int, latency: float) -> None:
    before = {"bytes": 100, "macs": 9000, "metrics": {"top1": 1.0}, "latency_ms": {"1": 3.0}}
    after = {"bytes": size, "parameters": 1182, "macs": 9000, "metrics": {"top1": top1, "ece": 3.0}}
    document = {
        "variant": name, "runtime": "onnxruntime 1.0", "split": "test", "samples": 500, "agreement_teacher": 89.0,
        "before": before, "after": after | {"latency_ms": {"1": latency}},
    }  # fmt: skip
    runs.write_json(run / "artefacts" / name / "result.json", document)
    runs.write_json(run / "artefacts" / name / "manifest.json", {})


MAIN, CONTROL = [90.0, 92.0, 91.0], [88.0, 91.0, 88.5]


@pytest.fixture
def group() -> Path:
    """Three seeds with their controls."""
    members = []
    for seed, (student, control) in enumerate(zip(MAIN, CONTROL, strict=True)):
        for number, value, role in ((1, student, "main"), (2, control, "control")):
            place = f"{2 * seed + number:03d}"
            make(f"g/{place}", value, role=role, group="groups/001.json", seed=seed)
            members.append({"role": role, "seed": seed, "run": place})
    runs.write_json(Path("runs/g/groups/001.json"), {"members": members, "result": {}})
    return Path("runs/g/groups/001.json")


def by_name(document: dict) -> dict[str, dict]:
    return {row["what"]: row for row in document["rows"]}


def test_a_run_of_a_group_stands_for_its_seeds(group):
    (row,) = compare(["runs/g/003"])["rows"]
    assert (row["what"], row["kind"], row["seeds"]) == ("runs/g/groups/001", "group", 3)
    assert row["value"] == stats.interval(MAIN).as_dict()
    assert row["seconds"] == 7  # the student's stage alone: only one seed trains the teacher
    assert compare(["g", "runs/g/001", "runs/g/005"])["rows"] == [row]  # one thing under three names


def test_a_groups_file_has_its_controls_held_against_seed_by_seed(group):
    rows = by_name(compare([str(group)]))
    assert list(rows) == ["runs/g/groups/001", "runs/g/groups/001 baseline"]
    against = rows["runs/g/groups/001 baseline"]["against_baseline"]
    assert against == stats.paired(CONTROL, MAIN).as_dict() | {"test": "paired"}
    assert rows["runs/g/groups/001"]["against_baseline"] is None


def test_other_groups_are_held_against_by_welch(group):
    make("other/001", 95.0)
    rows = by_name(compare(["other"], baseline="g"))
    assert list(rows) == ["runs/g/groups/001", "runs/other/001"]
    assert rows["runs/other/001"]["against_baseline"] == stats.welch([95.0], MAIN).as_dict() | {"test": "welch"}


def test_a_single_seed_is_called_noise(group):
    make("other/001", 95.0)
    (note,) = compare(["other", "g"])["notes"]
    assert f"about {2 * stats.std(MAIN):.2f} points (runs/g/groups/001) is noise" in note
    assert compare(["g"])["notes"] == []


def test_artefacts_are_rows_and_fronts_are_exact():
    run = make("a/001", 90.0)
    artefact(run, "int8", 89.0, 40, 1.0)
    artefact(run, "worse", 88.0, 40, 2.0)
    artefact(run, "same", 89.0, 40, 1.5)
    document = compare(["a"])
    rows = by_name(document)
    int8 = rows["runs/a/001/artefacts/int8"]
    assert int8["against_baseline"]["mean"] == -1 and int8["against_baseline"]["test"] == "paired"
    assert (int8["bytes"], int8["agreement"], int8["runtime"], int8["epochs"]) == (40, 89.0, "onnxruntime 1.0", None)
    assert (rows["runs/a/001"]["latency_ms"], rows["runs/a/001"]["macs"]) == (3.0, 9000)
    names = {cost: [Path(name).name for name in front] for cost, front in document["pareto"].items()}
    assert names == {"bytes": ["001", "int8", "same"], "latency_ms": ["001", "int8"]}
    assert rows["runs/a/001/artefacts/worse"]["pareto"] == {"bytes": False, "latency_ms": False}
    (alone,) = compare([str(run / "artefacts" / "int8")])["rows"]
    assert alone["value"]["mean"] == 89.0


def test_a_front_holds_an_artefact_against_its_own_seed(group):
    """An artefact is of one seed: against the mean of all it would be better or worse by the luck of the draw."""
    artefact(Path("runs/g/001"), "int8", MAIN[0] + 0.5, 40, 1.0)
    assert MAIN[0] + 0.5 < sum(MAIN) / 3
    rows = by_name(compare(["g"]))
    assert rows["runs/g/groups/001/artefacts/int8"]["pareto"]["bytes"]
    assert not rows["runs/g/groups/001"]["pareto"]["bytes"]


def test_latency_is_that_of_bench_with_the_fewest_threads():
    run = make("a/001", 90.0)
    rows = [
        {"what": "student", "batch": b, "threads": t, "p50_ms": ms} for b, t, ms in ((1, 2, 5), (1, 1, 6), (8, 1, 9))
    ]
    runs.write_json(run / "bench.json", {"processor": "x", "rows": rows})
    assert compare(["a"])["rows"][0]["latency_ms"] == 6


def test_only_what_differs():
    make("a/001", 90.0)
    make("b/001", 91.0, heat=2)
    document = compare(["a", "b"])
    keys = {row["key"]: row["values"] for row in document["differences"]}
    assert keys == {
        "name": {"runs/a/001": "a", "runs/b/001": "b"},
        "stages.student.losses.kd.temperature": {"runs/a/001": 4.0, "runs/b/001": 2.0},
    }
    assert document["same"] > 50


def test_a_section_that_a_run_lacks_is_one_difference(group):
    path = Path("runs/g/002/config.yaml")
    source = "data: {kind: digits}\nstudent: {kind: digits_cnn, width: 4}\nname: g\n"
    Path("alone.yaml").write_text(source)
    path.write_text(dump_yaml(load_experiment(Path("alone.yaml")).experiment))
    keys = [row["key"] for row in compare([str(group)])["differences"]]
    assert "stages.teacher" in keys and not any(key.startswith("stages.teacher.") for key in keys)


@pytest.mark.parametrize("data", [", split_seed: 3", ", limit: 50"])
def test_training_on_other_samples_of_the_same_data_compares(data):
    make("a/001", 90.0)
    make("b/001", 91.0, data=data)
    assert not any("does not compare" in note for note in compare(["a", "b"])["notes"])


def test_other_data_do_not_compare():
    make("a/001", 90.0)
    run = make("b/001", 91.0)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("kind: digits\n", "kind: cifar10\n  root: x\n", 1))
    document = compare(["a", "b"])
    assert any("data.kind is cifar10, not digits" in note for note in document["notes"])
    assert by_name(document)["runs/b/001"]["against_baseline"] is None
    assert document["pareto"]["bytes"] == ["runs/a/001"]


def test_other_fingerprints_do_not_compare():
    for name, fingerprint in (("a", "1"), ("b", "2")):
        runs.write_json(make(f"{name}/001", 90.0) / "provenance.json", {"data": {"fingerprint": fingerprint}})
    assert any("fingerprints differ" in note for note in compare(["a", "b"])["notes"])


def test_what_is_missing_is_a_dash_and_never_0():
    make("a/001", None)
    make("b/001", 90.0)
    document = compare(["a", "b"])
    row = by_name(document)["runs/a/001"]
    assert [row[k] for k in ("value", "ece", "bytes", "macs", "latency_ms", "epochs")] == [None] * 6
    assert any("runs/a/001 is running" in note for note in document["notes"])
    head, body = compare_text.table(document)
    assert "MACs" not in head  # no row has one
    cells = dict(zip(head, body[0], strict=True))
    assert [cells[k] for k in ("metric" if "metric" in head else "top1", "bytes", "epochs", "front")] == ["-"] * 4
    lines = [line.split(",") for line in compare_text.comma_separated(document).splitlines()]
    first = dict(zip(lines[0], lines[1], strict=False))
    assert (first["mean"], first["bytes"], first["front_bytes"]) == ("-", "-", "-")


def test_a_run_of_a_group_that_is_gone_is_told(group):
    runs.write_json(
        group, json.loads(group.read_text()) | {"members": [{"role": "main", "seed": 0, "run": "001"}, {"run": "099"}]}
    )
    assert any("1 of its 2 runs" in note for note in compare([str(group)])["notes"])
    runs.write_json(group, {"members": [{"role": "main", "seed": 0, "run": "099"}]})
    with pytest.raises(MissingError, match="no run of"):
        compare([str(group)])


def test_a_group_of_which_nothing_is_finished_is_told(group):
    make("new/001", None, group="groups/001.json")
    runs.write_json(Path("runs/new/groups/001.json"), {"members": [{"role": "main", "seed": 0, "run": "001"}]})
    document = compare(["g", "new"])
    assert by_name(document)["runs/new/001"]["value"] is None
    assert any("runs/new/001 is running" in note for note in document["notes"])


def test_controls_agree_with_their_students_teacher_or_not_at_all(group):
    """What a run says of its own teacher, 90 here, is of another teacher where the run is a control."""
    rows = by_name(compare([str(group)]))
    assert [row["agreement"] for row in rows.values()] == [90.0, None]
    seeds = [{"seed": seed, "baseline": {"agreement": 70.0 + seed}} for seed in range(3)]
    runs.write_json(group, json.loads(group.read_text()) | {"result": {"seeds": seeds}})
    assert [row["agreement"] for row in compare([str(group)])["rows"]] == [90.0, 71.0]


def test_texts_escape_what_names_hold():
    make("a|<b>/001", 90.0)
    document = compare(["a|<b>"])
    assert "a\\|<b>" in compare_text.markdown(document)
    page = compare_text.page(document)
    assert "a|&lt;b&gt;" in page and "<b>" not in page
    assert "http" not in page and "<script" not in page


def test_where_data_come_from_is_no_difference():
    make("a/001", 90.0)
    make("b/001", 91.0)
    for name, more in (("a", "kind: cifar10\n  root: /x\n  download: true"), ("b", "kind: cifar10\n  root: /y")):
        config = Path(f"runs/{name}/001/config.yaml")
        config.write_text(config.read_text().replace("kind: digits", more, 1))
    assert compare(["a", "b"])["rows"][1]["against_baseline"] is not None
