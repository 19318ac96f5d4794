"""torchvision beside a CPU build of torch, and the models of torchvision and timm by name."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdctl import registry
from kdctl.errors import ConfigError, MissingError
from kdctl.models.record import ModelRecord, build_model, load_model, save_model
from kdctl.models.weights import load_weights


def record(kind: str, channels: int = 3, **arguments: object) -> ModelRecord:
    return ModelRecord(kind, arguments, 5, list("abcde"), [channels, 32, 32])


def test_a_torchvision_model_is_built_saved_and_loaded(tmp_path: Path) -> None:
    model = build_model(record("torchvision:resnet18", channels=1)).eval()
    assert type(model.net).__module__ == "torchvision.models.resnet"
    images = torch.rand(2, 1, 32, 32)
    save_model(model, tmp_path / "student")
    assert torch.equal(load_model(tmp_path)(images), model(images))
    assert torch.equal(copy.deepcopy(model)(images), model(images))


def test_the_guard_works_in_a_fresh_process_and_twice() -> None:
    code = """
from kdctl.torchvision_guard import ensure_torchvision
assert ensure_torchvision() is ensure_torchvision()
from torchvision import datasets, transforms
import torch
assert len(datasets.FakeData(3)) == 3
try:
    ensure_torchvision().ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
except RuntimeError as error:
    assert "ops" in str(error)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_published_weights_are_made_to_fit() -> None:
    from kdctl.models.torchvision_models import fit_published

    published = registry.create("models", "torchvision:resnet18", {}, num_classes=1000, in_channels=3).state_dict()
    net = registry.create("models", "torchvision:resnet18", {}, num_classes=5, in_channels=1)
    fitted = fit_published(published | {"aux1.weight": torch.zeros(1)}, net, 5)
    assert fitted.keys() == net.state_dict().keys()
    assert torch.equal(fitted["fc.weight"], net.fc.weight)
    assert torch.equal(fitted["layer1.0.conv1.weight"], published["layer1.0.conv1.weight"])
    grey = torch.rand(1, 1, 9, 9)
    seen = torch.nn.functional.conv2d(grey, fitted["conv1.weight"])
    torch.testing.assert_close(
        seen, torch.nn.functional.conv2d(grey.expand(1, 3, 9, 9), published["conv1.weight"]), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        ("torchvision:resnet81", {}, "did you mean 'resnet18'"),
        ("torchvision:fasterrcnn_resnet50_fpn", {}, "no classification model"),
        ("torchvision:resnet18", {"depth": 3}, "depth"),
    ],
)
def test_what_torchvision_does_not_have(kind: str, arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_model(record(kind, **arguments))


def test_offline_never_touches_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KDCTL_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("went to the network"))
    net = build_model(record("torchvision:mobilenet_v3_small")).net
    with pytest.raises(MissingError, match="offline"):
        load_weights(net, "pretrained")


def test_timm_is_an_extra() -> None:
    try:
        import timm  # noqa: F401
    except ImportError:
        with pytest.raises(MissingError, match=r"kdctl\[timm\]"):
            build_model(record("timm:mobilenetv3_small_100"))
        return
    model = build_model(record("timm:mobilenetv3_small_050", channels=1, drop_rate=0.1)).eval()
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 5)
    with pytest.raises(ConfigError, match="did you mean 'resnet18'"):
        build_model(record("timm:resnet_18"))
