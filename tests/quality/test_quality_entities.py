"""Entities of tagged words: exact spans, as CoNLL counts them."""

from __future__ import annotations

import numpy as np
import pytest

from kdctl.quality.entities import describe_entities, spans

NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def numbers(text: str) -> np.ndarray:
    return np.array([NAMES.index(word) for word in text.split()])


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-PER I-PER O", {(0, 1, 3, "PER")}),
        ("B-PER B-PER I-PER", {(0, 0, 1, "PER"), (0, 1, 3, "PER")}),
        ("B-PER I-LOC I-LOC", {(0, 0, 1, "PER"), (0, 1, 3, "LOC")}),
        ("I-PER I-PER O I-PER", {(0, 0, 2, "PER"), (0, 3, 4, "PER")}),
        ("O O", set()),
    ],
)
def test_spans(tags: str, found: set[tuple[int, int, int, str]]) -> None:
    made = numbers(tags)
    assert spans(made, np.zeros(len(made), np.int64), NAMES) == found


def test_an_entity_ends_with_its_text() -> None:
    assert spans(numbers("B-PER I-PER"), np.array([3, 4]), NAMES) == {(3, 0, 1, "PER"), (4, 1, 2, "PER")}


def test_counts_by_hand() -> None:
    """True: ann lee, oslo, lima. Said: ann alone, oslo, lima, and bob, who is none."""
    true = numbers("B-PER I-PER O B-LOC O B-LOC O")
    said = numbers("B-PER O O B-LOC O B-LOC B-PER")
    made = describe_entities(np.eye(5)[said], true, np.zeros(7, np.int64), NAMES)
    assert made == {
        "entity_precision": pytest.approx(50.0),
        "entity_recall": pytest.approx(200 / 3),
        "entity_f1": pytest.approx(400 / 7),
    }


def test_only_where_the_classes_are_such_tags() -> None:
    rows, targets, index = np.eye(2), np.array([0, 1]), np.zeros(2, np.int64)
    assert describe_entities(rows, targets, index, ["O", "noun"]) == {}
    assert describe_entities(rows, targets, index, ["B-X", "I-X"]) == {}
    assert describe_entities(rows, np.array([0, 0]), index, ["O", "B-X"])["entity_recall"] is None
