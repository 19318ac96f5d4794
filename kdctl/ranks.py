"""The processes of one training (torch.distributed): how they start, and the few things they tell each other.

A process that was started alone is rank 0 of 1: every exchange is then the identity. Ranks are numbered as torchrun
numbers them, from the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdctl import launch
from kdctl.errors import KdctlError, Problem, UsageError

_TO_MEET = timedelta(minutes=15)
_TO_TELL = 3.0
"""Seconds that the others have to say that they are still there, when one is lost."""
_PATIENCE = timedelta(days=7)
"""The others wait for the first process while it measures; a dead one is noticed by its closed connection."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together. local: its number on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0
    local_size: int = 1
    agents: tuple[str, ...] = ()
    """The torchruns that started them, the same after a restart."""

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

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Gives every process the first one's values, in place."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, src=0)

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
_joined = _ALONE


def current() -> Ranks:
    """This process among those that train together; rank 0 of 1 where no others were started."""
    return _joined


class LostError(KdctlError):
    """Another process of this training is gone."""


@contextmanager
def joined() -> Iterator[Ranks]:
    """Joins the processes that the environment announces, for as long as the block runs.

    Tensors on the CPU travel by gloo, those on CUDA by NCCL where each process of a machine has a device of its own.
    Where the block fails in one process it fails in all: the first one raises what went wrong in another, or LostError
    naming the one that is gone; the others raise LostError.
    """
    global _joined
    if launch.world_size() == 1:
        yield _ALONE
        return
    local, local_size = int(os.environ.get("LOCAL_RANK", "0")), launch.local_world_size()
    on_cuda = dist.is_nccl_available() and torch.cuda.device_count() >= local_size
    if on_cuda:
        torch.cuda.set_device(local)
    store, rank, size = _meeting_point()
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    ranks = Ranks(rank, size, local, local_size)
    agents = sorted(set(ranks.collected(launch.agent())) - {""})
    _joined = replace(ranks, agents=tuple(agents))
    notes = dist.PrefixStore("kdctl", store)
    try:
        yield _joined
        dist.barrier()
        gc.collect()  # what still holds the group would keep its threads into the interpreter's end, which aborts them
        dist.destroy_process_group()
    except Exception as error:
        if _is_lost(error):
            raise _lost(notes, _joined) from error
        if rank > 0:
            _leave_note(notes, f"failed/{rank}", error)
        raise
    finally:
        _joined = _ALONE


def _meeting_point() -> tuple[dist.Store, int, int]:
    """The store by which the processes find each other, this one's rank, and how many there are.

    torchrun's own store outlives a restart, with the addresses of dead processes in it. So there it only says where
    that of the first process is; one whose server does not answer is of a process that died.
    """
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=_TO_MEET))
    except ValueError as error:  # a variable is missing
        hint = "unset WORLD_SIZE, or start the processes by `kdctl train --nproc N` or torchrun"
        message = f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {str(error).rpartition(': ')[2]}"
        raise UsageError(message, hint=hint) from error
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store, rank, size
    host, key, deadline = os.environ["MASTER_ADDR"], "kdctl/port", time.monotonic() + _TO_MEET.total_seconds()
    if rank == 0:
        own = dist.TCPStore(host, 0, is_master=True, timeout=_TO_MEET, wait_for_workers=False)
        store.set(key, str(own.port))
        return own, rank, size
    while True:
        port = int(store.get(key))
        try:
            socket.create_connection((host, port), timeout=2).close()
            return dist.TCPStore(host, port, timeout=_TO_MEET, wait_for_workers=False), rank, size
        except OSError as error:
            if time.monotonic() > deadline:
                raise KdctlError(f"the first process cannot be reached at {host}, port {port}: {error}") from error
            time.sleep(0.1)


def _is_lost(error: Exception) -> bool:
    """Whether an exchange failed because another process is gone."""
    if isinstance(error, KdctlError):
        return False
    text = str(error)
    return isinstance(error, dist.DistError) or any(mark in text for mark in ("gloo", "Connection closed", "NCCL"))


def _leave_note(notes: dist.Store, key: str, error: Exception | None = None) -> None:
    """Tells the first process how this one ended."""
    told = error if isinstance(error, KdctlError) else KdctlError(f"{type(error).__name__}: {error}")
    with contextlib.suppress(RuntimeError):  # the first process is the one that is gone
        notes.set(key, json.dumps(told.as_dict()))


def _lost(notes: dist.Store, ranks: Ranks) -> KdctlError:
    """The error of a process that has lost another one: in the first process it says which, and why if known."""
    if not ranks.first:
        _leave_note(notes, f"survived/{ranks.rank}")
        return LostError("another process is gone")
    missing = set(range(1, ranks.size))
    deadline = time.monotonic() + _TO_TELL
    while True:
        for rank in sorted(missing):
            if notes.check([f"failed/{rank}"]):
                return _of_another(rank, ranks.size, json.loads(notes.get(f"failed/{rank}")))
        missing -= {rank for rank in missing if notes.check([f"survived/{rank}"])}
        if len(missing) <= 1 or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    named = " and ".join(str(rank) for rank in sorted(missing))
    hint = "it was killed, or its machine is gone; `kdctl resume` continues the run from its last checkpoint"
    return LostError(f"process {named} of {ranks.size} is lost", hint=hint)


def _of_another(rank: int, size: int, document: dict[str, Any]) -> KdctlError:
    problems = [Problem(**problem) for problem in document["errors"]]
    error = KdctlError(*(replace(p, message=f"process {rank} of {size}: {p.message}") for p in problems))
    error.code = document["code"]  # type: ignore[misc]
    return error
