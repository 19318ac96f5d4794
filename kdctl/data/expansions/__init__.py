"""The table of expansions, which make further texts of the training texts: name -> ("module:Class", summary)."""

from __future__ import annotations

EXPANSIONS = {
    "ngrams": ("ngrams:Ngrams", "pieces of a text: words that follow each other"),
    "concatenations": ("concatenations:Concatenations", "two texts, or pieces of them, one after the other"),
    "swaps": ("swaps:Swaps", "some words exchanged, taken from another text, or dropped"),
    "neighbours": (
        "neighbours:Neighbours",
        "some words replaced by others of like embedding (TinyBERT, EMNLP Findings 2020)",
    ),
}
