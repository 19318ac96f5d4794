"""Corruptions against scipy and their definitions; their levels; the rows of two models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from kdctl.analysis.robustness import corrupt, corruptions, measure_robustness
from kdctl.analysis.samples import some_of
from kdctl.data.base import ArraySplit
from kdctl.evaluate import TorchPredictor
from kdctl.models.record import ModelRecord, build_model
from kdctl.signals import IGNORE, Batch
from kdctl.tasks.classification import Classification, top1


def batch(count: int = 3, side: int = 16, channels: int = 3, first: int = 0) -> Batch:
    images = torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(first))
    index = torch.arange(first, first + count)
    return Batch(images, torch.zeros(count, dtype=torch.long), index, torch.full_like(index, -1))


@pytest.mark.parametrize("sigma", [0.4, 0.7, 1.0])
def test_blur_is_that_of_scipy(sigma: float) -> None:
    given = batch()
    expected = gaussian_filter(given.inputs.numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4.0)
    assert np.allclose(corrupt(given, "blur", sigma).numpy(), expected, atol=1e-5)


def test_contrast_draws_to_the_mean_of_each_channel() -> None:
    given = batch()
    mean = given.inputs.mean((2, 3), keepdim=True)
    assert torch.allclose(corrupt(given, "contrast", 0.3), 0.3 * given.inputs + 0.7 * mean)


def test_noise_is_gaussian_and_a_matter_of_the_sample_alone() -> None:
    given = batch(40, 16, 3)
    given.inputs = torch.full_like(given.inputs, 0.5)
    noise = (corrupt(given, "noise", 0.08) - 0.5) / 0.08
    assert noise.mean().item() == pytest.approx(0, abs=0.02) and noise.std().item() == pytest.approx(1, abs=0.02)
    assert (noise**4).mean().item() == pytest.approx(3, abs=0.15)
    rows = noise.flatten(1)
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 0.25
    other = batch(40, 16, 3)
    other.inputs = torch.full_like(other.inputs, 0.5)
    picked = other.take(torch.tensor([7, 2]))
    assert torch.equal(corrupt(picked, "noise", 0.08), corrupt(given, "noise", 0.08)[[7, 2]])
    assert torch.allclose((corrupt(given, "noise", 0.04) - 0.5) * 2, corrupt(given, "noise", 0.08) - 0.5, atol=1e-6)
    bright = batch()
    assert corrupt(bright, "noise", 2.0).min() >= 0 and corrupt(bright, "noise", 2.0).max() <= 1


def test_levels_by_the_size_of_the_image() -> None:
    small, cifar, large = (corruptions(side) for side in (8, 32, 224))
    assert len(cifar) == 16 and cifar[0] == ("none", 0, 0) and small == cifar
    assert cifar[1:6] == [("noise", i, s) for i, s in enumerate((0.04, 0.06, 0.08, 0.09, 0.10), 1)]
    assert [level for name, _, level in cifar if name == "blur"] == [0.4, 0.6, 0.7, 0.8, 1.0]
    assert [level for name, _, level in cifar if name == "contrast"] == [0.75, 0.5, 0.4, 0.3, 0.15]
    assert [level for name, _, level in large if name == "blur"] == pytest.approx([2.8, 4.2, 4.9, 5.6, 7.0])
    assert [row for row in large if row[0] != "blur"] == [row for row in cifar if row[0] != "blur"]


def test_some_samples_are_stratified_labelled_and_the_same_every_time() -> None:
    targets = torch.tensor([0] * 60 + [1] * 30 + [IGNORE] * 10)
    split = ArraySplit(torch.zeros(100, 1, 2, 2, dtype=torch.uint8), targets)
    some = some_of(split, 30)
    assert torch.bincount(some.targets).tolist() == [20, 10]
    assert torch.equal(some.index, some_of(split, 30).index) and some.index.tolist() == sorted(some.index.tolist())
    assert len(some_of(split)) == 90


def test_rows_of_student_and_teacher() -> None:
    torch.manual_seed(0)
    student, one, two = (
        build_model(ModelRecord("digits_cnn", {"width": w}, 10, list("0123456789"), [1, 8, 8])).eval()
        for w in (2, 3, 4)
    )
    images = torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8)
    mean = TorchPredictor(student)(images.numpy().astype(np.float32) / 255).mean(0)
    student.net.fc.bias.data -= torch.from_numpy(mean)  # type: ignore[union-attr, operator]  # all classes are chosen
    answers = torch.from_numpy(TorchPredictor(student)(images.numpy().astype(np.float32) / 255).argmax(1))
    split = ArraySplit(images, answers)  # the clean images are all right
    rows = measure_robustness(student, [one, two], split, Classification(), 16)
    said = [TorchPredictor(m)(images.numpy().astype(np.float32) / 255) for m in (student, one, two)]
    assert rows[0] == {
        "corruption": "none", "severity": 0, "level": 0.0, "student": top1(said[0], split.targets),
        "teacher": top1((said[1] + said[2]) / 2, split.targets),
    }  # fmt: skip
    assert len(rows) == 16 and rows[0]["student"] == 100 > min(row["student"] for row in rows)
    alone = measure_robustness(student, [], split, Classification(), 50)
    assert [row["student"] for row in alone] == [row["student"] for row in rows]
    assert all(row["teacher"] is None for row in alone)
