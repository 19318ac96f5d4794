"""Batched augmentation as a pure function of (seed, sample index, view, stream): no hidden random state.

An operation turns a batch of uint8 images (N, C, H, W) into another, given one choice or a few draws for each sample.
An operation with finitely many outcomes numbers them, so that a chain of such operations can be enumerated
(`views: all`): then the view's number takes the place of the draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdctl.data import counter
from kdctl.data.base import Shape, Split
from kdctl.errors import ConfigError, Problem

_MOST_VIEWS = 1 << 31
_PART_BYTES = 1 << 20
"""What a CPU works on at once: larger batches go through in parts that stay in its cache."""


class Augmentation:
    """One augmentation. A user's own class has these four methods.

    `draw` gives the parameters of each sample, `apply` uses them. Where `num_choices` is a number n, the parameters are
    one number 0..n-1 for each sample (N,) int64, and every such number is an outcome.
    """

    def prepare(self, split: Split) -> None:
        """Called once with the samples to come. Raises ConfigError for inputs that it cannot take."""
        if len(split.input_shape) != 3:
            message = f"{type(self).__name__} changes images, and these are texts"
            raise ConfigError(Problem(message, key="data.augment", hint="for texts: mask_tokens"))

    def output_shape(self, shape: Shape) -> Shape:
        """The shape (C, H, W) of what comes out of images of this shape. Raises ConfigError for one it cannot take."""
        return shape

    def num_choices(self, shape: Shape) -> int | None:
        """How many outcomes an image of this shape has, None where they cannot be counted."""
        return None

    def draw(self, draws: counter.Draws, shape: Shape) -> Any:
        """The random parameters of a batch: a choice, all equally likely, where choices are finite."""
        count = self.num_choices(shape)
        if count is None:
            raise NotImplementedError(f"{type(self).__name__} has no finite choices and must say what it draws")
        return draws.below(count)

    def apply(self, images: Tensor, parameters: Any) -> Tensor:
        """uint8 images (N, C, H, W) -> uint8 (N, C, H', W')."""
        raise NotImplementedError


class Augment:
    """A chain of operations, in order.

    seed: of all draws. enumerated: whether view v is the v-th outcome of the finite chain instead of fresh draws.
    """

    def __init__(self, operations: Sequence[Augmentation], *, seed: int = 0, enumerated: bool = False) -> None:
        self.operations = list(operations)
        self.seed = seed
        self.enumerated = enumerated

    def output_shape(self, shape: Shape) -> Shape:
        """The shape (C, H, W) of augmented images. Raises ConfigError where an operation cannot take its input."""
        for operation in self.operations:
            shape = operation.output_shape(shape)
        return shape

    def num_choices(self, shape: Shape) -> int | None:
        """How many views of an image the chain has in all; None where that is not finite (or 2^31 and more)."""
        counts = self._counts(shape)
        total = math.prod(c for c in counts if c is not None)
        return None if None in counts or total >= _MOST_VIEWS else total

    def _counts(self, shape: Shape) -> list[int | None]:
        counts = []
        for operation in self.operations:
            counts.append(operation.num_choices(shape))
            shape = operation.output_shape(shape)
        return counts

    def enumerate(self, shape: Shape) -> Augment:
        """The same chain with its views enumerated. Raises ConfigError naming the operation that has no finite set."""
        for operation, count in zip(self.operations, self._counts(shape), strict=True):
            if count is None:
                message = f"'all' needs finitely many views, and {type(operation).__name__} draws from a continuum"
                raise ConfigError(Problem(message, key="data.views", hint="use views: fresh, or a number of views"))
        if self.num_choices(shape) is None:
            message = "these augmentations have more than 2^31 views together"
            raise ConfigError(Problem(message, key="data.views", hint="use views: fresh, or a number of views"))
        return Augment(self.operations, seed=self.seed, enumerated=True)

    def __call__(self, images: Tensor, index: Tensor, view: Tensor, stream: int = 0) -> Tensor:
        """Augmented images: uint8 (N, C, H, W) -> uint8 (N, C, H', W').

        index, view: (N,) int64 on the images' device. stream: tells several augmented versions of one view apart.
        """
        if not self.operations:
            return images
        parts = images.split(max(1, _PART_BYTES // images[0].numel())) if images.device.type == "cpu" else (images,)
        if len(parts) == 1:
            return self._apply(images, index, view, stream)
        result = images.new_empty(len(images), *self.output_shape(_shape(images)))
        start = 0
        for part in parts:
            rows = slice(start, start + len(part))
            result[rows] = self._apply(part, index[rows], view[rows], stream)
            start = rows.stop
        return result

    def _apply(self, images: Tensor, index: Tensor, view: Tensor, stream: int) -> Tensor:
        if self.enumerated:
            return self._apply_choices(images, view, stream)
        keys = counter.fold(counter.fold(counter.key(counter.AUGMENT, self.seed, stream), index), view)
        for number, operation in enumerate(self.operations):
            draws = counter.Draws(keys, number)
            images = operation.apply(images, operation.draw(draws, _shape(images)))
        return images

    def _apply_choices(self, images: Tensor, view: Tensor, stream: int) -> Tensor:
        counts = [c or 1 for c in self._counts(_shape(images))]
        total = math.prod(counts)
        # A stride without common divisor visits every choice and makes neighbouring views differ in all operations;
        # another stream is half a cycle away.
        choice = (view + stream * (total // 2 + 1)) % total * _stride(total) % total
        for operation, count in zip(self.operations, counts, strict=True):
            images = operation.apply(images, choice % count)
            choice = choice // count
        return images


def _shape(images: Tensor) -> Shape:
    return tuple(images.shape[1:])


def _stride(total: int) -> int:
    """A number prime to total near its golden section."""
    stride = max(1, round(total * 0.618))
    while math.gcd(stride, total) != 1:
        stride += 1
    return stride


class Views:
    """Which view of each sample an epoch shows.

    kind: "fresh": view = epoch. k: view = epoch modulo k. "all": every view in turn, from a start that differs from
    sample to sample, so that a batch mixes views; num_views is then how many there are.
    """

    def __init__(self, kind: int | str, seed: int, num_views: int | None) -> None:
        self.kind = kind
        self.num_views = kind if isinstance(kind, int) else num_views if kind == "all" else None
        if num_views == 1:  # there is nothing to draw
            self.num_views = 1
        self._key = counter.key(counter.OFFSET, seed)

    def turn(self, epoch: int) -> int:
        """Names an epoch's views: epochs of equal turn show every sample in the same view."""
        return epoch if self.num_views is None else epoch % self.num_views

    def at(self, epoch: int, index: Tensor) -> Tensor:
        """(N,) int64: the view of each sample in this epoch."""
        turn = self.turn(epoch)
        if self.kind != "all" or self.num_views is None:
            return torch.full_like(index, turn)
        return (counter.fold(self._key, index) + turn) % self.num_views
