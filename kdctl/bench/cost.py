"""What a model costs without a clock: parameters, multiply-accumulates, bytes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def parameters(model: nn.Module) -> int:
    """Numbers in parameters, each counted once where modules share it."""
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module, shape: Sequence[int] | None = None) -> int:
    """Multiply-accumulates of convolutions and matrix products for one input; the model is left as it is.

    shape: (C, H, W) of an image; left out, the input is that of the model's record, a text one of full length.
    """
    copied = copy.deepcopy(model).cpu().float().eval()
    with counting() as counter:
        copied(model.record.example() if shape is None else torch.zeros(1, *shape))  # type: ignore[operator, union-attr]
    return counter.get_total_flops() // 2


@contextlib.contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Counts what is computed inside, without gradients: two operations a multiply-accumulate.

    Attention and the encoder layers of torch.nn run as plain products there: their fused kernels count as nothing.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def file_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size
