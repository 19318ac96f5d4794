"""A plain model computes what the model does, without batch norms and without padded shortcuts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdctl.models.plain import plain
from kdctl.models.record import ModelRecord, build_model
from kdctl.models.resnet_cifar import PadShortcut


@pytest.mark.parametrize(("width", "stem"), [(16, 16), (20, 7)])
def test_plain_is_equal_and_made_of_convolutions(width, stem):
    torch.manual_seed(0)
    arguments = {"depth": 8, "shortcut": "pad", "width": width, "stem": stem}
    normalize = {"mean": [0.5], "std": [0.25]}
    model = build_model(ModelRecord("cifar_resnet", arguments, 4, list("abcd"), [3, 16, 16], normalize))
    with torch.no_grad():
        model(torch.rand(64, 3, 16, 16))
    model.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    given = plain(model)
    images = torch.rand(5, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(given(images), model(images), atol=1e-5, rtol=1e-4)
    assert not any(isinstance(module, (nn.BatchNorm2d, PadShortcut)) for module in given.modules())
    assert {path for path, _ in model.net.named_modules()} == {path for path, _ in given.net.named_modules()}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
