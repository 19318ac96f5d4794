"""mask_tokens: how many words it hides, which it never does, and that its draws belong to the text alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kdctl.data.augment import Augment
from kdctl.data.base import ArraySplit
from kdctl.data.loader import TrainLoader
from kdctl.data.mask_tokens import MaskTokens
from kdctl.data.spatial import HorizontalFlip
from kdctl.data.tokens import TokenSplit
from kdctl.errors import ConfigError
from kdctl.signals import TokenInput

TOKENS = TokenInput(vocab_size=100, length=64, pad=0, first=1, separator=2, mask=3)


def split(count: int = 40, tokens: TokenInput = TOKENS) -> TokenSplit:
    """Texts of 3 to 62 tokens, of which half of the words are 10 and half are 11."""
    texts = [[1, *([10, 11] * 32)[: 1 + number * 7 % 60], 2] for number in range(count)]
    return TokenSplit.of(texts, torch.arange(count) % 2, tokens)


def chain(made: TokenSplit, rate: float = 0.3, seed: int = 4) -> Augment:
    operation = MaskTokens(rate=rate)
    operation.prepare(made)
    return Augment([operation], seed=seed)


def test_the_share_of_words_that_it_hides_is_the_rate() -> None:
    made = split(400)
    numbers = made.fetch(torch.arange(400))
    words = numbers >= 10
    for rate in (0.0, 0.1, 0.3, 1.0):
        shown = chain(made, rate)(numbers, made.index, torch.zeros(400, dtype=torch.int64))
        assert abs(float((shown[words] == 3).float().mean()) - rate) < 0.015  # 12,000 words: 3.5 deviations
        assert shown[~words].equal(numbers[~words])
        kept = shown != 3
        assert shown[kept].equal(numbers[kept]) and shown.dtype == torch.int64


def test_its_draws_depend_on_neither_batch_nor_padding() -> None:
    made = split()
    view = torch.full((40,), 2)
    augment = chain(made)
    whole = augment(made.fetch(made.index), made.index, view)
    for part in torch.randperm(40, generator=torch.Generator().manual_seed(0)).split(3):
        alone = augment(made.fetch(part), part, view[part])
        assert alone.equal(whole[part, : alone.shape[1]])


def test_view_stream_and_seed_decide_what_is_hidden() -> None:
    made = split()
    numbers, view = made.fetch(made.index), torch.zeros(40, dtype=torch.int64)
    augment = chain(made)
    base = augment(numbers, made.index, view)
    assert base.equal(augment(numbers, made.index, view))
    others = (
        augment(numbers, made.index, view + 1),
        augment(numbers, made.index, view, 1),
        chain(made, seed=5)(numbers, made.index, view),
        augment(numbers, made.index + 1, view),
    )
    assert all(not base.equal(other) for other in others)


def test_a_loader_hides_words_and_its_mask_of_padding_stays() -> None:
    made = split()
    batches = list(TrainLoader(made, batch_size=8, augment=chain(made)).epoch(0))
    assert any(bool((batch.inputs == 3).any()) for batch in batches)
    assert all(b.extra["attention_mask"].equal((b.inputs != 0).long()) for b in batches)


def test_what_it_cannot_take() -> None:
    images = ArraySplit(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ConfigError, match="these are images"):
        TrainLoader(images, batch_size=2, augment=Augment([MaskTokens()]))
    with pytest.raises(ConfigError, match="no token that stands for a hidden one"):
        MaskTokens().prepare(split(tokens=dataclasses.replace(TOKENS, mask=None)))


def test_augmentations_of_images_refuse_texts() -> None:
    with pytest.raises(ConfigError, match=r"HorizontalFlip changes images.*mask_tokens"):
        TrainLoader(split(), batch_size=2, augment=Augment([HorizontalFlip()]))


def test_all_views_of_hidden_words_cannot_be_shown() -> None:
    with pytest.raises(ConfigError, match="MaskTokens draws from a continuum"):
        TrainLoader(split(), batch_size=2, augment=Augment([MaskTokens()]), views="all")
