"""Texts with some of their words exchanged, taken from elsewhere, or dropped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdctl.config.types import Fraction, PositiveInt
from kdctl.data import counter
from kdctl.data.expansions.base import Expansion
from kdctl.data.expansions.words import Texts, Word
from kdctl.errors import ConfigError, Problem

Drawn = NDArray[Any]


class Swaps(Expansion):
    """A text in which each word is changed with probability `rate`, and one at least, in one of the ways of `how`.

    `within`: exchanged with another word of the same text; of a pair, of the same one of its texts. `between`: replaced
    by a word that stands anywhere in the training texts, frequent ones more often. `drop`: left out. Each way is as
    likely. A text of which nothing is left is drawn again.
    Source: random swap and random deletion of Wei and Zou, EDA: Easy Data Augmentation Techniques for Boosting
    Performance on Text Classification Tasks, EMNLP 2019, with 0.1 of the words. It keeps labels; here the teacher is
    asked.

    count: how many texts are made. rate: share of words changed. how: the ways, one or more.
    """

    def __init__(
        self,
        *,
        count: PositiveInt,
        rate: Fraction = 0.1,
        how: tuple[Literal["within", "between", "drop"], ...] = ("within", "between", "drop"),
    ) -> None:
        super().__init__(count=count)
        if not how:
            raise ConfigError(Problem("got no way to change a word", key="how", hint="allowed: within, between, drop"))
        self.rate, self.how = rate, tuple(how)

    def make(self, texts: Texts, draws: counter.Draws) -> Iterator[NDArray[np.int32] | None]:
        rows = draws.below(len(texts)).tolist()
        drawn, ways, others = (draws.uniforms(texts.most_words).numpy() for _ in range(3))
        for attempt, text in enumerate(rows):
            segments = texts.segments(text)
            chances = drawn[attempt, : sum(map(len, segments))]
            changed = (chances < self.rate) | (chances == chances.min())
            first, kept = 0, []
            for words in segments:
                part = slice(first, first := first + len(words))
                kept.append(self._changed(words, texts, changed[part], ways[attempt, part], others[attempt, part]))
            yield texts.with_segments(text, kept) if all(kept) else None

    def _changed(self, words: list[Word], texts: Texts, changed: Drawn, ways: Drawn, others: Drawn) -> list[Word]:
        """The words with some of them changed, in ways and with other words that numbers drawn in [0, 1) name."""
        dropped = set()
        for place in np.flatnonzero(changed).tolist():
            way, other = self.how[int(ways[place] * len(self.how))], float(others[place])
            if way == "drop":
                dropped.add(place)
            elif way == "between":
                words[place] = texts.word(int(other * texts.num_words))
            else:
                partner = int(other * len(words))
                words[place], words[partner] = words[partner], words[place]
        return [word for place, word in enumerate(words) if place not in dropped]
