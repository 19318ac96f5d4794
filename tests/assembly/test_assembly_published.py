"""Weights of a folder are refused where the data's texts were made into numbers by another tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kdctl.assembly.published import check_tokenizer
from kdctl.config.schema import ModelSpec
from kdctl.errors import ConfigError

OWN: dict[str, Any] = {
    "version": "1.0",
    "truncation": None,
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
}


def data(tokenizer: dict[str, Any] | None) -> Any:
    return SimpleNamespace(tokenizer=None if tokenizer is None else json.dumps(tokenizer))


def spec(folder: Path, kind: str = "bert", weights: str | None = None) -> Any:
    return ModelSpec(kind=kind, weights=str(folder) if weights is None else weights)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text(json.dumps(OWN))
    return tmp_path


def test_the_same_tokenizer_may_be_written_in_another_way(folder: Path) -> None:
    pairs = {**OWN["model"], "merges": [["a", "b"]]}
    check_tokenizer(spec(folder), data({"truncation": {"max_length": 8}, "model": pairs}))


@pytest.mark.parametrize("named", ["folder", "file", "pretrained"])
def test_another_tokenizer_is_refused(named: str, folder: Path) -> None:
    other = {**OWN, "model": {**OWN["model"], "vocab": {"b": 0, "a": 1, "ab": 2}}}
    asked = {
        "folder": spec(folder),
        "file": spec(folder / "model.safetensors"),
        "pretrained": spec(folder, f"huggingface:{folder}", "pretrained"),
    }[named]
    with pytest.raises(ConfigError, match="another tokenizer") as caught:
        check_tokenizer(asked, data(other))
    problem = caught.value.problems[0]
    assert problem.key == "weights" and f"data.tokenizer: {folder}" in str(problem.hint)
    check_tokenizer(asked, data(OWN))


def test_where_there_is_nothing_to_compare_with(folder: Path) -> None:
    check_tokenizer(spec(folder), data(None))
    check_tokenizer(ModelSpec(kind="bert"), data(OWN))
    check_tokenizer(ModelSpec(kind="torchvision:resnet18", weights="pretrained"), data(OWN))
    (folder / "tokenizer.json").unlink()
    check_tokenizer(spec(folder), data(OWN))


def test_a_damaged_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("[")
    with pytest.raises(ConfigError, match="no tokenizer"):
        check_tokenizer(spec(folder), data(OWN))
