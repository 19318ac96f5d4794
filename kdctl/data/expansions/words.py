"""Words of texts that are token numbers: which tokens belong together, and texts made of other words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdctl.data.tokens import TokenSplit
from kdctl.signals import TokenInput

Word = NDArray[np.int32]
"""The numbers of the tokens of a word."""
_MARKS = ("\u0120", "\u2581")
"""What stands for the space before a word in tokens of byte-level BPE (as in GPT-2) and of SentencePiece."""


class Vocabulary:
    """What the tokens of a tokenizer are to words, read from the tokenizer's file. Each token is a word without one.

    begins: (V,) bool, whether a word begins with a token wherever it stands. ends: whether a word ends with it. spaced:
    int32 (V,), the token that means the same behind a space, itself where there is none. letters: whether a token is a
    whole word made of letters.
    """

    def __init__(self, tokenizer: str | None, tokens: TokenInput) -> None:
        size = tokens.vocab_size
        self.numbers = {} if tokenizer is None else numbers_of(tokenizer)
        self.begins, self.ends = np.ones(size, bool), np.zeros(size, bool)
        self.spaced = np.arange(size, dtype=np.int32)
        self.letters = np.full(size, tokenizer is None)
        inside, behind, mark = _marks(tokenizer, self.numbers)
        for text, number in self.numbers.items():
            if behind:
                self.ends[number] = text.endswith(behind)
                self.begins[number] = False
            elif inside:
                self.begins[number] = not text.startswith(inside)
            elif mark:
                self.begins[number] = text.startswith(mark)
                self.spaced[number] = self.numbers.get(mark + text, number)
            whole = self.ends[number] if behind else self.begins[number]
            self.letters[number] = whole and text.removeprefix(mark).removesuffix(behind).isalpha()
        special = [n for n in (tokens.pad, tokens.first, tokens.separator, tokens.mask) if n is not None]
        self.letters[special] = False


def numbers_of(tokenizer: str) -> dict[str, int]:
    """The number of each token by its text, from the content of a tokenizer.json; empty where it names none."""
    vocab = json.loads(tokenizer).get("model", {}).get("vocab", {})
    if isinstance(vocab, list):  # of Unigram: pairs of a text and its score
        return {text: number for number, (text, _) in enumerate(vocab)}
    return dict(vocab)


def _marks(tokenizer: str | None, numbers: dict[str, int]) -> tuple[str, str, str]:
    """What a tokenizer writes before tokens inside words, behind those that end one, before those that begin one."""
    model: dict[str, Any] = {} if tokenizer is None else json.loads(tokenizer).get("model", {})
    kind = model.get("type")
    inside = model.get("continuing_subword_prefix") or ""
    behind = (model.get("end_of_word_suffix") or "") if kind == "BPE" else ""
    if kind not in ("BPE", "Unigram") or inside or behind:
        return inside, behind, ""
    return "", "", next((mark for mark in _MARKS if any(text.startswith(mark) for text in numbers)), "")


class Texts:
    """The texts of a split that have words, as segments of words: the text, or each text of a pair.

    Special tokens belong to no word: they stay where they are, around and between the segments. length: the most tokens
    that a text may have. vocabulary: what the tokens mean. num_words: of all texts together; most_words: of one.
    """

    def __init__(self, split: TokenSplit, tokenizer: str | None) -> None:
        self.length = split.tokens.length
        self.vocabulary = Vocabulary(tokenizer, split.tokens)
        self._ids: NDArray[np.int32] = split.ids.numpy()
        starts, size = split.starts.numpy(), len(self._ids)
        fresh = np.zeros(size + 1, bool)  # where a text begins
        fresh[starts] = True
        is_word = np.append(split.tokens.is_word(split.ids[None])[0].numpy(), False)
        goes_on = np.append(False, is_word[:-1]) & is_word & ~fresh  # in the segment of the token before
        begins = is_word[:-1] & ~goes_on[:-1]
        segment_starts, segment_ends = np.flatnonzero(begins), np.flatnonzero(is_word[:-1] & ~goes_on[1:]) + 1
        begins |= is_word[:-1] & self.vocabulary.begins[self._ids]
        begins[1:] |= is_word[1:-1] & self.vocabulary.ends[self._ids[:-1]]
        self._word_starts = np.flatnonzero(begins)
        self._segments = np.stack([np.searchsorted(self._word_starts, at) for at in (segment_starts, segment_ends)], 1)
        lengths = self._segments[:, 1] - self._segments[:, 0]
        self._word_ends = np.minimum(np.append(self._word_starts[1:], size), np.repeat(segment_ends, lengths))
        bounds = np.searchsorted(segment_starts, starts)
        rows = np.flatnonzero(bounds[1:] > bounds[:-1])
        self._first, self._last = bounds[rows].tolist(), bounds[rows + 1].tolist()
        self._starts, self._ends = starts[rows].tolist(), starts[rows + 1].tolist()
        self.num_words = len(self._word_starts)
        self.most_words = int(np.diff(np.searchsorted(self._word_starts, starts)).max(initial=0))

    def __len__(self) -> int:
        return len(self._first)

    def word(self, number: int) -> Word:
        """The word of this number, counted through all texts."""
        return self._ids[self._word_starts[number] : self._word_ends[number]]

    def segments(self, text: int) -> list[list[Word]]:
        """The words of each segment of a text."""
        return [[self.word(n) for n in range(a, b)] for a, b in self._bounds(text)]

    def with_segments(self, text: int, segments: Sequence[Sequence[Word]]) -> NDArray[np.int32]:
        """The token numbers of a text with other words in its segments, which are as many as it had."""
        parts: list[NDArray[np.int32]] = []
        done = self._starts[text]
        for (a, b), words in zip(self._bounds(text), segments, strict=True):
            parts += [self._ids[done : self._word_starts[a]], *words[:1], *(self._behind(word) for word in words[1:])]
            done = self._word_ends[b - 1]
        return np.concatenate([*parts, self._ids[done : self._ends[text]]])

    def single_tokens(self) -> NDArray[np.int64]:
        """The numbers, each once and sorted, of the tokens that are a word alone."""
        alone = self._word_ends - self._word_starts == 1
        return np.unique(self._ids[self._word_starts[alone]]).astype(np.int64)

    def _bounds(self, text: int) -> list[list[int]]:
        """The number of the first word of each segment, and that behind its last."""
        bounds: list[list[int]] = self._segments[self._first[text] : self._last[text]].tolist()
        return bounds

    def _behind(self, word: Word) -> Word:
        """A word as it is written behind another: one that a text begins with may be written without a space."""
        spaced = self.vocabulary.spaced[word[0]]
        return word if spaced == word[0] else np.append(spaced, word[1:])
