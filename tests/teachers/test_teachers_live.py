"""A running teacher under autocast: its weights are cast once, and what it says is what its own net says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kdctl.models.record import Model, ModelRecord, build_model
from kdctl.signals import Batch, TokenInput
from kdctl.tasks.classification import Classification
from kdctl.teachers.live import LiveTeacher

TEXTS: dict[str, Any] = {"image_shape": [], "tokens": TokenInput(vocab_size=50, length=9, pad=0)}
NETS = {
    "bert": ({"depth": 2, "width": 16, "heads": 2}, TEXTS, "bert.encoder.layer.0"),
    "digits_cnn": ({"width": 4}, {"image_shape": [1, 8, 8]}, "layer2"),
}


def make(kind: str) -> tuple[Model, Batch]:
    arguments, more, _ = NETS[kind]
    torch.manual_seed(0)
    model = build_model(ModelRecord(kind, arguments, 3, ["a", "b", "c"], **more)).eval()
    inputs = model.record.example(4)
    if kind == "bert":
        inputs = inputs.masked_fill(torch.arange(9) >= torch.tensor([[9], [4], [1], [6]]), 0)
    index = torch.arange(4)
    return model, Batch(inputs, index % 3, index, index)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("tapped", [False, True])
def test_under_autocast_it_says_the_same_bit_for_bit(kind: str, tapped: bool) -> None:
    model, batch = make(kind)
    tap = NETS[kind][2]
    teacher = LiveTeacher(model, Classification(), [tap] if tapped else [])
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    plain = teacher(batch)
    casts: list[torch.dtype] = []
    with torch.autocast("cpu", torch.bfloat16):
        found = teacher(batch)
        casts += [value.dtype for name, value in teacher._asked.net.named_parameters() if name.endswith(".weight")]
        teacher._in(None)
        teacher._dtype = torch.bfloat16  # asked as it would be without casting anything ahead
        expected = teacher(batch)
    assert torch.bfloat16 in casts
    assert found.logits.equal(expected.logits) and not found.logits.equal(plain.logits)
    assert not tapped or found.features[tap].equal(expected.features[tap])
    assert teacher(batch).logits.equal(plain.logits), "without autocast it is as exact as before"
    after = model.net.state_dict()
    assert all(value.dtype == before[name].dtype and value.equal(before[name]) for name, value in after.items())
