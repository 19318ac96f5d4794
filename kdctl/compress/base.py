"""What a compressor is: it makes a smaller or faster file of a model, from the model and some calibration images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import nn


class Compressor:
    """Writes a compressed model into one file."""

    target: ClassVar[str]
    file_name: ClassVar[str]

    def variant(self) -> str:
        """What the artefact is called where the stage gives no name."""
        raise NotImplementedError

    def convert(
        self,
        model: nn.Module,
        calibration_images: Iterable[NDArray[np.float32]],
        image_shape: tuple[int, int, int],
        out: Path,
        metadata: dict[str, Any],
    ) -> None:
        """Writes the compressed model to `out`.

        calibration_images: batches of float32 images (N, C, H, W) in [0, 1], in random order, none of them of the test
        split. Raises KdctlError where they do not fit.
        """
        raise NotImplementedError
