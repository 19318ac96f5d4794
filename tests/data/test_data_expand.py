"""Further texts: what each expansion makes of texts, that none comes twice, and what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from kdctl.config.schema import Component, DataSpec, StageData
from kdctl.data import counter
from kdctl.data.base import ArraySplit, Dataset
from kdctl.data.expansions.neighbours import Neighbours, nearest_rows
from kdctl.data.expansions.words import Texts, Vocabulary
from kdctl.data.prepare import Data, split_dataset
from kdctl.data.tokens import TokenSplit
from kdctl.errors import ConfigError, MissingError
from kdctl.signals import IGNORE, TokenInput

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "##s", "##ly", ",", "42", *"abcdefghijklmnopqrst"]
VOCAB = {word: number for number, word in enumerate(WORDS)}
TOKENS = TokenInput(len(WORDS), 12, pad=0, first=2, separator=3, mask=4)
WORDPIECE = json.dumps({"model": {"type": "WordPiece", "continuing_subword_prefix": "##", "vocab": VOCAB}})
TEXTS = ["a b ##s c", "d ##s ##ly e f g", "h ##ly , i j ##s", "k l m n ##s 42 o", "p q r", "s t a"]


def split(texts: list[str], pairs: bool = False) -> TokenSplit:
    """Texts in words that are tokens; `|` ends the first text of a pair."""
    rows = [[2, *(VOCAB["[SEP]" if word == "|" else word] for word in text.split()), 3] for text in texts]
    tokens = TokenInput(**{**vars(TOKENS), "pairs": pairs})
    return TokenSplit.of(rows, torch.arange(len(texts)) % 2, tokens)


def data(
    *expand: dict[str, Any],
    texts: list[str] = TEXTS,
    tokenizer: str | None = WORDPIECE,
    pairs: bool = False,
    **spec: Any,
) -> Data:
    made = Dataset(split(texts, pairs), class_names=["no", "yes"], tokenizer=tokenizer)
    components = [Component(**item) for item in expand]
    return split_dataset(made, DataSpec(kind="text", expand=components, **{"val_fraction": 0.0, **spec}))


def rows_of(found: Data) -> list[str]:
    """The tokens of all training texts, special ones included."""
    whole = found.whole
    assert isinstance(whole, TokenSplit)
    bounds = itertools.pairwise(whole.starts.tolist())
    return [" ".join(WORDS[number] for number in whole.ids[a:b].tolist()) for a, b in bounds]


def further(found: Data, texts: list[str] = TEXTS) -> list[str]:
    """The tokens of the further texts between the first special token and the last."""
    rows = rows_of(found)[len(texts) :]
    assert all(row.startswith("[CLS] ") and row.endswith(" [SEP]") for row in rows)
    return [row.removeprefix("[CLS] ").removesuffix(" [SEP]") for row in rows]


def words_of(text: str) -> list[str]:
    return text.replace(" ##", "##").split()


def pieces_of(text: str, shortest: int = 1, longest: int = 99) -> set[str]:
    words = words_of(text)
    spans = [(a, b) for a in range(len(words)) for b in range(a + shortest, min(a + longest, len(words)) + 1)]
    return {" ".join(words[a:b]).replace("##", " ##") for a, b in spans}


# ----------------------------------------------------------------------------------------------------------- each kind


def test_ngrams_are_all_the_pieces_of_whole_words() -> None:
    allowed = set().union(*(pieces_of(text, 2, 4) for text in TEXTS)) - set(TEXTS)
    found = further(data({"kind": "ngrams", "count": len(allowed), "shortest": 2, "longest": 4}))
    assert sorted(found) == sorted(allowed)


def test_ngrams_of_a_pair_are_pieces_of_both_texts() -> None:
    texts = ["a b ##s c | d e", "f g | h ##ly i j"]
    found = further(data({"kind": "ngrams", "count": 12, "shortest": 1}, texts=texts, pairs=True), texts)
    for text in found:
        halves = text.split(" [SEP] ")
        assert len(halves) == 2
        assert any(all(h in pieces_of(w) for h, w in zip(halves, t.split(" | "), strict=True)) for t in texts)


@pytest.mark.parametrize("pieces", [0.0, 1.0])
def test_concatenations_are_two_texts_or_pieces_of_them(pieces: float) -> None:
    texts = TEXTS[:3]
    parts = {text: pieces_of(text) if pieces else {text} for text in texts}
    allowed = {f"{a} {b}" for one, other in itertools.permutations(texts, 2) for a in parts[one] for b in parts[other]}
    allowed = {text for text in allowed if len(text.split()) <= 10} - set(texts)
    found = further(data({"kind": "concatenations", "count": 4, "pieces": pieces}, texts=texts), texts)
    assert set(found) <= allowed and (pieces or set(found) == allowed)


def test_concatenated_pairs_stay_pairs() -> None:
    texts = ["a | b ##s", "c | d", "e | f", " | g"]
    wanted = {"a c | b ##s d", "a e | b ##s f", "c a | d b ##s", "c e | d f", "e a | f b ##s", "e c | f d"}
    found = further(data({"kind": "concatenations", "count": 6, "pieces": 0.0}, texts=texts, pairs=True), texts)
    assert {text.replace("[SEP]", "|") for text in found} == wanted


def test_words_are_dropped_one_at_least() -> None:
    found = further(data({"kind": "swaps", "count": 18, "rate": 0.0, "how": ["drop"]}))
    allowed = [
        [word for number, word in enumerate(words_of(text)) if number != dropped]
        for text in TEXTS
        for dropped in range(len(words_of(text)))
    ]
    assert all(words_of(text) in allowed for text in found)


def test_words_are_exchanged_within_a_text() -> None:
    texts = ["a b ##s | c d", "e f | g h ##ly ##s i"]
    found = further(data({"kind": "swaps", "count": 8, "rate": 0.5, "how": ["within"]}, texts=texts, pairs=True), texts)
    halves = {tuple(tuple(sorted(words_of(half))) for half in text.split(" [SEP] ")) for text in found}
    assert halves == {(("a", "b##s"), ("c", "d")), (("e", "f"), ("g", "h##ly##s", "i"))}


def test_words_come_from_other_texts() -> None:
    found = further(data({"kind": "swaps", "count": 60, "rate": 0.3, "how": ["between"]}))
    every = {word for text in TEXTS for word in words_of(text)}
    changed = 0
    for text in found:
        words = words_of(text)
        near = [words_of(t) for t in TEXTS if len(words_of(t)) == len(words)]
        assert set(words) <= every
        changed += min(sum(a != b for a, b in zip(words, other, strict=True)) for other in near)
    assert 1.0 <= changed / len(found) < 2.2  # 0.3 of some 4 words, and one at least


def test_the_ways_of_changing_words_are_mixed() -> None:
    found = further(data({"kind": "swaps", "count": 60}))
    lengths = [len(words_of(text)) for text in found]
    assert any(sorted(words_of(text)) == sorted(words_of(t)) for text in found for t in TEXTS)
    assert min(lengths) == 2 and max(lengths) == 6


# ---------------------------------------------------------------------------------------------------------- neighbours


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A folder of a model whose embeddings stand on a circle in the order of the alphabet."""
    angles = torch.arange(len(WORDS), dtype=torch.float32) * 0.1
    table = torch.stack([angles.cos(), angles.sin()], 1) * torch.linspace(1, 3, len(WORDS))[:, None]
    safetensors.torch.save_file({"embeddings.word_embeddings.weight": table}, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_text(WORDPIECE)
    return tmp_path


def test_neighbours_replace_whole_words_of_letters_by_the_nearest(encoder: Path) -> None:
    given = {3: "a t m", 5: "l , m ##s 42 j"}
    words = Texts(split(list(given.values())), WORDPIECE)
    expansion = Neighbours(count=1, embeddings=str(encoder), rate=0.4, nearest=2)
    expansion.prepare(words)
    seen: dict[str, list[str]] = {word: [] for text in given.values() for word in words_of(text)}
    for row in expansion.make(words, counter.Draws(torch.arange(400), 0)):
        assert row is not None
        made = words_of(" ".join(WORDS[number] for number in row.tolist()))[1:-1]
        for word, other in zip(words_of(given[len(made)]), made, strict=True):
            seen[word].append(other)
    for word, others in {"a": "bc", "t": "rs", "l": "km", "j": "ik"}.items():
        assert set(seen[word]) == {word, *others}
        assert 0.5 < seen[word].count(word) / len(seen[word]) < 0.7
    assert set(seen[","]) == {","} and set(seen["m##s"]) == {"m##s"} and set(seen["42"]) == {"42"}
    assert len(further(data({"kind": "neighbours", "count": 50, "embeddings": str(encoder), "nearest": 2}))) == 50


def test_nearest_rows_against_all_cosines() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(40, 6, generator=generator)
    table[7] = 3 * table[30]  # equally near to every row
    rows, candidates = torch.tensor([3, 30, 12]), torch.arange(5, 40)
    exact = table.double().numpy()
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    found = nearest_rows(table, rows, candidates, 5)
    for row, near in zip(rows.tolist(), found.tolist(), strict=True):
        order = sorted((-round(float(exact[row] @ exact[c]), 9), c) for c in candidates.tolist() if c != row)
        assert near == [c for _, c in order[:5]]


def test_embeddings_of_other_tokens_are_refused(encoder: Path) -> None:
    spec = {"kind": "neighbours", "count": 5, "embeddings": str(encoder), "nearest": 2}
    with pytest.raises(ConfigError, match=r"got 20, and the tokenizer has 20 tokens") as caught:
        data({**spec, "nearest": 20})
    assert caught.value.problems[0].key == "data.expand.0.nearest"
    other = WORDPIECE.replace('"a"', '"z"')
    with pytest.raises(ConfigError, match="is not that of the data") as caught:
        data({"kind": "ngrams", "count": 1}, spec, tokenizer=other)
    assert caught.value.problems[0].key == "data.expand.1.embeddings"
    safetensors.torch.save_file({"word_embeddings.weight": torch.ones(4, 2)}, encoder / "model.safetensors")
    with pytest.raises(ConfigError, match="embeddings of 4 tokens, and the data 29 tokens"):
        data(spec)
    safetensors.torch.save_file({"weight": torch.ones(4, 2)}, encoder / "model.safetensors")
    with pytest.raises(ConfigError, match="has no table 'word_embeddings"):
        data(spec)
    (encoder / "model.safetensors").write_bytes(b"\x08")
    with pytest.raises(ConfigError, match="is damaged"):
        data(spec)
    (encoder / "model.safetensors").unlink()
    with pytest.raises(MissingError, match="there are no weights in"):
        data(spec)


# ----------------------------------------------------------------------------------------------------- in the data set

ALL = [{"kind": "ngrams", "count": 9}, {"kind": "concatenations", "count": 20}, {"kind": "swaps", "count": 15}]


def test_further_texts_are_new_unlabelled_and_numbered_behind() -> None:
    found = data(*ALL)
    rows = rows_of(found)
    assert rows[: len(TEXTS)] == [f"[CLS] {text} [SEP]" for text in TEXTS]
    assert len(set(rows)) == len(rows) == len(TEXTS) + 44
    assert found.train.targets.tolist() == [0, 1] * 3 + [IGNORE] * 44
    assert found.train.index.tolist() == list(range(50)) and found.class_counts() == [3, 3]
    assert sum(found.for_stage(StageData(limit=25)).class_counts()) == 3


def test_the_split_seed_alone_decides_what_is_made() -> None:
    one = rows_of(data(*ALL))
    assert one == rows_of(data(*ALL)) == rows_of(data(*ALL, augment_seed=5))
    assert one != rows_of(data(*ALL, split_seed=1))
    fewer = rows_of(data({"kind": "ngrams", "count": 4}))
    assert fewer == one[: len(fewer)], "a smaller count is the beginning of a larger one"
    twice = rows_of(data({"kind": "ngrams", "count": 4}, {"kind": "ngrams", "count": 4}))
    assert twice != rows_of(data({"kind": "ngrams", "count": 8})), "each entry has its own draws"


def test_they_are_made_of_what_is_not_held_out() -> None:
    found = data(
        {"kind": "ngrams", "count": 3}, texts=["a b c d e", "f g h i j", "k l m n o", "p q r s t"], val_fraction=0.5
    )
    assert isinstance(found.val, TokenSplit) and isinstance(found.whole, TokenSplit)
    held: Tensor = found.val.ids[found.val.ids > 8]
    assert len(held) == 10 and not set(held.tolist()) & set(found.whole.ids.tolist())


@pytest.mark.parametrize(
    ("kind", "texts"),
    [("ngrams", ["a", ""]), ("swaps", [""]), ("concatenations", ["a b"]), ("ngrams", ["a b c"])],
)
def test_a_count_that_cannot_be_met(kind: str, texts: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"9 further texts are asked for, and \d were found") as caught:
        data({"kind": kind, "count": 9}, texts=texts)
    assert caught.value.problems[0].key == "data.expand.0.count" and caught.value.problems[0].hint


def test_arguments_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="the longest piece has 3 words and the shortest 4") as caught:
        data({"kind": "ngrams", "count": 1}, {"kind": "ngrams", "count": 1, "shortest": 4, "longest": 3})
    assert caught.value.problems[0].key == "data.expand.1.longest"
    with pytest.raises(ConfigError, match="no way to change") as caught:
        data({"kind": "swaps", "count": 1, "how": []})
    assert caught.value.problems[0].key == "data.expand.0.how"


def test_images_are_refused() -> None:
    images = Dataset(
        ArraySplit(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.arange(4) % 2), class_names=["a", "b"]
    )
    spec = DataSpec(kind="digits", expand=[Component.model_validate({"kind": "ngrams", "count": 1})], val_fraction=0)
    with pytest.raises(ConfigError, match="and these are images") as caught:
        split_dataset(images, spec)
    assert caught.value.problems[0].key == "data.expand"


# ---------------------------------------------------------------------------------------------------------- tokenizers


def model(kind: str, vocab: list[str], **more: Any) -> str:
    numbers = [[word, 0.0] for word in vocab] if kind == "Unigram" else {word: n for n, word in enumerate(vocab)}
    return json.dumps({"model": {"type": kind, "vocab": numbers, **more}})


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (None, ["1", "2", "3", "4", "5"]),
        (model("WordPiece", ["p", "a", "##b", "c", "##d", "e"], continuing_subword_prefix="##"), ["1 2", "3 4", "5"]),
        (model("BPE", ["p", "a", "b", "\u0120c", "d", "\u0120e"]), ["1 2", "3 4", "5"]),
        (model("Unigram", ["p", "\u2581a", "b", "\u2581c", "d", "\u2581e"]), ["1 2", "3 4", "5"]),
        (model("BPE", ["p", "a", "b</w>", "c", "d</w>", "e</w>"], end_of_word_suffix="</w>"), ["1 2", "3 4", "5"]),
        (model("WordLevel", ["p", "a", "b", "c", "d", "e"]), ["1", "2", "3", "4", "5"]),
    ],
)
def test_words_by_the_marks_of_each_kind_of_tokenizer(tokenizer: str | None, words: list[str]) -> None:
    made = TokenSplit.of([[1, 2, 3, 4, 5]], torch.tensor([0]), TokenInput(6, 8, pad=0))
    (segment,) = Texts(made, tokenizer).segments(0)
    assert [" ".join(map(str, word.tolist())) for word in segment] == words


def test_a_word_that_began_a_text_gets_its_space() -> None:
    """As in RoBERTa's tokenizer, where the first word of a text has no space before it."""
    tokenizer = model("BPE", ["p", "a", "\u0120a", "\u0120b", "c"])
    made = TokenSplit.of([[1, 4, 3], [1, 3]], torch.tensor([0, 0]), TokenInput(5, 8, pad=0))
    texts = Texts(made, tokenizer)
    (one,), (other,) = texts.segments(0), texts.segments(1)
    assert texts.with_segments(1, [[*other, *one]]).tolist() == [1, 3, 2, 4, 3]
    assert Vocabulary(tokenizer, made.tokens).letters.tolist() == [False, False, True, True, False]
