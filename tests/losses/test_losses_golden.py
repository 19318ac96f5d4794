"""Losses against reference vectors: what each method's published implementation returns on the same inputs.

The folder is named by KDCTL_GOLDEN, else `../shared/golden` beside the repository. A case whose method is not in the
table is skipped by name and joins by itself once it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kdctl import registry
from kdctl.losses.base import DryRun, Loss
from kdctl.signals import IGNORE, Batch, Signals
from kdctl.tasks.classification import Classification

FOLDER = Path(os.environ.get("KDCTL_GOLDEN") or Path(__file__).parents[3] / "shared" / "golden")
ARGUMENTS: dict[str, dict[str, Any]] = {
    "factor_transfer": {"paraphraser": False},
    "fitnet": {"regressor": "none"},
    "ofd": {"connector": "none"},
    "correlation_congruence": {"embed_dim": None},
}
"""Arguments that a case implies: the reference features have been through the adapters already."""
PARAMETERS: dict[str, Callable[[str], str]] = {
    "vid": lambda name: f"adapters.0.{name}",
    "crd": lambda name: "" if name == "contrast.params" else name.removeprefix("contrast."),
}
"""Of losses with weights of their own: where a weight of the file stands in the loss's state, "" where it is no weight
(crd's `params` are its arguments, and normalisers that are not set yet)."""


def _cases() -> list[Any]:
    if not FOLDER.is_dir():
        reason = f"no reference vectors in {FOLDER}; set KDCTL_GOLDEN to their folder"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason))]
    cases = []
    for path in sorted(FOLDER.glob("*.npz")):
        with np.load(path, allow_pickle=False) as case:
            method = json.loads(str(case["meta"]))["method"]
        known = registry.canonical("losses", method) in registry.catalogue("losses")
        marks = [] if known else [pytest.mark.skip(reason=f"the method {method} is not in the table of losses")]
        cases.append(pytest.param(path, id=path.stem, marks=marks))
    return cases


def _updated(path: Path) -> dict[str, Tensor]:
    """The state that a file gives for after the step."""
    prefix = "param.after."
    with np.load(path, allow_pickle=False) as arrays:
        return {n.removeprefix(prefix): torch.from_numpy(arrays[n]) for n in arrays.files if n.startswith(prefix)}


@pytest.mark.parametrize("path", _cases())
def test_reference_vector(path: Path) -> None:
    case = _Case(path)
    value = case.loss(case.student, case.teacher, case.batch) / case.loss.count(case.batch)
    torch.testing.assert_close(value.detach(), case.expected, rtol=case.rtol, atol=1e-12)
    value.backward()
    for name, expected in case.gradients.items():
        gradient = case.inputs[name].grad
        assert gradient is not None, f"no gradient reaches {name}"
        scale = float(expected.abs().max())
        torch.testing.assert_close(gradient, expected, rtol=case.rtol, atol=case.rtol * 1e-2 * scale)


@pytest.mark.parametrize("path", [c for c in _cases() if c.values[0] is None or _updated(c.values[0])])
def test_state_after_a_training_step(path: Path) -> None:
    case = _Case(path)
    case.loss.train()
    case.loss(case.student, case.teacher, case.batch)
    state = case.loss.state_dict()
    for name, expected in _updated(path).items():
        torch.testing.assert_close(state[name], expected, rtol=case.rtol, atol=1e-12)


class _Case:
    """One file as a loss and its arguments."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as arrays:
            meta = json.loads(str(arrays["meta"]))
            self.inputs = {name[3:]: torch.from_numpy(arrays[name]) for name in arrays.files if name.startswith("in.")}
            self.gradients = {n[5:]: torch.from_numpy(arrays[n]) for n in arrays.files if n.startswith("grad.")}
            self.parameters = {
                n[6:]: torch.from_numpy(arrays[n])
                for n in arrays.files
                if n.startswith("param.") and not n.startswith("param.after.")
            }
            self.expected = torch.from_numpy(arrays["out.loss"]).double()
        for name in self.gradients:
            self.inputs[name].requires_grad_(True)
        self.rtol = 1e-4 if "float32" in meta["notes"] else 1e-6
        kind = registry.canonical("losses", meta["method"])
        known = registry.signature(registry.find("losses", kind))
        hyper = {known.aliases.get(name, name): value for name, value in meta["hyper"].items()}
        self.loss: Loss = registry.create("losses", kind, {**hyper, **ARGUMENTS.get(kind, {})})
        self.student = self._signals("student")
        self.teacher = self._signals("teacher")
        self.batch = self._batch()
        self.loss.taps = tuple(zip(self.student.features, self.teacher.features, strict=True))
        num_samples = meta["hyper"].get("dataset_size", 64)
        dry_run = DryRun(Classification(), self.batch, self.student, self.teacher, num_samples)
        self.loss.setup(dry_run)
        self.loss.double().eval()
        if self.parameters:
            place = PARAMETERS.get(kind, str)
            state = {place(name): value for name, value in self.parameters.items() if place(name)}
            assert not self.loss.load_state_dict(state, strict=False).unexpected_keys

    def _named(self, keep: Callable[[str], bool]) -> list[Tensor]:
        return [value for name, value in self.inputs.items() if keep(name)]

    def _signals(self, side: str) -> Signals:
        """Logits, and everything else of this side as features, numbered in the order of the file."""
        features = self._named(lambda n: n.startswith(side) and not n.startswith(f"{side}_logits"))
        logits = self.inputs.get(f"{side}_logits")
        if logits is None:
            logits = torch.zeros(self._size(), 2, dtype=torch.float64)
        class_dim, keep = 1, None
        if logits.ndim == 3:
            class_dim, keep = 2, self.inputs["labels"] != IGNORE if "labels" in self.inputs else None
        named = {f"{side}.{i}": f for i, f in enumerate(features)}
        return Signals(logits, "softmax", named, keep, class_dim, self._members(side, features))

    def _members(self, side: str, features: list[Tensor]) -> tuple[Signals, ...]:
        """Several teachers, where the file has several: teacher k has the k-th logits and the k-th feature."""
        logits = self._named(lambda n: n.startswith(f"{side}_logits."))
        pairs = zip(logits, features, strict=True) if logits else ()
        return tuple(Signals(z, "softmax", {f"{side}.{i}": f}) for i, (z, f) in enumerate(pairs))

    def _size(self) -> int:
        return next(iter(self.inputs.values())).shape[0]

    def _batch(self) -> Batch:
        size = self._size()
        index = self.inputs.get("indices", torch.arange(size))
        targets = self.inputs.get("labels", torch.full((size,), IGNORE))
        given = ("attention_mask", "contrast_indices", "margin")
        extra = {name: self.inputs[name] for name in given if name in self.inputs}
        return Batch(torch.zeros(size, 1), targets, index, torch.zeros_like(index), self.student.keep, extra)
