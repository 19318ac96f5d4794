"""Whole entities of texts whose words are tagged B-KIND, I-KIND and O: found exactly, or not at all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdctl.tasks.classification import as_array, predictions

Span = tuple[int, int, int, str]
"""The text, the places of the first word and of the one behind the last, and the kind."""


def describe_entities(
    logits: ArrayLike, targets: ArrayLike, index: ArrayLike, names: Sequence[str]
) -> dict[str, float | None]:
    """Precision, recall and F1 of entities in percent, where the classes are such tags; else nothing.

    logits, targets: of each labelled word (R, C) and (R,), index: (R,), which text it is of, words of a text one after
    the other. An entity counts where its first word, its last and its kind are right. It ends where another tag comes;
    an I-KIND behind something of another kind begins one, as in CoNLL's own script.
    None where there is nothing to divide by.
    Source: Tjong Kim Sang & De Meulder, Introduction to the CoNLL-2003 shared task, 2003.
    """
    if "O" not in names or len(names) < 2 or not all(name == "O" or name[:2] in ("B-", "I-") for name in names):
        return {}
    texts = np.asarray(index)
    said = spans(predictions(logits), texts, names)
    true = spans(as_array(targets).astype(np.int64), texts, names)
    right = len(said & true)
    precision = 100 * right / len(said) if said else None
    recall = 100 * right / len(true) if true else None
    f1 = 200 * right / (len(said) + len(true)) if said or true else None
    return {"entity_precision": precision, "entity_recall": recall, "entity_f1": f1}


def spans(tags: NDArray[np.int64], texts: NDArray[np.int64], names: Sequence[str]) -> set[Span]:
    """The entities that the tags (R,) of the words of some texts (R,) mark; a negative tag marks nothing."""
    found: set[Span] = set()
    begun, kind, text = 0, "", -1
    for place, (tag, own) in enumerate(zip(tags.tolist(), texts.tolist(), strict=True)):
        name = names[tag] if tag >= 0 else "O"
        goes_on = name == f"I-{kind}" and own == text
        if kind and not goes_on:
            found.add((text, begun, place, kind))
        if not goes_on:
            begun, kind = place, name[2:]
        text = own
    if kind:
        found.add((text, begun, len(tags), kind))
    return found
