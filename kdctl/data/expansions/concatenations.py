"""Texts one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kdctl.config.types import Fraction, PositiveInt
from kdctl.data import counter
from kdctl.data.expansions.base import Expansion
from kdctl.data.expansions.ngrams import piece
from kdctl.data.expansions.words import Texts


class Concatenations(Expansion):
    """Two texts one after the other, drawn from all texts, as one; of pairs, the first texts and the second ones.

    Each of the two is a piece with probability `pieces`: of any number of words, each as likely, at any place. What is
    longer together than a text may be is drawn again.
    Source: none; sentences joined as training texts: Kondo et al., Sentence Concatenation Approach to Data Augmentation
    for Neural Machine Translation, NAACL student workshop 2021.

    count: how many texts are made. pieces: the probability that a piece is taken instead of the whole.
    """

    def __init__(self, *, count: PositiveInt, pieces: Fraction = 0.5) -> None:
        super().__init__(count=count)
        self.pieces = pieces

    def make(self, texts: Texts, draws: counter.Draws) -> Iterator[NDArray[np.int32] | None]:
        if len(texts) < 2:
            return
        firsts, steps = draws.below(len(texts)).tolist(), draws.below(len(texts) - 1).tolist()
        for text, step, drawn in zip(firsts, steps, draws.uniforms(10).tolist(), strict=True):
            halves = []
            for number, row in enumerate((text, (text + 1 + step) % len(texts))):
                segments, (cut, *places) = texts.segments(row), drawn[5 * number : 5 * number + 5]
                if cut < self.pieces:
                    segments = [
                        list(piece(words, 1, len(words), *places[2 * n : 2 * n + 2]))
                        for n, words in enumerate(segments)
                    ]
                halves.append(segments)
            same = len(halves[0]) == len(halves[1])  # of a pair, one text may have no words
            yield texts.with_segments(text, [a + b for a, b in zip(*halves, strict=True)]) if same else None
