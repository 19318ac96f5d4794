"""Published weights reach their published accuracies: architecture, weights loading, normalisation and data are exact.

Needs the weights under KDCTL_SHARED_DATA (by default ../shared/data beside the repository) and CIFAR under KDCTL_CIFAR
(by default ~/.cache/kdctl-tests, where it is restored once if the shared data and imagecodecs are there).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdctl import build
from kdctl.config.expand import load_experiment
from kdctl.evaluate import TorchPredictor, metrics, predict

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("KDCTL_SHARED_DATA", ROOT.parent / "shared" / "data"))
CACHE = Path(os.environ.get("KDCTL_CIFAR", "~/.cache/kdctl-tests")).expanduser()
FILES = {"cifar10": "cifar-10-batches-py/test_batch", "cifar100": "cifar100.npz"}


def restored(name: str) -> Path:
    """The folder with the data set, restored if need be."""
    folder, script = CACHE / name, SHARED / "vision" / "restore_cifar.py"
    if not (folder / FILES[name]).is_file():
        if not script.is_file():
            pytest.skip(f"{name} is neither in {folder} nor can it be restored from {SHARED}")
        pytest.importorskip("imagecodecs", reason="restoring CIFAR needs imagecodecs")
        subprocess.run([sys.executable, str(script), name, str(folder)], check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "net", "weights", "accuracy"),
    [
        ("cifar10", "resnet20", "resnet20-12fca82f.th", 91.73),
        ("cifar10", "resnet56", "resnet56-4bfd9763.th", 93.39),
        ("cifar100", "resnet20", "cifar100_resnet20.pth", 68.83),
        ("cifar100", "resnet56", "cifar100_resnet56.pth", 72.63),
    ],
)
def test_pretrained_accuracy(data: str, net: str, weights: str, accuracy: float) -> None:
    path = SHARED / "weights" / weights
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    overrides = [f"data.root={restored(data)}", f"student.weights={path}"]
    experiment = load_experiment(ROOT / "configs" / data / f"{net}_pretrained.yaml", overrides).experiment
    samples = build.build_data(experiment)
    model = build.build_model(experiment.student, samples, "student")
    assert samples.test is not None
    said = predict(TorchPredictor(model), samples.test, build.build_task(experiment), experiment.data.eval_batch_size)
    assert len(said.targets) == 10_000
    assert metrics(said, build.build_task(experiment))["top1"] == pytest.approx(accuracy, abs=0.005)
