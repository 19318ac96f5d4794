"""Deep mutual learning: every student has the terms, each taught by all others."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from method_runs import BASE, check_resumes, check_shipped_is_validated, first_batch, load, run_it, stop_and_resume
from method_runs import built as build_it
from torch import Tensor

from kdctl.errors import ConfigError
from kdctl.models.record import load_model

LOSSES = """
losses:
  - {kind: ce, name: ce}
  - {kind: kd, T: 2, weight: 0.5}
"""
TEXT = BASE + LOSSES + "method: {kind: mutual, peers: 2}\n"


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_s, p_t = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    return temperature**2 * F.kl_div(log_s, p_t, reduction="sum")


def test_each_student_has_the_terms_and_is_taught_by_the_others(tmp_path: Path) -> None:
    parts = build_it(tmp_path, TEXT)
    method, batch = parts.method, first_batch(parts)
    nets = [copy.deepcopy(net) for net in (method.student.net, *method.trained["peers"])]
    assert len(nets) == 3
    weights = [net.fc.weight for net in nets]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    method.train()
    got = method.step(batch, 0.0)
    inputs = (batch.inputs - method.student.mean) / method.student.std
    logits = [net.train()(inputs) for net in nets]
    for number, name in enumerate(["", ".peer2", ".peer3"]):
        others = [z for other, z in enumerate(logits) if other != number]
        ce = F.cross_entropy(logits[number], batch.targets, reduction="sum")
        torch.testing.assert_close(got[f"ce{name}"], ce)
        taught = (kl(logits[number], others[0], 2) + kl(logits[number], others[1], 2)) / 2
        torch.testing.assert_close(got[f"kd{name}"], taught)
    assert method.counts(batch).keys() == method.weights(0.0).keys() == got.keys()
    assert method.weights(0.0)["kd.peer3"] == 0.5


def test_a_teaching_peer_gets_no_gradient_from_those_it_teaches(tmp_path: Path) -> None:
    parts = build_it(tmp_path, TEXT)
    method = parts.method
    method.train()
    method.step(first_batch(parts), 0.0)["kd.peer2"].backward()
    own, *peers = [[p.grad for p in net.parameters()] for net in (method.student.net, *method.trained["peers"])]
    assert all(gradient is None for gradient in own + peers[1])
    assert any(gradient is not None and bool(gradient.any()) for gradient in peers[0])


def test_learnt_parts_are_a_students_own_and_train(tmp_path: Path) -> None:
    losses = "losses: [{kind: ce}, {kind: fitnet, taps: [layer2]}]\nmethod: {kind: dml}\n"
    parts = build_it(tmp_path, BASE + losses)
    method, batch = parts.method, first_batch(parts)
    adapters = [list(term.parameters()) for term in method.terms if "fitnet" in term.name]
    assert len(adapters) == 2 and all(adapters)
    assert not {id(p) for p in adapters[0]} & {id(p) for p in adapters[1]}
    before = [[p.detach().clone() for p in some] for some in adapters]
    method.train()
    torch.stack(list(method.step(batch, 0.0).values())).sum().backward()
    parts.optimizer.step()
    for some, old in zip(adapters, before, strict=True):
        assert any(not torch.equal(p, q) for p, q in zip(some, old, strict=True))


def test_micro_batches_do_not_change_the_loss(tmp_path: Path) -> None:
    text = TEXT.replace("digits_cnn, width: 4", "mlp, hidden: [8]")
    parts = build_it(tmp_path, text)
    batch = first_batch(parts)
    whole = parts.method.step(batch, 0.0)
    pieces = [parts.method.step(piece, 0.0) for piece in batch.micro_batches(4)]
    for name, value in whole.items():
        torch.testing.assert_close(torch.stack([piece[name] for piece in pieces]).sum(), value)


def test_it_trains_and_ships_the_first_student_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_it(tmp_path, TEXT, "data.limit=1200", "train.epochs=8", "optimizer.lr=0.03")
    lines = run.metrics()
    assert set(lines[0]["terms"]) == {f"{kind}{who}" for kind in ("ce", "kd") for who in ("", ".peer2", ".peer3")}
    assert lines[-1]["terms"]["ce"] < 0.5 * lines[0]["terms"]["ce"]
    assert lines[-1]["terms"]["ce.peer3"] < 0.5 * lines[0]["terms"]["ce.peer3"]
    check_shipped_is_validated(tmp_path, TEXT.replace("limit: 300", "limit: 1200"), run)
    assert sum(p.numel() for p in load_model(run / "student").parameters()) == 1182


def test_it_resumes_bit_identically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_resumes(tmp_path, TEXT, 7)
    stopped, whole = stop_and_resume(tmp_path, TEXT, 6)
    assert stopped == whole


def test_the_second_student_is_not_the_first(tmp_path: Path) -> None:
    """Started alike, they would have nothing to teach each other."""
    parts = build_it(tmp_path, TEXT)
    logits = parts.method.step(first_batch(parts), 0.0)
    assert logits["kd"].item() > 1e-3


def test_a_teacher_beside_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="teach each other") as caught:
        build_it(tmp_path, TEXT + "teacher: {kind: digits_cnn, control: true}\n")
    assert caught.value.problems[0].key == "teacher" and caught.value.problems[0].hint


def test_a_term_that_copies_a_classifier_of_the_teacher_is_refused(tmp_path: Path) -> None:
    losses = "losses: [{kind: ce}, {kind: srrl, taps: [flatten]}]\nmethod: {kind: mutual}\n"
    with pytest.raises(ConfigError, match="the teacher changes in training"):
        build_it(tmp_path, BASE + losses)


def test_the_config_needs_no_teacher(tmp_path: Path) -> None:
    assert load(tmp_path, TEXT).train_stages[0].teachers == []


def test_only_terms_that_reach_the_student_have_a_share_of_its_gradient(tmp_path: Path) -> None:
    line = run_it(tmp_path, TEXT, "train.epochs=1").metrics()[-1]
    assert {"ce", "kd", "ce.peer2", "kd.peer3"} <= line["terms"].keys()
    assert line["gradient_shares"].keys() == {"ce", "kd"} and sum(line["gradient_shares"].values()) == pytest.approx(1)
