"""Embeddings of texts: nearest neighbours against a loop, and what has none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kdctl.errors import ConfigError
from kdctl.signals import IGNORE, Batch
from kdctl.tasks import embedding
from kdctl.tasks.embedding import SentenceEmbedding, nearest, same_class_nearest

DRAW = np.random.default_rng(0)
VECTORS = DRAW.normal(size=(11, 5)) * DRAW.uniform(0.1, 9, size=(11, 1))
LABELS = np.array([0, 1, 0, 1, 2, IGNORE, 0, 1, IGNORE, 2, 0])


def by_hand(vectors: np.ndarray) -> list[int]:
    found = []
    for i, own in enumerate(vectors):
        cosines = [own @ other / math.hypot(*own) / math.hypot(*other) for other in vectors]
        found.append(max((j for j in range(len(vectors)) if j != i), key=lambda j: cosines[j]))
    return found


@pytest.mark.parametrize("block", [3, 1024])
def test_nearest_is_the_largest_cosine_of_another(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "_BLOCK", block)
    assert nearest(VECTORS).tolist() == by_hand(VECTORS)


def test_of_equal_neighbours_the_first_counts_and_what_has_no_direction_has_none() -> None:
    vectors = np.array([[1.0, 0], [2, 0], [0, 0], [np.nan, 1], [3, 0]])
    assert nearest(vectors).tolist() == [1, 0, -1, -1, 0]
    assert nearest(np.ones((1, 2))).tolist() == [-1]
    assert nearest(np.array([[1.0, 0], [0, 0]])).tolist() == [-1, -1]


def test_labelled_texts_are_measured_among_themselves() -> None:
    kept = LABELS != IGNORE
    truth = LABELS[kept]
    right = [truth[j] == truth[i] for i, j in enumerate(by_hand(VECTORS[kept]))]
    assert same_class_nearest(VECTORS, LABELS) == pytest.approx(100 * np.mean(right))
    assert SentenceEmbedding().metrics()["nearest"](torch.tensor(VECTORS), torch.tensor(LABELS)) == pytest.approx(
        100 * np.mean(right)
    )
    assert math.isnan(same_class_nearest(VECTORS, np.full(11, IGNORE)))
    assert same_class_nearest(np.zeros((4, 2)), np.zeros(4)) == 0


def test_chance_is_that_another_text_has_the_class() -> None:
    assert SentenceEmbedding().chance(LABELS) == pytest.approx(100 * (4**2 + 3**2 + 2**2) / 9**2)
    assert math.isnan(SentenceEmbedding().chance(np.full(3, IGNORE)))


def test_models_of_different_widths_agree_where_neighbours_are_the_same() -> None:
    rotated = VECTORS @ np.linalg.qr(DRAW.normal(size=(5, 5)))[0]
    wider = np.concatenate([rotated, np.zeros((11, 2))], 1)
    assert SentenceEmbedding().agreement(VECTORS, wider) == 100
    other = VECTORS[:, :3]
    same = np.array(by_hand(VECTORS)) == np.array(by_hand(other))
    assert 0 < same.mean() < 1
    assert SentenceEmbedding().agreement(VECTORS, other) == pytest.approx(100 * same.mean())


def test_there_is_no_loss_of_its_own() -> None:
    index = torch.arange(2)
    batch = Batch(torch.ones(2, 3, dtype=torch.int64), index, index, index)
    signals = SentenceEmbedding().signals(torch.ones(2, 7), batch)
    assert signals.link == "embedding"
    with pytest.raises(ConfigError, match="no loss of its own"):
        SentenceEmbedding().supervised(signals, batch)
    with pytest.raises(ConfigError, match="shape"):
        SentenceEmbedding().signals(torch.ones(2, 3, 7), batch)
