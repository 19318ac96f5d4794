"""Batches of a split: shuffled and augmented for training, clean and in order for measuring.

What a batch holds depends on seeds, epoch and step alone, never on the number of workers: these only decode.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.utils import data as torch_data

from kdctl import ranks
from kdctl.data import counter
from kdctl.data.augment import Augment, Views
from kdctl.data.base import ArraySplit, ItemSplit, Split
from kdctl.device import usable_cores
from kdctl.errors import ConfigError, KdctlError, Problem
from kdctl.signals import CLEAN, IGNORE, Batch

_MOST_WORKERS = 8


class TrainLoader:
    """Augmented batches in an order keyed by (order_seed, epoch): every sample once an epoch.

    A last batch of a single sample is joined to the one before, because batch statistics of one are none; so is one of
    fewer samples than there are processes, of which each gets its part of every batch.
    augment: None for clean images. strong: of a second version of each image (Batch.strong), None for none. views:
    which view an epoch shows (augment.Views). workers: decoding processes; data in memory need none and start none.
    Raises ConfigError where the augmentations cannot take the images or `all` has no finite set of views.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        augment: Augment | None = None,
        strong: Augment | None = None,
        views: int | Literal["fresh", "all"] = "fresh",
        order_seed: int = 0,
        device: torch.device | str = "cpu",
        workers: int | Literal["auto"] = "auto",
    ) -> None:
        self.device = torch.device(device)
        self.split = _resident(split, self.device)
        self.batch_size = batch_size
        augment = augment or Augment([])
        for operation in [*augment.operations, *(strong.operations if strong else [])]:
            operation.prepare(split)
        self.input_shape = augment.output_shape(split.input_shape)
        self.augment = augment.enumerate(split.input_shape) if views == "all" else augment
        self.strong = strong
        if strong is not None and strong.output_shape(split.input_shape) != self.input_shape:
            message = f"strong images have shape {strong.output_shape(split.input_shape)}, others {self.input_shape}"
            raise ConfigError(Problem(message, key="data.strong_augment"))
        if split.drawn and views == "all":
            message = "'all' needs finitely many views, and which tokens are hidden is drawn in each"
            raise ConfigError(Problem(message, key="data.views", hint="use views: fresh, or a number of views"))
        choices = None if split.drawn else augment.num_choices(split.input_shape)
        self.views = Views(views, augment.seed, choices)
        self.order_seed = order_seed
        self.workers = workers
        self._ranks = ranks.current()
        if min(batch_size, len(split)) < self._ranks.size:
            message = f"{min(batch_size, len(split))} samples a step are too few for {self._ranks.size} processes"
            raise ConfigError(Problem(message, key="data.batch_size"))

    def __len__(self) -> int:
        """Steps an epoch."""
        steps, rest = divmod(len(self.split), self.batch_size)
        joined = rest < max(2, self._ranks.size) and steps > 0
        return steps + (rest > 0 and not joined)

    def order(self, epoch: int) -> Tensor:
        """(N,) int64: the rows of the split in the order of this epoch."""
        rows = counter.permutation(len(self.split), counter.ORDER, self.order_seed, epoch)
        return self.split.arranged(rows, self.batch_size, counter.key(counter.ORDER, self.order_seed, epoch, 1))

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from a step on: the same ones whether or not those before were taken."""
        steps, size = len(self), self.batch_size
        order = self.order(epoch).to(self.split.targets.device)
        last = steps - 1
        rows = [order[s * size : None if s == last else (s + 1) * size] for s in range(start_step, steps)]
        rows = [batch[self._ranks.part(len(batch))] for batch in rows]
        yield from self.shown(rows, epoch)

    def shown(self, rows: list[Tensor], epoch: int) -> Iterator[Batch]:
        """Batches of these rows of the split, as an epoch shows them."""
        for part, images in _fetched(self.split, rows, num_workers(self.workers, self.split, self.device)):
            yield self._batch(part, images, epoch)

    def few(self, count: int) -> Batch:
        """A batch of at most `count` samples as epoch 0 shows them, labelled ones where there are any."""
        order = torch.argsort((self.split.strata == IGNORE).to(torch.int8), stable=True)[:count]
        return self._batch(order, self.split.fetch(order), 0)

    def _batch(self, rows: Tensor, images: Tensor, epoch: int) -> Batch:
        index = self.split.index[rows].to(self.device, non_blocking=True)
        view = self.views.at(epoch, index)
        posed = self.split.posed(rows, images.to(self.device, non_blocking=True), view)
        images = posed.inputs
        strong = None if self.strong is None else as_inputs(self.strong(images, index, view, stream=1))
        extra = self.split.extra(images)
        images = self.augment(images, index, view)
        targets = posed.targets.to(self.device, non_blocking=True)
        turn = self.views.turn(epoch)
        return Batch(as_inputs(images), targets, index, view, posed.keep, turn=turn, strong=strong, extra=extra)


def clean_batches(
    split: Split,
    *,
    batch_size: int,
    name: str = "train",
    device: torch.device | str = "cpu",
    workers: int | Literal["auto"] = 0,
) -> Iterator[Batch]:
    """All samples of a split as they are, in its `clean_order`, with view -1. name: train, val or test."""
    rows = list(split.clean_order().split(batch_size))
    for part, inputs in _fetched(split, rows, num_workers(workers, split, device)):
        index = split.index[part].to(device)
        view = torch.full_like(index, CLEAN)
        posed = split.posed(part, inputs.to(device), view)
        given = as_inputs(posed.inputs)
        extra = split.extra(given)
        yield Batch(given, posed.targets.to(device), index, view, posed.keep, split=name, extra=extra)


def as_inputs(fetched: Tensor) -> Tensor:
    """What a model is given of what a split gave: images as contiguous float32 in [0, 1], token numbers as they are."""
    if fetched.dtype != torch.uint8:
        return fetched
    return fetched.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def num_workers(workers: int | Literal["auto"], split: Split, device: torch.device | str = "cpu") -> int:
    """Decoding processes for a split: none for one in memory.

    `auto`: beside an accelerator all cores but one, 8 at most. Beside training on the CPU, which costs far more than
    decoding, one of every four cores: where there are fewer than four, the training process decodes.
    """
    if not isinstance(split, ItemSplit):
        return 0
    if workers != "auto":
        return workers
    cores = usable_cores() // ranks.current().local_size
    return min(cores // 4 if torch.device(device).type == "cpu" else max(cores - 1, 0), _MOST_WORKERS)


class _Decoding(torch_data.Dataset[Tensor | KdctlError]):
    """A split whose items are whole batches; a user's error travels back as a value, with its text unchanged."""

    def __init__(self, split: ItemSplit) -> None:
        self._split = split

    def __getitem__(self, rows: Tensor) -> Tensor | KdctlError:
        try:
            return self._split.fetch(rows)
        except KdctlError as error:
            return error


def _resident(split: Split, device: torch.device) -> Split:
    """The split on a CUDA device where it takes at most a quarter of the free memory: its batches wait for no bus."""
    if device.type != "cuda" or not isinstance(split, ArraySplit):
        return split
    free, _ = torch.cuda.mem_get_info(device)
    return split.to(device) if 4 * split.images.numel() <= free else split


def _start_worker(_: int) -> None:
    """One thread, and the keyboard's interrupt left to the training process, which ends its workers itself."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _fetched(split: Split, batches: list[Tensor], workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows, what the split gives of them) of each batch, in order."""
    if not isinstance(split, ItemSplit) or workers == 0 or not batches:
        yield from ((rows, split.fetch(rows)) for rows in batches)
        return
    decoded = torch_data.DataLoader(
        _Decoding(split),
        batch_size=None,
        sampler=batches,
        num_workers=min(workers, len(batches)),
        worker_init_fn=_start_worker,
        collate_fn=_unchanged,  # type: ignore[arg-type]
        generator=torch.Generator().manual_seed(0),  # else it draws from the generator of dropout
    )
    with _worker_deaths():
        items = iter(decoded)
    for rows in batches:
        with _worker_deaths():
            images = next(items)
        if isinstance(images, KdctlError):
            raise images
        yield rows, images


@contextlib.contextmanager
def _worker_deaths() -> Iterator[None]:
    """Makes the death of a worker a KdctlError here, where its batch is waited for.

    torch's own handler of SIGCHLD would raise it wherever training happens to be, so it is taken out again.
    """
    handled = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGCHLD) if handled else None
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:  # by where in handing over a batch the worker was
        hint = "data.workers=0 decodes in the training process; a container may need more shared memory"
        raise KdctlError(Problem(f"a decoding process failed: {error}", hint=hint)) from error
    finally:
        if handled:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _unchanged(item: Tensor | KdctlError) -> Tensor | KdctlError:
    return item
