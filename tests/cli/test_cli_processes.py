"""--nproc: what is refused before anything starts, and what is started."""

from __future__ import annotations

import sys

import pytest

from kdctl import launch
from kdctl.cli import app


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What `launch.start` was called with; nothing starts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("data: {kind: digits}\nstudent: {kind: digits_cnn}\n")
    calls = []
    monkeypatch.setattr(launch, "start", lambda *given: calls.append(given) or 7)
    return calls


def test_nproc_starts_this_very_command_and_hands_on_its_code(started, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kdctl", "train", "a.yaml", "--nproc", "3", "--json"])
    assert app.run(sys.argv[1:]) == 7
    assert started == [(3, [sys.executable, "-m", "kdctl", "train", "a.yaml", "--nproc", "3", "--json"])]
    assert capsys.readouterr().out == ""


def test_a_wrong_experiment_starts_nothing(started, capsys):
    assert app.run(["train", "a.yaml", "train.epochs=none", "--nproc", "3"]) == 3
    assert app.run(["resume", "nowhere", "--nproc", "3"]) == 4
    assert started == []


@pytest.mark.parametrize("arguments", [["--smoke", "--nproc", "2"], ["--nproc", "0"]])
def test_refused(started, capsys, arguments):
    assert app.run(["train", "a.yaml", *arguments]) == 2
    assert started == []


@pytest.mark.parametrize("verb", ["train", "resume"])
def test_nproc_under_torchrun_must_agree_with_it(verb, started, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    assert app.run([verb, "a.yaml", "--nproc", "3"]) == 2
    assert "--nproc is 3, and this is one of 2 processes already" in capsys.readouterr().err
    assert started == []
