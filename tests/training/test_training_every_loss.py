"""Every loss of the table trains a real student, alone in its step, and leaves the teacher as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import kdctl.losses
from kdctl import build, registry
from kdctl.clock import Clock
from kdctl.config.schema import Experiment
from kdctl.device import apply_settings
from kdctl.signals import Batch
from kdctl.step import Step
from kdctl.watch import Reporter

FILE = """
name: every
data: {kind: digits, limit: 200, batch_size: 32}
teacher: {kind: digits_cnn, width: 8, control: true}
student: {kind: digits_cnn, width: 4}
losses: [{kind: KIND}]
optimizer: {kind: sgd, lr: 0.01}
train: {epochs: 1, device: cpu, threads: 1}
"""
MAP, LEVELS, VECTOR = "[layer3]", "[layer2, layer3]", "[flatten]"
TAPS = {
    "ab": "[layer2.bn, layer3.bn]", "ofd": "[layer2.bn, layer3.bn]", "fsp": LEVELS, "kdsvd": LEVELS, "semckd": LEVELS,
    "hierarchical_context": LEVELS, "reviewkd": LEVELS, "byot": "[layer2, flatten]", "uskd": "[layer2]",
    "text_nst": LEVELS, "text_fsp": LEVELS, "cwd": MAP,
}  # fmt: skip
VECTORS = {"srrl", "rkd", "correlation_congruence", "pkt", "crd", "srd", "hidden_mse", "cosine", "pkd"}
ARGUMENTS = {
    "crd": "negatives: 64",
    "ctkd": "decay_epochs: 0",
    "attention_mse": "heads: mean",
}
ELSEWHERE = {
    "binary_kd": "its logits are of another link", "ca_mkd": "it needs several teachers",
    "attention_kl": "of attention: test_losses_texts.py", "token_relations": "of tokens: test_losses_texts.py",
}  # fmt: skip


def _text(kind: str) -> str:
    signature = registry.signature(registry.find("losses", kind))
    arguments = ARGUMENTS.get(kind, "")
    if kind in TAPS or signature.attributes.get("needs_taps"):
        taps = TAPS.get(kind, VECTOR if kind in VECTORS else MAP)
        arguments = ", ".join(part for part in (arguments, f"taps: {taps}") if part)
    return FILE.replace("KIND", kind + (f", {arguments}" if arguments else ""))


@pytest.mark.parametrize("kind", sorted(set(kdctl.losses.LOSSES) - set(ELSEWHERE)))
def test_trains_the_student_and_leaves_the_teacher(
    kind: str, experiment: Callable[..., Experiment], folder: Path
) -> None:
    made = experiment(text=_text(kind))
    apply_settings(made.train)
    stage = made.train_stages[-1]
    built = build.build_stage(made, stage, build.build_data(made), lambda name: folder / name)
    teacher = built.teachers[0]
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = {name: value.clone() for name, value in built.method.student.net.state_dict().items()}
    step = Step(built, stage, Clock(), Reporter(), 1)
    built.method.begin_epoch(0)
    built.method.train()
    for number, batch in enumerate(built.loader.epoch(0)):
        step(batch, 1.0 + number / len(built.loader))
        if number == 1:
            break
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), f"{kind} changed the teacher's {name}"
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    moved = [n for n, v in built.method.student.net.named_parameters() if not torch.equal(v, student[n])]
    assert moved, f"{kind} trains nothing of the student"
    assert all(bool(v.isfinite().all()) for v in built.method.student.net.state_dict().values())
    assert isinstance(batch, Batch) and batch.size == 32


def test_what_is_left_out_is_a_loss() -> None:
    assert set(ELSEWHERE) | set(TAPS) | VECTORS | set(ARGUMENTS) <= set(kdctl.losses.LOSSES)
    assert all(ELSEWHERE.values()) and isinstance(ARGUMENTS, dict)
