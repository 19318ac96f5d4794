"""ONE: branches over a shared trunk, taught by their gated ensemble."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from method_runs import BASE, LOOSE, check_resumes, check_shipped_is_validated, first_batch, run_it, stop_and_resume
from method_runs import built as build_it
from torch import nn

from kdctl.errors import ConfigError
from kdctl.models.record import load_model

LOSSES = "losses: [{kind: ce, name: ce}, {kind: kd, T: 3, weight: 0.7}]\n"
TEXT = BASE + LOSSES + "method: {kind: one}\n"


def test_the_losses_are_those_of_the_paper(tmp_path: Path) -> None:
    parts = build_it(tmp_path, TEXT)
    method, batch = parts.method, first_batch(parts)
    net = copy.deepcopy(method.student.net).train()
    tails, gate = copy.deepcopy(method.trained["branches"]).train(), copy.deepcopy(method.trained["gate"]).train()
    linear, norm = (next(m for m in gate.modules() if isinstance(m, kind)) for kind in (nn.Linear, nn.BatchNorm1d))
    method.train()
    got = method.step(batch, 0.0)
    x = (batch.inputs - method.student.mean) / method.student.std
    shared = net.layer2(net.layer1(net.relu(net.bn1(net.conv1(x)))))
    weights = F.softmax(F.relu(norm(linear(shared.mean((2, 3))))), 1)
    logits = [net.fc(net.layer3(shared).mean((2, 3))), *(tail(shared) for tail in tails)]
    assert len(logits) == 3
    ensemble = sum(weights[:, i, None] * z for i, z in enumerate(logits))
    target = F.softmax(ensemble.detach() / 3, 1)
    for name, z in zip(["", ".branch2", ".branch3"], logits, strict=True):
        torch.testing.assert_close(got[f"ce{name}"], F.cross_entropy(z, batch.targets, reduction="sum"))
        kl = 9 * F.kl_div(F.log_softmax(z / 3, 1), target, reduction="sum")
        torch.testing.assert_close(got[f"kd{name}"], kl)
    torch.testing.assert_close(got["ce.ensemble"], F.cross_entropy(ensemble, batch.targets, reduction="sum"))
    assert "kd.ensemble" not in got
    assert method.counts(batch).keys() == method.weights(0.0).keys() == got.keys()


def test_branches_differ_and_distillation_does_not_move_the_gate(tmp_path: Path) -> None:
    parts = build_it(tmp_path, TEXT)
    method = parts.method
    heads = [method.student.net.fc.weight, *(tail.fc.weight for tail in method.trained["branches"])]
    assert len({float(head.detach().sum()) for head in heads}) == 3
    method.train()
    sums = method.step(first_batch(parts), 0.0)
    gate = list(method.trained["gate"].parameters())
    taught = torch.autograd.grad(sums["kd.branch2"], gate, retain_graph=True, allow_unused=True)
    assert all(gradient is None for gradient in taught)
    assert any(bool(g.any()) for g in torch.autograd.grad(sums["ce.ensemble"], gate))


def test_the_ramp_is_a_sigmoid_over_so_many_epochs(tmp_path: Path) -> None:
    parts = build_it(tmp_path, TEXT, "method.rampup_epochs=4")
    for epoch in (0.0, 1.0, 3.5, 4.0, 9.0):
        t = min(epoch / 4, 1.0)
        weights = parts.method.weights(epoch)
        assert weights["kd.branch3"] == pytest.approx(0.7 * math.exp(-5 * (1 - t) ** 2))
        assert weights["ce.ensemble"] == 1.0


def test_a_branch_that_starts_in_place_leaves_the_others_alone(tmp_path: Path) -> None:
    parts = build_it(tmp_path, TEXT, "method.at=relu", "method.branches=2")
    method, batch = parts.method, first_batch(parts)
    net, tail = copy.deepcopy(method.student.net).eval(), copy.deepcopy(method.trained["branches"][0]).eval()
    method.trained.eval()
    got = method.step(batch, 0.0)
    x = (batch.inputs - method.student.mean) / method.student.std
    other = tail(net.bn1(net.conv1(x)).clone())
    torch.testing.assert_close(got["ce.branch2"], F.cross_entropy(other, batch.targets, reduction="sum"))
    torch.testing.assert_close(got["ce"], F.cross_entropy(net(x), batch.targets, reduction="sum"))


def test_it_trains_and_ships_one_branch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_it(tmp_path, TEXT, "data.limit=1200", "train.epochs=8", "optimizer.lr=0.03")
    lines = run.metrics()
    for name in ("ce", "ce.branch3", "ce.ensemble"):
        assert lines[-1]["terms"][name] < 0.5 * lines[0]["terms"][name]
    check_shipped_is_validated(tmp_path, TEXT.replace("limit: 300", "limit: 1200"), run)
    assert sum(p.numel() for p in load_model(run / "student").parameters()) == 1182


def test_it_resumes_bit_identically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_resumes(tmp_path, TEXT, 7)
    stopped, whole = stop_and_resume(tmp_path, TEXT, 6)
    assert stopped == whole


@pytest.mark.parametrize(
    ("change", "key", "said"),
    [
        ("method.at=layer9", "method.at", "no part 'layer9'"),
        ("method.at=layer1.conv", "method.at", "no part 'layer1.conv'"),
        ("method.at=conv1", "method.at", "share nothing"),
        ("method.branches=1", "method.branches", "nobody to learn from"),
        ("student={kind: './loose.py:Loose'}", "student", "no sequential net"),
        ("teacher={kind: digits_cnn, control: true}", "teacher", "a teacher is given too"),
        ("losses=[{kind: ce}, {kind: at, taps: [layer1]}]", "losses", "logits alone"),
    ],
)
def test_what_cannot_work_is_refused(change: str, key: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "loose.py").write_text(LOOSE)
    change = change.replace("./loose.py", str(tmp_path / "loose.py"))
    with pytest.raises(ConfigError, match=said) as caught:
        build_it(tmp_path, TEXT, change)
    assert caught.value.problems[0].key == key and caught.value.problems[0].hint


def test_a_batch_of_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="normalises over the samples of a batch") as caught:
        build_it(tmp_path, TEXT.replace("batch_size: 64", "batch_size: 1"))
    assert caught.value.problems[0].key == "data.batch_size"
