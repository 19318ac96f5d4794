"""Targets of a plug-in and of an installed module: made, opened and measured like those of the package."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from kdctl import registry
from kdctl.errors import ConfigError, MissingError
from kdctl.export import files
from kdctl.export.one_layer import attempt

MODULE = '''
from kdctl.export.torchscript import TorchScript, TorchScriptPredictor


class Theirs(TorchScript):
    """The same as torchscript."""

    target = "theirs"


class Opened(TorchScriptPredictor):
    """Says who opened it."""

    def __init__(self, path, threads=None):
        super().__init__(path, threads)
        self.runtime = "theirs 1.0"


def open_predictor(path, threads=None):
    return Opened(path, threads)
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed module with an exporter."""
    (tmp_path / "kdctl_theirs.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_target_of_a_plugin_is_opened_by_its_own_module(module: None, monkeypatch: pytest.MonkeyPatch) -> None:
    point = SimpleNamespace(name="theirs", value="kdctl_theirs:Theirs", dist=SimpleNamespace(name="kdctl-theirs"))
    points = {group: [point] if group == "exporters" else [] for group in registry.GROUPS}
    monkeypatch.setattr(registry, "_entry_points", lambda: points)
    assert files.opener("theirs") == "kdctl_theirs:open_predictor"
    assert attempt("theirs") == "theirs 1.0 runs a one-layer model"


def test_a_class_of_an_installed_module_is_a_target(module: None) -> None:
    assert files.opener("kdctl_theirs:Theirs") == "kdctl_theirs:open_predictor"
    assert files.opener("onnx") == "kdctl.export.onnx:open_predictor"
    with pytest.raises(MissingError, match="no installed runtime opens 'onx' files"):
        files.opener("onx")


def test_a_file_beside_an_experiment_is_no_target(tmp_path: Path) -> None:
    """What opens its files is imported by name, in other processes and wherever the run has moved to."""
    (tmp_path / "mine.py").write_text(MODULE)
    with pytest.raises(ConfigError, match=r"no exporter './mine\.py:Theirs'; .* of your own as package\.module:Class"):
        registry.find("exporters", "./mine.py:Theirs", tmp_path)
