"""compare, called as a user calls it: its formats, files and errors."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from kdctl import runs
from kdctl.cli import app
from kdctl.config.dump import dump_yaml
from kdctl.config.expand import load_experiment


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Calls compare where there are two runs, x with 90 % and y with 91.5 %."""
    monkeypatch.chdir(tmp_path)
    for name, top1 in (("x", 90.0), ("y", 91.5)):
        home = Path("runs", name, "001")
        home.mkdir(parents=True)
        (home / "config.yaml").write_text(f"name: {name}\ndata: {{kind: digits}}\nstudent: {{kind: digits_cnn}}\n")
        (home / "config.yaml").write_text(dump_yaml(load_experiment(home / "config.yaml").experiment))
        best = {"epoch": 1, "val": {}, "test": {"top1": top1}}
        student = {"kind": "digits_cnn", "parameters": 7, "best": best, "last": best}
        runs.write_json(home / "summary.json", {"epochs": 1, "agreement": None, "student": student})
        info = {"role": "main", "status": "done", "created": "2030", "seed": 0, "group": None}
        runs.write_json(home / "run.json", info)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = app.run(["compare", *arguments])
        seen = capsys.readouterr()
        return code, seen.out, seen.err

    return call


def test_for_people_and_scripts(run):
    code, out, _ = run("x", "y")
    assert code == 0
    assert "runs/y/001" in out and "91.50" in out and "+1.50" in out and "configuration keys are the same" in out
    document = json.loads(run("x", "y", "--json")[1])
    assert document["ok"] and {"rows", "differences", "pareto", "same", "notes"} <= document.keys()
    assert document["rows"][1]["against_baseline"]["mean"] == 1.5
    assert document == json.loads(run("x", "y", "--format", "json")[1])


def test_formats(run):
    lines = run("x", "y", "--format", "md")[1].splitlines()
    assert lines[0].startswith("| what | student |") and lines[1].startswith("| --- | --- |")
    rows = list(csv.DictReader(io.StringIO(run("x", "y", "--format", "csv", "--baseline", "y")[1])))
    assert [(row["what"], row["mean"], row["difference"]) for row in rows] == [
        ("runs/y/001", "91.5", "-"),
        ("runs/x/001", "90.0", "-1.5"),
    ]
    assert run("x", "--format", "html")[1].startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("name", "begins"),
    [("a.md", "| what"), ("a.csv", "what,"), ("a.json", "{"), ("a.html", "<!DOCTYPE"), ("a.txt", "what  ")],
)
def test_a_file_has_the_format_of_its_ending(run, name, begins):
    assert run("x", "y", "-o", f"new/{name}")[:2] == (0, f"wrote new/{name}\n")
    text = Path("new", name).read_text()
    assert text.startswith(begins) and "runs/y/001" in text
    assert [p.name for p in Path("new").iterdir()] == [name]


def test_errors(run):
    code, _, err = run("x", "--format", "htm")
    assert code == 2 and "did you mean 'html'" in err
    code, _, err = run("x", "z")
    assert code == 4 and "there is no run at 'z'" in err
    assert run()[0] == 2
    Path("note.json").write_text("[]")
    code, _, err = run("note.json")
    assert code == 4 and "not the file of a group" in err
