"""sparse: the zeros come by the schedule, stay in every step, and are in what ships; resuming is exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from method_runs import BASE, built, check_resumes, check_shipped_is_validated, first_batch, run_it
from safetensors.torch import load_file

from kdctl.errors import ConfigError, KdctlError
from kdctl.methods.masks import cubic
from kdctl.methods.sparse import Sparse


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


TEXT = BASE + "method: {kind: sparse, sparsity: 0.8, end: 0.5, every: 2}\nlosses: [{kind: ce}]\n"


def zeros(folder: Path) -> float:
    weights = [w for name, w in load_file(folder / "student.safetensors").items() if w.dim() > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def test_what_ships_is_sparse_and_was_validated_so(tmp_path):
    run = run_it(tmp_path, TEXT)
    assert zeros(Path(str(run))) == pytest.approx(0.8, abs=0.002)
    check_shipped_is_validated(tmp_path, TEXT, run)
    lines = run.metrics()
    assert not lines[0]["best"]  # an epoch before the end of the schedule


def test_averaged_weights_get_the_zeros_too(tmp_path):
    run = run_it(tmp_path, TEXT, "train.ema=0.9")
    assert zeros(Path(str(run))) == pytest.approx(0.8, abs=0.002)


def test_averaged_weights_are_validated_with_their_zeros(tmp_path):
    text = TEXT.replace("end: 0.5", "end: 0.6")
    run = run_it(tmp_path, text, "train.ema=0.99")
    check_shipped_is_validated(tmp_path, text, run)


def test_zeros_come_by_the_schedule_and_stay(tmp_path):
    parts = built(tmp_path, TEXT)
    method = parts.method
    assert isinstance(method, Sparse)
    steps = 3 * len(parts.loader)
    batch, optimizer = first_batch(parts), torch.optim.SGD(method.student.parameters(), lr=0.1, momentum=0.9)
    gone: dict[str, torch.Tensor] = {}
    for step in range(steps):
        method.begin_step(batch, step / len(parts.loader))
        weights = {path: w.detach() for path, w in method._weights.items()}
        share = sum(int((w == 0).sum()) for w in weights.values()) / sum(w.numel() for w in weights.values())
        assert share == pytest.approx(cubic(0.8, step, 0, steps / 2), abs=0.002)
        assert all(bool((weights[path][mask] == 0).all()) for path, mask in gone.items())
        gone = {path: w == 0 for path, w in weights.items()}
        sum(method.step(batch, 0.0).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.end_step()
        assert all(bool((method._weights[path][mask] == 0).all()) for path, mask in gone.items())
        assert method.ready() == (step >= steps / 2)


def test_resuming_is_exact(tmp_path):
    check_resumes(tmp_path, TEXT, 8)  # in the second epoch, from the checkpoint after the first


def test_a_training_that_ends_too_early_is_refused(tmp_path):
    with pytest.raises(KdctlError, match="as sparse as asked"):
        built(tmp_path, TEXT).method.finalize()


def test_a_pattern_and_a_schedule_that_runs_backwards(tmp_path):
    run = run_it(tmp_path, TEXT, "method.pattern=2:4", "method.end=1.0")
    weight = load_file(Path(str(run)) / "student.safetensors")["layer2.conv.weight"]
    assert bool(((weight.view(8, 1, 4, 3, 3) != 0).sum(2) == 2).all())
    with pytest.raises(ConfigError, match="before begin"):
        Sparse(begin=0.5, end=0.2)
