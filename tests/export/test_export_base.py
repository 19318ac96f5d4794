"""What all targets share: how a quantization is described and what of it is refused."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from kdctl.errors import ConfigError
from kdctl.export.base import Quantization, group_length, reason
from kdctl.export.onnx import Onnx

SHAPE = (1, 8, 8)


def test_group_length() -> None:
    assert [group_length(288, size) for size in (None, 32, 64, 500, 5)] == [288, 32, 48, 288, 4]
    assert [group_length(inputs, 32) for inputs in (37, 34, 2 * 37)] == [37, 17, 74]  # no scale for every two weights


def test_what_a_target_has_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="onnx files cannot be int4-static"):
        Onnx().convert(nn.Identity(), SHAPE, None, {}, Quantization(dtype="int4"))  # type: ignore[arg-type]


def test_calibration_images_have_to_be_there_and_fit() -> None:
    images = np.zeros((5, *SHAPE), np.float32)
    assert Quantization(images=images).calibration_images(SHAPE) is images
    for wrong in (None, images[:0]):
        with pytest.raises(ConfigError, match="there are no calibration images"):
            Quantization(images=wrong).calibration_images(SHAPE)
    for shape in ((3, 8, 8), (8, 8)):
        with pytest.raises(ConfigError, match=r"calibration images are \(5, 1, 8, 8\); the model takes \(N, "):
            Quantization(images=images).calibration_images(shape)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("\n first \nsecond", "first"), ("Traceback ...\n  at\nlast\n", "last"), (" \n", "ValueError"),
        ("x" * 500, "x" * 300),
    ],
)  # fmt: skip
def test_a_reason_is_one_line(text: str, line: str) -> None:
    assert reason(ValueError(text)) == line
