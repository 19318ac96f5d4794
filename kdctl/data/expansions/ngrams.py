"""Pieces of texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kdctl.config.types import PositiveInt
from kdctl.data import counter
from kdctl.data.expansions.base import Expansion
from kdctl.data.expansions.words import Texts, Word
from kdctl.errors import ConfigError, Problem


class Ngrams(Expansion):
    """Words that follow each other in a text, all texts equally likely; of a pair, a piece of each of its texts.

    A piece has `shortest` to `longest` words, each number as likely; the place is drawn too. A text, or a text of a
    pair, that has no more words than `shortest` stays whole.
    Source: Tang et al., Distilling Task-Specific Knowledge from BERT into Simple Neural Networks, 2019, draw n-grams of
    1 to 5 words as one of three rules for further texts that the teacher labels.

    count: how many texts are made. shortest, longest: words of a piece.
    """

    def __init__(self, *, count: PositiveInt, shortest: PositiveInt = 2, longest: PositiveInt = 12) -> None:
        super().__init__(count=count)
        if longest < shortest:
            message = f"the longest piece has {longest} words and the shortest {shortest}"
            raise ConfigError(Problem(message, key="longest", hint=f"{shortest} or more, or a smaller shortest"))
        self.shortest, self.longest = shortest, longest

    def make(self, texts: Texts, draws: counter.Draws) -> Iterator[NDArray[np.int32] | None]:
        rows, parts = draws.below(len(texts)).tolist(), draws.uniforms(4).tolist()
        for text, drawn in zip(rows, parts, strict=True):
            segments = texts.segments(text)
            pieces = [
                piece(words, self.shortest, self.longest, *drawn[2 * n : 2 * n + 2]) for n, words in enumerate(segments)
            ]
            yield texts.with_segments(text, pieces)


def piece(words: Sequence[Word], shortest: int, longest: int, size: float, place: float) -> Sequence[Word]:
    """So many of some words one after the other: their number and place by two numbers drawn in [0, 1).

    All of the words where there are no more than `shortest`.
    """
    most = min(longest, len(words))
    count = min(shortest + int(size * (most - shortest + 1)), most) if most > shortest else min(shortest, len(words))
    start = int(place * (len(words) - count + 1))
    return words[start : start + count]
