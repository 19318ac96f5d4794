"""What quantisation-aware training leaves behind for the exporters: plain numbers, no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Learned:
    """What quantisation-aware training found for one layer.

    weight_scale: () or (C,), the step between the layer's weights, which are whole multiples of it. weight_bits: of
    them. input_range: [low, high] of the layer's input, zero inside, None where it stays in float; input_bits: of it.
    """

    weight_scale: NDArray[np.float32]
    weight_bits: int = 8
    input_range: tuple[float, float] | None = None
    input_bits: int = 8
