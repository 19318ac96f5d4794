"""The main job on the command line: train, eval, compress, resume, with their documents and exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kdctl.cli import app

FILE = """
name: job
data: {kind: digits, limit: 300}
teacher: {kind: digits_cnn, width: 8, train: {epochs: 4}}
student: {kind: digits_cnn, width: 4}
distill: {T: 4, alpha: 0.9}
optimizer: {kind: adamw, lr: 0.01}
train: {epochs: 2, device: cpu, threads: 1}
"""


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs one command line in an empty directory that holds job.yaml: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(FILE)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = app.run(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def document(result: tuple[int, str, str], code: int = 0) -> dict[str, Any]:
    assert result[0] == code, result[2]
    parsed = json.loads(result[1])
    assert parsed["schema_version"] == 1 and parsed["ok"] is (code == 0)
    return parsed


def test_the_three_commands_and_their_documents(call: Any) -> None:
    trained = document(call("train", "job.yaml", "--json"))
    assert trained["status"] == "done" and trained["run"] == "runs/job/001" and trained["epochs"] == 2
    for key in ("seconds", "samples_per_second", "precision", "threads", "agreement", "baseline", "group"):
        assert key in trained
    student = trained["student"]
    assert student["kind"] == "digits_cnn" and student["parameters"] == 1182
    assert set(student["best"]) == {"epoch", "val", "test"} and "top1" in student["best"]["test"]
    assert "top1" in student["last"]["test"] and "top1" in trained["teacher"]["test"]

    measured = document(call("eval", "--json"))  # with no run named: the latest one
    assert measured["run"].endswith("runs/job/001") and measured["samples"] == 500
    assert measured["metrics"] == student["best"]["test"] and measured["agreement"] == trained["agreement"]
    assert [row["name"] for row in measured["per_class"]] == [str(digit) for digit in range(10)]
    last = document(call("eval", "latest", "--checkpoint", "last", "--json"))
    assert last["metrics"] == student["last"]["test"]
    assert document(call("eval", "--split", "val", "--json"))["samples"] == 130

    small = document(call("compress", "--quantize", "int8", "--min-speedup", "1000", "--json"), 6)
    assert small["errors"][0]["message"].startswith("min_speedup")
    assert set(small) >= {"artefact", "variant", "runtime", "before", "same_runtime", "after", "gates", "notes"}
    again = document(call("eval", small["artefact"], "--json"))
    assert again["metrics"] == small["after"]["metrics"]
    _measuring_refuses_what_it_would_ignore(call, small["artefact"])
    code, out, _ = call("list", "runs")
    assert code == 0 and "job/001" in out


def _measuring_refuses_what_it_would_ignore(call: Any, artefact: str) -> None:
    asked = ("student.width=3", "data.eval_batch_size=100", "data.batch_size=100", "train.device=cpu", "name=b")
    refused = document(call("eval", "--json", *asked), 3)["errors"]
    assert [each["key"] for each in refused] == ["student.width", "data.batch_size", "train.device", "name"]
    assert [each["file"] for each in refused] == ["override 1", "override 3", "override 4", "override 5"]
    assert refused[1]["hint"] == "data.eval_batch_size" and refused[2]["hint"] == "--device"
    teacher = "stages.student.teacher.control=true"
    assert document(call("eval", "--json", "--device", "cpu", teacher, "data.split_seed=0"))["agreement"] is not None
    assert document(call("eval", "--json", teacher.replace("student", "1", 1)))["agreement"] is not None
    assert document(call("eval", artefact, "--json", teacher), 3)["errors"][0]["key"] == teacher.partition("=")[0]


def test_a_gate_in_the_file_fails_the_command_and_keeps_the_run(call: Any) -> None:
    gated = document(
        call("train", "job.yaml", "compress=[{kind: quantize, min_speedup: 1000}]", "train.epochs=1", "--json"), 6
    )
    assert gated["status"] == "done" and gated["errors"][0]["message"].startswith("min_speedup")
    assert Path(gated["artefacts"][0]["artefact"], "model.onnx").is_file()


def test_errors_have_their_codes(call: Any) -> None:
    assert call("train", "job.yaml", "losses.kd.temprature=2")[0] == 3
    assert call("train", "nowhere.yaml")[0] == 4
    assert call("eval")[0] == 4 and call("resume")[0] == 4 and call("compress", "--quantize", "int8")[0] == 4
    assert call("train", "job.yaml", "--run-dir", "x", "--seeds", "2")[0] == 2
    assert not Path("runs").exists()
    code, out, _ = call("train", "job.yaml", "optimizer.lr=1e30", "schedule.kind=constant", "--json")
    assert document((code, out, ""), 7)["errors"][0]["key"] == "losses"


def test_a_recipe_that_is_no_list_of_stages_is_refused(call: Any) -> None:
    assert call("train", "job.yaml", "train.epochs=1", "-q")[0] == 0
    Path("recipe.yaml").write_text("compress: [quantize]\n")
    code, _, err = call("compress", "--recipe", "recipe.yaml", "--max-drop", "1")
    assert code == 3 and "recipe.yaml:1" in err
    assert call("eval", "--device", "cuda:77")[0] == 4
    assert call("eval", "--split", "valid")[0] == 4


def test_a_named_directory_is_used_once(call: Any) -> None:
    assert call("train", "job.yaml", "train.epochs=1", "--run-dir", "mine", "-q")[2] == ""
    code, _, err = call("train", "job.yaml", "--run-dir", "mine")
    assert code == 2 and "never overwritten" in err
    assert call("resume", "mine")[0] == 1


def test_smoke_leaves_nothing_behind(call: Any) -> None:
    assert document(call("train", "job.yaml", "--smoke", "--json"))["stages"] == ["teacher", "student"]
    assert not Path("runs").exists()


def test_what_shows_only_at_the_start_still_has_its_line(call: Any) -> None:
    text = "losses:\n  - {kind: ce}\n  - {kind: logit_mse, weight: 0.5}\n  - {kind: fitnet, taps: [layer9]}\n"
    Path("job.yaml").write_text(FILE.replace("distill: {T: 4, alpha: 0.9}\n", text))
    code, _, err = call("train", "job.yaml", "teacher={kind: digits_cnn, width: 8, control: true}")
    assert code == 3 and "layer9" in err and "job.yaml:" in err
    Path("broken.py").write_text(
        "from kdctl.losses.base import Loss\n\n\nclass Broken(Loss):\n"
        "    def forward(self, student, teacher, batch):\n        return student.rows().detach().sum()\n"
    )
    Path("job.yaml").write_text(FILE.replace("distill: {T: 4, alpha: 0.9}\n", text.replace(
        "{kind: fitnet, taps: [layer9]}", "{kind: './broken.py:Broken', name: mine}")))  # fmt: skip
    code, _, err = call("train", "job.yaml", "teacher={kind: digits_cnn, width: 8, control: true}")
    assert code == 3 and "job.yaml:9: losses.mine: no gradient" in err
