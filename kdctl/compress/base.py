"""What stages of compression are: a Reshape makes a smaller model of a model, a Compressor a smaller file of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from kdctl.models.record import Model
    from kdctl.signals import Batch
    from kdctl.tasks.base import Task

Floats = NDArray[np.float32]


@dataclass
class Workbench:
    """What a stage of compression works with beside the model.

    images: a stream of batches of clean training images (N, C, H, W) in [0, 1], or of texts, int64 (N, L), in a random
    order that is always the same. batches: the same samples with their labels, those that have one first. quality: the
    task's metric of a predictor (images or texts to logits) on the validation split, or on training samples where there
    is none: never on the test split; NaN where none of these samples has a label. of_student: that of the model that
    compression began with. say: tells the user.
    """

    task: Task
    images: Callable[[], Iterator[Floats]]
    batches: Callable[[], Iterator[Batch]]
    quality: Callable[[Callable[[Floats], Floats]], float]
    of_student: Callable[[], float]
    say: Callable[[str], None] = print


@dataclass
class Reshaped:
    """What a Reshape made. details: what it did, as JSON values (ratios, ranks, a scan, predicted latency)."""

    model: Model
    details: dict[str, Any] = field(default_factory=dict)


class Compression:
    """A stage of compression: a Reshape or a Compressor.

    makes: `model` or `file`. smoke: the arguments that a smoke test sets, where the stage would else take long.
    """

    makes: ClassVar[str]
    smoke: ClassVar[dict[str, Any]] = {}

    def require(self) -> None:
        """Raises MissingError where something that the stage needs is not installed."""

    def check(self, model: Model) -> None:
        """Raises what the stage would raise for any model of this architecture, whatever its weights: asked before
        anything is trained. model: on the CPU, in eval mode."""


class Reshape(Compression):
    """Makes a smaller model. The new one's record rebuilds it (models/structure.py)."""

    makes: ClassVar[str] = "model"

    def reshape(self, model: Model, bench: Workbench) -> Reshaped:
        """The smaller model, in eval mode; the given one is left as it is. Raises KdctlError where there is none."""
        raise NotImplementedError


class Compressor(Compression):
    """Writes a compressed model into one file, which the runtime `target` opens (a name of EXPORTERS)."""

    makes: ClassVar[str] = "file"
    target: str
    file_name: str

    def convert(
        self,
        model: Model,
        bench: Workbench,
        image_shape: tuple[int, ...],
        out: Path,
        metadata: dict[str, Any],
        max_drop: float | None = None,
    ) -> dict[str, Any]:
        """Writes the compressed model to `out`; returns what it did, as JSON values.

        image_shape: (C, H, W), or (L,) of the longest text. max_drop: points of `bench.quality` that may be lost; where
        the stage can give up some of its gain to hold it, it does. Raises KdctlError where the images do not fit the
        model.
        """
        raise NotImplementedError
