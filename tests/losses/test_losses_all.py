"""What holds for every loss of the table; a new one joins by itself."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import case
from torch import Tensor

import kdctl.losses
from kdctl import registry
from kdctl.losses.base import Loss
from kdctl.signals import Batch, Signals

KINDS = sorted(kdctl.losses.LOSSES)

Example = Callable[..., tuple[Signals, Signals, Batch]]
Build = Callable[..., Loss]


def _leaves(student: Signals) -> list[Tensor]:
    return [student.logits, *student.features.values()]


def _gradients(value: Tensor, student: Signals) -> list[Tensor]:
    found = torch.autograd.grad(value, _leaves(student), allow_unused=True)
    return [g for g in found if g is not None]


@pytest.mark.parametrize("kind", KINDS)
class TestEveryLoss:
    def test_gradient_is_that_of_finite_differences(self, kind: str, example: Example, build: Build) -> None:
        given = case(kind)
        student, teacher, batch = example(size=3, student=given.student, teacher=given.teacher, positive=given.positive)
        loss = build(kind, (student, teacher, batch), **given.arguments)

        def value(logits: Tensor, *leaves: Tensor) -> Tensor:
            features = dict(zip(student.features, leaves[: len(student.features)], strict=True))
            return loss(Signals(logits, features=features), teacher, batch)

        places = {"logits": student.logits, **student.features, **dict(loss.named_parameters())}
        for name in given.constant:
            places[name].requires_grad_(False)
        trained = [p for p in loss.parameters() if p.requires_grad]
        assert torch.autograd.gradcheck(value, (*_leaves(student), *trained))

    def test_value_at_the_teacher(self, kind: str, example: Example, build: Build) -> None:
        given = case(kind)
        student, _, batch = example(student=given.equal, teacher=given.equal, positive=given.positive)
        loss = build(kind, (student, student, batch), **given.arguments)
        value = loss(student, student, batch)
        assert value.isfinite()
        if given.at_teacher == given.at_teacher:
            assert value.item() == pytest.approx(given.at_teacher, abs=1e-9)

    def test_micro_batches_add_up(self, kind: str, example: Example, build: Build) -> None:
        given = case(kind)
        student, teacher, batch = example(size=5, student=given.equal, teacher=given.equal, positive=given.positive)
        loss = build(kind, (student, teacher, batch), **given.arguments)
        if loss.batchwise:
            pytest.skip("defined on the batch as a whole")
        total, count = torch.zeros((), dtype=torch.float64), 0
        for rows in (slice(0, 2), slice(2, 3), slice(3, 5)):
            part = [
                Signals(s.logits[rows], features={tap: f[rows] for tap, f in s.features.items()})
                for s in (student, teacher)
            ]
            total = total + loss(part[0], part[1], batch.take(rows))
            count += int(loss.count(batch.take(rows)))
        torch.testing.assert_close(total, loss(student, teacher, batch), rtol=1e-12, atol=0)
        assert count == int(loss.count(batch)) > 0

    def test_values_are_of_each_unit(self, kind: str, example: Example, build: Build) -> None:
        given = case(kind)
        student, teacher, batch = example(size=3, student=given.equal, teacher=given.equal, positive=given.positive)
        loss = build(kind, (student, teacher, batch), **given.arguments)
        if loss.batchwise:
            pytest.skip("defined on the batch as a whole")
        if loss.needs_teacher:
            values = loss.values(student, teacher, batch)
            assert values.shape == (3,)
            assert values.sum().item() == pytest.approx(loss(student, teacher, batch).item())

    @pytest.mark.parametrize(
        ("size", "classes", "scale", "dtype"),
        [
            (1, 5, 1.0, torch.float64),
            (4, 2, 1.0, torch.float64),
            (4, 5, 60.0, torch.float32),
            (4, 5, 60.0, torch.bfloat16),
            (4, 5, 60.0, torch.float16),
            (4, 5, 0.0, torch.float32),
        ],
        ids=["batch of 1", "2 classes", "logits x60", "bf16", "fp16", "equal logits"],
    )
    def test_hard_inputs_stay_finite(
        self, kind: str, size: int, classes: int, scale: float, dtype: torch.dtype, example: Example, build: Build
    ) -> None:
        given = case(kind)
        student, teacher, batch = example(
            size, classes, given.student, given.teacher, scale, dtype, positive=given.positive
        )
        loss = build(kind, (student, teacher, batch), **given.arguments).train()
        value = loss(student, teacher, batch)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        gradients = _gradients(value, student)
        assert value.isfinite() and gradients and all(bool(g.isfinite().all()) for g in gradients)

    def test_works_under_autocast(self, kind: str, example: Example, build: Build) -> None:
        its = case(kind)
        given = example(student=its.student, teacher=its.teacher, dtype=torch.bfloat16, positive=its.positive)
        loss = build(kind, given, **its.arguments)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(*given)
        assert value.dtype == torch.float32 and value.isfinite()
        torch.testing.assert_close(value, loss(*given), rtol=0.03, atol=1e-3)

    def test_the_teacher_gets_no_gradient(self, kind: str, example: Example, build: Build) -> None:
        given = case(kind)
        student, teacher, batch = example(student=given.equal, teacher=given.equal, positive=given.positive)
        loss = build(kind, (student, teacher, batch), **given.arguments)
        for leaf in _leaves(teacher):
            leaf.requires_grad_(True)
        loss(student, teacher, batch).backward()
        assert all(leaf.grad is None for leaf in _leaves(teacher))
        assert any(leaf.grad is not None and leaf.grad.any() for leaf in _leaves(student))

    def test_unlabelled_samples_count_where_no_label_is_needed(self, kind: str, example: Example, build: Build) -> None:
        given = case(kind)
        student, teacher, batch = example(size=4, student=given.equal, teacher=given.equal, positive=given.positive)
        loss = build(kind, (student, teacher, batch), **given.arguments)
        labelled = loss(student, teacher, batch).item()
        batch.targets = torch.full_like(batch.targets, -100)
        value = loss(student, teacher, batch)
        if loss.needs_targets:
            assert value.item() == 0 and int(loss.count(batch)) == 0
            assert not any(bool(g.any()) for g in _gradients(value, student))
        else:
            assert value.item() == labelled and int(loss.count(batch)) > 0

    def test_names_its_paper_or_task_and_its_arguments(self, kind: str) -> None:
        known = registry.signature(registry.find("losses", kind))
        assert not known.accepts_any
        for label in ("Formula:", "Paper:", "Published:") + (("Taps:",) if known.attributes.get("needs_taps") else ()):
            assert f"    {label}" in known.doc or f"\n{label}" in known.doc, f"the docstring of {kind} has no {label}"
        assert all(parameter.has_default for parameter in known.arguments.values())
        for name in known.arguments:
            assert f"{name}:" in known.doc, f"the docstring of {kind} does not explain {name}"


def test_the_file_name_is_the_kind() -> None:
    for kind, (target, *_) in kdctl.losses.LOSSES.items():
        assert target.split(":")[0] == kind


def test_the_table_needs_no_torch() -> None:
    tree = ast.parse(Path(kdctl.losses.__file__).read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert set(kdctl.losses.ALIASES.values()) <= set(kdctl.losses.LOSSES)
    assert not set(kdctl.losses.ALIASES) & set(kdctl.losses.LOSSES)
