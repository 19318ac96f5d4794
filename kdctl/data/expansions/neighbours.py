"""Texts with some of their words replaced by similar ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import safetensors
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kdctl.config.types import Fraction, PathStr, PositiveInt
from kdctl.data import counter
from kdctl.data.expansions.base import Expansion
from kdctl.data.expansions.words import Texts, numbers_of
from kdctl.data.tokenizer import FILE
from kdctl.errors import ConfigError, MissingError, Problem

_WEIGHTS = ("model.safetensors", "student.safetensors")
_TABLE = "word_embeddings.weight"
_ROWS = 1024
"""Words whose neighbours are looked for at once."""


class Neighbours(Expansion):
    """A text in which each word is replaced with probability `rate` by one of the `nearest` words nearest to it.

    Nearest by the cosine of their rows in a model's table of token embeddings. Words of one token that is made of
    letters are replaced, by such words; numbers, punctuation, and words of several tokens stay.
    Source: Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding, EMNLP Findings 2020, Algorithm 1,
    p_t 0.4 and K 15, 20 texts for each (N_a). It differs: there BERT predicts a masked word from its context, and words
    of several tokens are replaced by neighbours in GloVe; here every word has the same neighbours in all contexts. Its
    code also leaves stop words alone.

    count: how many texts are made. embeddings: the folder of a published BERT encoder (model.safetensors), or a run
    directory, with the data's tokenizer. rate: share of words replaced (p_t). nearest: from how many one is drawn (K).
    """

    def __init__(
        self, *, count: PositiveInt, embeddings: PathStr, rate: Fraction = 0.4, nearest: PositiveInt = 15
    ) -> None:
        super().__init__(count=count)
        self.folder, self.rate, self.nearest = Path(embeddings).expanduser(), rate, nearest

    def prepare(self, texts: Texts) -> None:
        letters = texts.vocabulary.letters
        table = _table(self.folder, texts)
        candidates = torch.from_numpy(np.flatnonzero(letters & texts.vocabulary.begins))
        if len(candidates) <= self.nearest:
            message = f"got {self.nearest}, and the tokenizer has {len(candidates)} tokens that are a word of letters"
            raise ConfigError(Problem(message, key="nearest", hint="take fewer"))
        alone = texts.single_tokens()
        words = alone[letters[alone]]
        self._row = np.full(len(letters), -1)
        self._row[words] = np.arange(len(words))
        self._near = nearest_rows(table, torch.from_numpy(words), candidates, self.nearest).numpy().astype(np.int32)

    def make(self, texts: Texts, draws: counter.Draws) -> Iterator[NDArray[np.int32] | None]:
        rows = draws.below(len(texts)).tolist()
        changed = draws.uniforms(texts.most_words).numpy() < self.rate
        which = (draws.uniforms(texts.most_words) * self.nearest).long().numpy()
        for attempt, text in enumerate(rows):
            segments, place = texts.segments(text), 0
            for words in segments:
                for number, word in enumerate(words):
                    row = self._row[word[0]] if len(word) == 1 and changed[attempt, place] else -1
                    if row >= 0:
                        words[number] = self._near[row, which[attempt, place], None]
                    place += 1
            yield texts.with_segments(text, segments)


def nearest_rows(table: Tensor, rows: Tensor, candidates: Tensor, count: int) -> Tensor:
    """(R, count) of the candidates (C,) those whose rows of a table (V, D) are nearest by cosine to each row's.

    A row is no neighbour of its own. Equal ones come in the order of their numbers: the last digits of a product depend
    on the machine, so more than are needed are found in float32, and put in order in float64, rounded.
    """
    unit = F.normalize(table.float(), dim=1)
    others, shortlist = unit[candidates], min(2 * count + 8, len(candidates))
    found = []
    for part in rows.split(_ROWS):
        cosines = unit[part] @ others.T
        cosines.masked_fill_(part[:, None] == candidates, -2)
        few = candidates[cosines.topk(shortlist, dim=1).indices].sort(1).values
        exact = (unit[few].double() @ unit[part].double()[:, :, None])[:, :, 0].mul(1e9).round()
        order = exact.masked_fill(few == part[:, None], -4e9).argsort(dim=1, descending=True, stable=True)
        found.append(few.gather(1, order)[:, :count])
    return torch.cat(found) if found else torch.zeros(0, count, dtype=torch.int64)


def _table(folder: Path, texts: Texts) -> Tensor:
    """The token embeddings (V, D) of the model in a folder, whose tokens must be those of the texts."""
    path = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        hint = f"name a folder with {' or '.join(_WEIGHTS)}"
        raise MissingError(Problem(f"there are no weights in {folder}", key="embeddings", hint=hint))
    theirs = folder / FILE
    numbers = texts.vocabulary.numbers
    if numbers and theirs.is_file() and _numbers(theirs) != numbers:
        hint = f"data.tokenizer: {folder}, or a model that was made for the data's tokenizer"
        raise ConfigError(Problem(f"the tokenizer of {folder} is not that of the data", key="embeddings", hint=hint))
    try:
        with safetensors.safe_open(path, "pt") as file:
            name = next((name for name in file.keys() if f".{name}".endswith(f".{_TABLE}")), None)
            table: Tensor | None = None if name is None else file.get_tensor(name)
    except (safetensors.SafetensorError, OSError) as error:
        raise ConfigError(Problem(f"{path} is damaged: {error}", key="embeddings")) from None
    if table is None or table.ndim != 2:
        _wrong(f"{path} has no table '{_TABLE}'")
    if len(table) < len(texts.vocabulary.begins):
        _wrong(f"{path} has embeddings of {len(table):,} tokens, and the data {len(texts.vocabulary.begins):,} tokens")
    return table


def _numbers(path: Path) -> dict[str, int]:
    try:
        return numbers_of(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(Problem(f"{path} is no tokenizer: {error}", key="embeddings")) from None


def _wrong(message: str) -> NoReturn:
    raise ConfigError(Problem(message, key="embeddings", hint="name a BERT encoder with the data's tokenizer"))
