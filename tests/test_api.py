"""The verbs from Python: the same documents as on the command line, and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kdctl import api
from kdctl.cli import app
from kdctl.errors import ConfigError, MissingError, UsageError

FILE = """
name: small
data: {kind: digits, limit: 200}
student: {kind: digits_cnn, width: 4}
train: {epochs: 1, threads: 1}
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(FILE)


def test_it_gives_what_the_command_line_prints(capsys: pytest.CaptureFixture[str]) -> None:
    trained = api.train("small.yaml", "train.seed=3")
    assert not any(capsys.readouterr())
    measured = api.evaluate()
    assert app.run(["eval", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert measured["metrics"] == printed["metrics"] == trained["student"]["best"]["test"]
    student = api.load_student()
    assert not student.training and student(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    same = api.load_student(Path(trained["run"], "student.safetensors"))
    assert all(one.equal(other) for one, other in zip(student.parameters(), same.parameters(), strict=True))
    group = api.train("small.yaml", seeds=2, controls=["label_smoothing"])
    assert [row["seed"] for row in group["seeds"]] == [0, 1] and "label_smoothing" in group["summary"]["controls"]


def test_what_is_wrong_is_an_error_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"override 1: train\.epochs: got 'many'"):
        api.train("small.yaml", "train.epochs=many")
    with pytest.raises(MissingError, match="no run"):
        api.evaluate("other")
    with pytest.raises(UsageError, match="no stage"):
        api.compress()
    with pytest.raises(UsageError, match="one run"):
        api.train("small.yaml", seeds=2, run_dir="x")
    assert not Path("runs").exists() and not Path("x").exists()
