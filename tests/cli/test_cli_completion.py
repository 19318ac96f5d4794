"""Completion, asked in a process of its own as a shell asks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdctl.cli import app, completion

_HARNESS = """
import json, sys
from kdctl.__main__ import main
sys.argv = ["kdctl"]
try:
    main()
finally:
    json.dump(sorted({name.split(".")[0] for name in sys.modules}), open("modules.json", "w"))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with two runs, an artefact, a group, and experiment files."""
    home = tmp_path_factory.mktemp("completion")
    for place in ("a/001", "a/002", "b/001"):
        (home / "runs" / place).mkdir(parents=True)
        (home / "runs" / place / "run.json").touch()
    for file in ("runs/b/001/artefacts/int8/manifest.json", "runs/a/groups/001.json", "exp.yaml", "more/two.yml"):
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).touch()
    return home


def ask(home: Path, **environment: str) -> tuple[list[str], subprocess.CompletedProcess]:
    found = subprocess.run(
        [sys.executable, "-c", _HARNESS],
        cwd=home,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return found.stdout.split("\n")[:-1], found


def bash(home: Path, *words: str) -> list[str]:
    """What bash is offered for the last word; empty lines are what it ignores."""
    line = " ".join(["kdctl", *words])
    lines, found = ask(home, _KDCTL_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words)))
    assert found.stderr == "", found.stderr
    return [word for word in lines if word]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("comp",), ["compress", "compare"]),
        (("eval", "--ch"), ["--checkpoint"]),
        (("resume", ""), ["latest", "a", "b", "runs/a/001", "runs/a/002", "runs/b/001"]),
        (("bench", "a", "runs/b/"), ["runs/b/001", "runs/b/001/artefacts/int8"]),
        (("compare", "runs/a/g"), ["runs/a/groups/001.json"]),
        (("train", ""), ["exp.yaml", "more/", "runs/"]),
        (("train", "more/t"), ["more/two.yml"]),
        (("explain", "attention_t"), ["attention_transfer"]),
        (("explain", "losses.dk"), ["losses.dkd"]),
        (("list", "los"), ["losses"]),
        (("list", "losses", "attention_"), ["attention_transfer", "attention_mse", "attention_kl"]),
        (("init", "quick"), ["quickstart"]),
        (("export", "--to", "onnx,open"), ["onnx,openvino"]),
        (("cache", "b"), ["build"]),
        (("nonsense", "x"), []),
    ],
)
def test_words(home, words, expected):
    assert bash(home, *words) == expected


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_told_what_a_word_is_without_anything_heavy(home, shell):
    environment = {"_KDCTL_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": "kdctl explain dk"}
    lines, found = ask(home, **environment, _TYPER_COMPLETE_FISH_ACTION="get-args")
    assert "dkd" in "".join(lines) and "KL" in "".join(lines) and found.stderr == ""
    modules = set(json.loads((home / "modules.json").read_text()))
    assert "typer" in modules and not modules & {"torch", "numpy", "pydantic", "yaml", "rich", "torchvision"}
    assert not modules & {"email", "socket"}  # of importlib.metadata and of several processes


def test_bash_itself_completes(home):
    """The script that is shown, sourced by a real bash."""
    script = 'eval "$("$1" -m kdctl --show-completion bash)"; kdctl() { "$P" -m kdctl; }; P=$1\n'
    script += 'COMP_WORDS=(kdctl resu); COMP_CWORD=1; _kdctl_completion "$2"; echo "${COMPREPLY[@]}"'
    (home / "kdctl").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m kdctl "$@"\n')
    (home / "kdctl").chmod(0o755)
    found = subprocess.run(
        ["bash", "-c", script, "bash", sys.executable, "./kdctl"], cwd=home, capture_output=True, text=True, timeout=60
    )
    assert found.stdout == "resume\n", found.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(shell, capsys):
    assert app.run(["--show-completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"_KDCTL_COMPLETE=complete_{shell}" in script


def test_an_unknown_shell(capsys):
    assert app.run(["--show-completion", "bsh"]) == 2
    assert "did you mean 'bash'" in capsys.readouterr().err


def test_installing_touches_only_the_home(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert app.run(["--install-completion", "fish"]) == 0
    file = tmp_path / ".config/fish/completions/kdctl.fish"
    assert file.is_file() and str(file) in capsys.readouterr().out


def test_every_source_belongs_to_a_parameter_and_never_raises(monkeypatch):
    for key in completion._SOURCES:
        verb, _, name = key.rpartition(".")
        complete = completion.of(verb or "any", name)
        assert complete is not None
        assert isinstance(complete(None, "x"), list)
