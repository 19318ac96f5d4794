"""What an exporter is: it writes a model into a file of another runtime, and says how that file is opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import nn


class Exporter:
    """Writes a model into one file. target: its runtime, a name of EXPORTERS."""

    target: ClassVar[str]
    file_name: ClassVar[str]

    def variant(self) -> str:
        """What the artefact is called where the stage gives no name."""
        raise NotImplementedError

    def convert(self, model: nn.Module, image_shape: tuple[int, int, int], out: Path, metadata: dict[str, Any]) -> None:
        """Writes the model to `out`, with `metadata` in the file. Raises KdctlError where it has no such form."""
        raise NotImplementedError
