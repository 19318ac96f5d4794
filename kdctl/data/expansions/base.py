"""Further texts made of the training texts, without labels: there is no limit to what a teacher can be asked about.

Attempt number a of the n-th expansion is a function of (split_seed, n, a): the texts are the same in every run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kdctl import registry
from kdctl.config.schema import Component
from kdctl.config.types import PositiveInt
from kdctl.data import counter
from kdctl.data.base import Split, without_labels
from kdctl.data.expansions.words import Texts
from kdctl.data.tokens import TokenSplit
from kdctl.errors import ConfigError, KdctlError, Problem

_AT_ONCE = 1024
_ATTEMPTS, _LEAST_ATTEMPTS = 20, 10_000
"""After how many attempts for each text that is wanted, and how many at least, no more of them are looked for."""


class Expansion:
    """One way to make further texts. A user's own class has `count` and `make`, and `prepare` where it needs that.

    count: how many texts it makes.
    """

    def __init__(self, *, count: PositiveInt) -> None:
        self.count = count

    def prepare(self, texts: Texts) -> None:
        """Called once with the texts to come. Raises ConfigError for such that it cannot take."""

    def make(self, texts: Texts, draws: counter.Draws) -> Iterator[NDArray[np.int32] | None]:
        """One attempt for each sample of the draws: a text's token numbers, made by `texts.with_segments`, or None.

        Texts that are there already or too long are left out by the caller.
        """
        raise NotImplementedError


def further_texts(
    train: Split,
    known: Split,
    specs: Sequence[Component],
    seed: int,
    tokenizer: str | None,
    base: Path | None = None,
) -> list[TokenSplit]:
    """The texts, without labels, that each expansion makes of those of train; none twice and none of `known`.

    known: all texts that are trained on so far. tokenizer: the content of the tokenizer's file, None where there is
    none: then every token is a word. base: where a user's own file is looked for.
    Raises ConfigError where train has no texts, or fewer different ones can be made of them than are asked for.
    """
    if not isinstance(train, TokenSplit) or not isinstance(known, TokenSplit):
        hint = "leave data.expand out; data.transfer adds images without labels, data.augment changes those there are"
        raise ConfigError(Problem("texts are made of texts, and these are images", key="data.expand", hint=hint))
    texts = Texts(train, tokenizer)
    numbers, bounds = known.ids.numpy(), known.starts.tolist()
    seen = {numbers[a:b].tobytes() for a, b in pairwise(bounds)}
    splits = []
    for place, spec in enumerate(specs):
        with _located(f"data.expand.{place}"):
            expansion: Expansion = registry.create("expansions", spec.kind, spec.arguments, base=base)
            expansion.prepare(texts)
            made = _made(expansion, texts, seen, counter.key(counter.EXPAND, seed, place))
        targets = without_labels(train.targets[:1].repeat(len(made), *[1] * (train.targets.ndim - 1)))
        splits.append(TokenSplit.of(made, targets, train.tokens, asks=train.asks))
    return splits


def _made(expansion: Expansion, texts: Texts, seen: set[bytes], key: int) -> list[NDArray[np.int32]]:
    """As many texts as the expansion makes, none of which is in `seen`; they are added to it."""
    made: list[NDArray[np.int32]] = []
    most = max(_ATTEMPTS * expansion.count, _LEAST_ATTEMPTS) if len(texts) else 0
    for first in range(0, most, _AT_ONCE):
        draws = counter.Draws(counter.fold(key, torch.arange(first, first + _AT_ONCE)), 0)
        for text in expansion.make(texts, draws):
            if text is None or not 0 < len(text) <= texts.length or (content := text.tobytes()) in seen:
                continue
            seen.add(content)
            made.append(text)
            if len(made) == expansion.count:
                return made
    message = f"{expansion.count:,} further texts are asked for, and {len(made):,} were found in {most:,} attempts"
    hint = "a smaller count, arguments that allow more, or a larger data.max_length"
    raise ConfigError(Problem(message, key="count", hint=hint))


@contextmanager
def _located(key: str) -> Iterator[None]:
    """Puts the key of an expansion before those of its arguments, which its errors name."""
    try:
        yield
    except KdctlError as error:
        keyed = [dataclasses.replace(p, key=f"{key}.{p.key}" if p.key else key) for p in error.problems]
        raise type(error)(*keyed) from error
