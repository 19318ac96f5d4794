"""What tests of single verbs share: a folder to stand in, and commands as a user types them."""

from __future__ import annotations

import json

import pytest

from kdctl.cli import app


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        code = app.run(arguments)
        seen = capsys.readouterr()
        return code, seen.out, seen.err

    return call


@pytest.fixture
def document(run):
    """The JSON document of a command that must succeed."""

    def call(*arguments: str) -> dict:
        code, out, err = run(*arguments, "--json")
        assert code == 0, out + err
        return json.loads(out)

    return call
