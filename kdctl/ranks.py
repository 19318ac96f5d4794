"""The processes of one training (torch.distributed): how they start, and the few things they tell each other.

A process that was started alone is rank 0 of 1: every exchange is then the identity. Ranks are numbered as torchrun
numbers them, from the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_PATIENCE = timedelta(days=7)
"""The others wait for the first process while it measures; a dead one is noticed by its closed connection."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together. local: its number on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """The rows of `count` that are this process's: contiguous, in order of rank, sizes differing by one at most."""
        return slice(*(count * r // self.size for r in (self.rank, self.rank + 1)))

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, elementwise."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process. Waits for no device."""
        return flag if self.size == 1 else bool(self.total(torch.tensor([float(flag)])))

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows (n, ...) of all processes, in order of rank; n may differ. Without gradient."""
        if self.size == 1:
            return rows
        sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
        counts = [int(s) for s in sizes]
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows.detach()
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    def whole(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in which this process's own carry its gradient.

        For losses that compare the samples of a batch: each process computes the whole loss, its gradient by its own
        rows is exact, and summed over processes that is the gradient of the parameters.
        """
        if self.size == 1:
            return rows
        gathered = self.gathered(rows)
        if not rows.requires_grad:
            return gathered
        before = int(self._counts(len(rows))[: self.rank].sum())
        return torch.cat([gathered[:before], rows, gathered[before + len(rows) :]])

    def _counts(self, own: int) -> Tensor:
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = own
        return self.total(counts)

    def told(self, value: Any = None) -> Any:
        """The value of the first process, in every process: plain data, as JSON has it."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def collected(self, value: Any) -> list[Any]:
        """The values of all processes, in order of rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


_ALONE = Ranks()


def current() -> Ranks:
    """This process among those that train together; rank 0 of 1 where no others were started."""
    if not dist.is_available() or not dist.is_initialized():
        return _ALONE
    local, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Ranks(dist.get_rank(), dist.get_world_size(), local, local_size)


def announced() -> bool:
    """Whether the environment says that this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined() -> Iterator[Ranks]:
    """Joins the processes that the environment announces, for as long as the block runs.

    Tensors on the CPU travel by gloo, those on CUDA by NCCL.
    """
    if not announced():
        yield _ALONE
        return
    on_cuda = torch.cuda.is_available() and dist.is_nccl_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=_PATIENCE)
    try:
        yield current()
    finally:
        dist.destroy_process_group()
