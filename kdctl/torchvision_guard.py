"""Imports torchvision, also where its wheel was built for a CUDA torch and the installed torch is a CPU build.

The package index has one torchvision wheel for Linux; its operators link CUDA libraries that a CPU torch lacks. Loading
them then fails silently, and importing torchvision stops at an operator that nobody has defined. Defining the
operators' signatures beforehand is enough: models, transforms and data sets work. The operators themselves (`nms`,
`roi_align`) stay absent, and torchvision says so when one is called.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

from kdctl.errors import MissingError

_SIGNATURES = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width,"
    " int sampling_ratio, bool aligned) -> Tensor",
)
_definitions: torch.library.Library | None = None
"""Kept for the life of the process: its operators go when it goes."""


def ensure_torchvision() -> ModuleType:
    """The torchvision package. Raises MissingError when it is not installed or does not fit the installed torch."""
    global _definitions
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        raise MissingError("torchvision is not installed", hint="pip install torchvision")
    if _definitions is None and not _defined("nms") and not _load_operators(Path(spec.submodule_search_locations[0])):
        _definitions = torch.library.Library("torchvision", "FRAGMENT")
        for signature in _SIGNATURES:
            _definitions.define(signature)
    try:
        return importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        hint = "each torchvision belongs to one torch: pip install -c constraints-cpu.txt torch torchvision"
        raise MissingError(f"torchvision cannot be imported: {error}", hint=hint) from error


def _defined(operator: str) -> bool:
    return hasattr(torch.ops.torchvision, operator)


def _load_operators(folder: Path) -> bool:
    """Loads torchvision's compiled operators; False where there are none or their libraries are not on this machine."""
    for library in (*folder.glob("_C*.so"), *folder.glob("_C*.pyd"), *folder.glob("_C*.dylib")):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
        if _defined("nms"):
            return True
    return False
