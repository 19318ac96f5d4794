"""Words of a text that are hidden from a model."""

from __future__ import annotations

from torch import Tensor

from kdctl.config.types import Fraction
from kdctl.data import counter
from kdctl.data.augment import Augmentation
from kdctl.data.base import Shape, Split
from kdctl.data.tokens import TokenSplit
from kdctl.errors import ConfigError, Problem
from kdctl.signals import TokenInput


class MaskTokens(Augmentation):
    """Each token of a text but its first and separating ones becomes the tokenizer's mask with probability `rate`.

    rate: share of tokens hidden.
    Source: Jiao et al., TinyBERT, EMNLP Findings 2020, hide and replace words; word dropout: Iyyer et al., ACL 2015.
    """

    tokens: TokenInput

    def __init__(self, *, rate: Fraction = 0.1) -> None:
        self.rate = rate

    def prepare(self, split: Split) -> None:
        if not isinstance(split, TokenSplit):
            raise ConfigError(Problem("mask_tokens hides tokens of texts, and these are images", key="data.augment"))
        if split.tokens.mask is None:
            raise ConfigError(Problem("this tokenizer has no token that stands for a hidden one", key="data.augment"))
        self.tokens = split.tokens

    def draw(self, draws: counter.Draws, shape: Shape) -> Tensor:
        (length,) = shape
        return draws.uniforms(length)

    def apply(self, images: Tensor, parameters: Tensor) -> Tensor:
        """Token numbers, int64 (N, L), to such with some of them hidden."""
        hidden = (parameters < self.rate) & self.tokens.is_word(images)
        return images.masked_fill(hidden, int(self.tokens.mask or 0))
