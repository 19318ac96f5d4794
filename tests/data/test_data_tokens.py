"""Texts as token numbers: cutting, padding, order, and what a batch's numbers say of themselves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from kdctl.data.base import joined
from kdctl.data.loader import TrainLoader, clean_batches
from kdctl.data.tokens import TokenSplit
from kdctl.errors import ConfigError
from kdctl.signals import TokenInput

TOKENS = TokenInput(vocab_size=1000, length=20, pad=9, first=1, separator=2, mask=3, tokenizer="a")


def texts(count: int, seed: int = 0) -> list[list[int]]:
    """Texts of 1 to 20 tokens; the first number after the beginning says which it is."""
    lengths = torch.randint(1, 20, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [[*([100 + number] * length), 2] for number, length in enumerate(lengths)]


def split(count: int = 23, seed: int = 0) -> TokenSplit:
    return TokenSplit.of(texts(count, seed), torch.arange(count) % 3, TOKENS)


def unpadded(row: Tensor) -> list[int]:
    return [number for number in row.tolist() if number != TOKENS.pad]


def test_fetched_texts_are_padded_behind_to_the_longest_of_them() -> None:
    numbers = [[1, 5, 2], [1, 6, 7, 8, 2], [4]]
    made = TokenSplit.of(numbers, torch.tensor([0, 1, -100]), TOKENS)
    assert made.fetch(torch.tensor([2, 0])).tolist() == [[4, 9, 9], [1, 5, 2]]
    assert made.fetch(torch.tensor([0, 1])).tolist() == [[1, 5, 2, 9, 9], [1, 6, 7, 8, 2]]
    assert made.fetch(torch.tensor([2])).tolist() == [[4]]
    assert made.fetch(torch.tensor([1])).dtype == torch.int64
    assert made.lengths.tolist() == [3, 5, 1] and made.input_shape == (20,) and len(made) == 3


@pytest.mark.parametrize("wrong", [[], [7] * 21])
def test_a_text_that_is_empty_or_too_long_is_refused(wrong: list[int]) -> None:
    with pytest.raises(ConfigError, match="1 to 20 tokens"):
        TokenSplit.of([[1, 2], wrong], torch.tensor([0, 0]), TOKENS)


def test_no_texts_are_a_split_too() -> None:
    assert len(TokenSplit.of([], torch.zeros(0, dtype=torch.int64), TOKENS)) == 0


def test_a_subset_keeps_texts_targets_and_numbers() -> None:
    whole, rows = split(), torch.tensor([7, 2, 19, 2])
    part = whole.subset(rows)
    assert part.fetch(torch.arange(4)).equal(whole.fetch(rows))
    assert part.targets.equal(whole.targets[rows]) and part.index.equal(rows)
    assert len(part.ids) == int(whole.lengths[rows].sum())
    again = part.subset(torch.tensor([2, 0]))
    assert again.index.tolist() == [19, 7] and again.fetch(torch.tensor([0])).equal(whole.fetch(torch.tensor([19])))


def test_other_targets_leave_the_texts_alone() -> None:
    whole = split()
    other = whole.labelled(torch.full((23,), -100), torch.arange(23) + 50)
    assert other.fetch(torch.arange(23)).equal(whole.fetch(torch.arange(23)))
    assert other.index.tolist() == list(range(50, 73)) and set(other.targets.tolist()) == {-100}
    assert whole.labelled(whole.targets).index.equal(whole.index)


def test_splits_one_after_the_other_are_numbered_anew() -> None:
    one, other = split(5), split(4, seed=1).subset(torch.tensor([3, 1, 0]))
    both = joined([one, other])
    assert isinstance(both, TokenSplit) and both.index.tolist() == list(range(8))
    assert both.targets.tolist() == [*one.targets.tolist(), *other.targets.tolist()]
    for row in range(8):
        part, place = (one, row) if row < 5 else (other, row - 5)
        assert both.fetch(torch.tensor([row])).equal(part.fetch(torch.tensor([place])))


def test_texts_of_different_tokenizers_are_not_put_together() -> None:
    theirs = TokenSplit.of(texts(4), torch.zeros(4, dtype=torch.int64), dataclasses.replace(TOKENS, tokenizer="b"))
    with pytest.raises(ConfigError, match="different tokenizers"):
        joined([split(), theirs])


@pytest.mark.parametrize("count", [1, 3, 8, 23, 24, 700])
def test_an_arranged_epoch_has_every_row_once(count: int) -> None:
    made, rows = split(count), torch.randperm(count, generator=torch.Generator().manual_seed(3))
    arranged = made.arranged(rows, 4, key=5)
    assert arranged.sort().values.tolist() == list(range(count))
    rest = count % 4
    assert rest == 0 or arranged[-rest:].equal(rows[-rest:])


def test_batches_are_of_like_length_and_in_an_order_that_the_key_decides() -> None:
    made, rows = split(800), torch.randperm(800, generator=torch.Generator().manual_seed(3))

    def padding(order: Tensor) -> float:
        lengths = made.lengths[order].view(-1, 8)
        return float(1 - lengths.sum() / (lengths.amax(1) * 8).sum())

    arranged = made.arranged(rows, 8, key=5)
    assert padding(rows) > 0.3 and padding(arranged) < 0.06
    assert arranged.equal(made.arranged(rows, 8, key=5))
    other = made.arranged(rows, 8, key=6)
    assert not arranged.equal(other)
    assert {tuple(b) for b in arranged.view(-1, 8).tolist()} == {tuple(b) for b in other.view(-1, 8).tolist()}
    lengths = made.lengths[arranged].view(-1, 8).amax(1)
    assert not lengths.equal(lengths.sort().values) and not lengths.equal(lengths.sort(descending=True).values)


def test_an_epoch_of_the_loader_has_every_text_once_and_says_what_is_padding() -> None:
    made = split(26)
    loader = TrainLoader(made, batch_size=8, order_seed=1)
    batches = list(loader.epoch(2))
    assert [batch.size for batch in batches] == [8, 8, 8, 2]
    assert torch.cat([batch.index for batch in batches]).sort().values.equal(torch.arange(26))
    for batch in batches:
        assert batch.inputs.dtype == torch.int64 and batch.inputs.shape[1] == int(made.lengths[batch.index].max())
        assert [unpadded(row) for row in batch.inputs] == [texts(26)[number] for number in batch.index.tolist()]
        assert batch.extra["attention_mask"].sum(1).equal(made.lengths[batch.index])
        assert batch.targets.equal(made.targets[batch.index])
    later = list(loader.epoch(2, start_step=2))
    assert [b.index.tolist() for b in later] == [b.index.tolist() for b in batches[2:]]
    assert [b.index.tolist() for b in loader.epoch(3)] != [b.index.tolist() for b in batches]


def test_texts_are_measured_longest_first() -> None:
    made = split(26)
    order = made.clean_order()
    assert order.sort().values.equal(torch.arange(26))
    assert made.lengths[order].equal(made.lengths.sort(descending=True).values)
    batches = list(clean_batches(made, batch_size=7, name="test"))
    assert torch.cat([batch.index for batch in batches]).equal(order)
    assert [batch.inputs.shape[1] for batch in batches] == [int(made.lengths[batch.index[0]]) for batch in batches]
    assert all(len(b.extra["attention_mask"]) == b.size and b.view.unique().tolist() == [-1] for b in batches)


def test_the_fingerprint_is_of_all_that_a_text_is() -> None:
    targets = torch.tensor([0, 1])

    def fingerprint(*numbers: list[int], targets: Tensor = targets, tokens: TokenInput = TOKENS) -> str:
        return TokenSplit.of(numbers, targets, tokens).fingerprint()

    base = fingerprint([5, 6], [7])
    assert fingerprint([5, 6], [7]) == base
    others = [
        fingerprint([5, 4], [7]),
        fingerprint([5], [6, 7]),
        fingerprint([5, 6], [7], targets=torch.tensor([0, -100])),
        fingerprint([5, 6], [7], tokens=dataclasses.replace(TOKENS, tokenizer="b")),
    ]
    assert len({base, *others}) == 5


def test_what_numbers_say_of_themselves() -> None:
    numbers = torch.tensor([[1, 5, 2, 6, 7, 2, 9], [1, 2, 2, 9, 9, 9, 9]])
    assert TOKENS.is_text(numbers).long().tolist() == [[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0]]
    assert TOKENS.is_word(numbers).long().tolist() == [[0, 1, 0, 1, 1, 0, 0], [0] * 7]
    assert TOKENS.segments(numbers).tolist() == [[0] * 7] * 2
    pairs = dataclasses.replace(TOKENS, pairs=True)
    assert pairs.segments(numbers).tolist() == [[0, 0, 0, 1, 1, 1, 0], [0, 0, 1, 0, 0, 0, 0]]
