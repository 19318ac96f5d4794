"""A small vision transformer for small images.

Taps, for block i:
    patch                            the patches, embedded: (N, D, H / patch, W / patch)
    tokens                           the same with their positions: (N, T, D), row by row
    blocks.<i>                       a block's output, (N, T, D)
    blocks.<i>.attention             the attention's branch before the sum
    blocks.<i>.attention.softmax     how much each token takes from each other: (N, heads, T, T)
    blocks.<i>.attention.softmax:in  the same before the softmax
    blocks.<i>.attention.q (k, v)    queries, keys, values of all heads side by side, (N, T, heads * head_dim)
    blocks.<i>.mlp.act               the hidden layer after its GELU, (N, T, hidden); :in before it
    blocks.<i>.mlp                   the multilayer perceptron's branch before the sum
    norm                             the last tokens, normalised: (N, T, D)
    pool                             their mean, the embedding: (N, D)
    fc                               the logits
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from kdctl.config.types import PositiveInt
from kdctl.errors import ConfigError, Problem
from kdctl.models.layers import Add


class Attention(nn.Module):
    """Self-attention of several heads, softmax(q k' / sqrt(d)) v, in plain products that every runtime knows.

    There are as many heads as the queries have room for: their width / head_dim. q, k and v keep the same width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.softmax = nn.Softmax(-1)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = self._heads(self.q(x)), self._heads(self.k(x)), self._heads(self.v(x))
        scores = torch.matmul(queries * self.head_dim**-0.5, keys.transpose(-2, -1))
        return self.proj(torch.matmul(self.softmax(scores), values).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """(N, T, heads * d) to (N, heads, T, d)."""
        return x.unflatten(2, (-1, self.head_dim)).transpose(1, 2)


class Block(nn.Module):
    """Attention and a multilayer perceptron, each after a layer normalisation and with a shortcut."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.add1 = Add()
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(width, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, width)))
        self.add2 = Add()

    def forward(self, x: Tensor) -> Tensor:
        x = self.add1(self.attention(self.norm1(x)), x)
        return self.add2(self.mlp(self.norm2(x)), x)


class Tokens(nn.Module):
    """A map (N, D, H, W) as a row of tokens (N, H * W, D), each with the learned embedding of its position added."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(1, count, width))

    def forward(self, patches: Tensor) -> Tensor:
        return patches.flatten(2).transpose(1, 2) + self.position


class TokenMean(nn.Module):
    """The mean of the tokens: (N, T, D) to (N, D)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(1)


class TinyTransformer(nn.Sequential):
    """A vision transformer over patches of a small image; 0.46 M parameters with the defaults and ten classes.

    width: of each token. depth: blocks. heads: of attention, by which the width can be divided. hidden: units of each
    block's multilayer perceptron, none for twice the width. patch: pixels of a patch's side, by which the image's sides
    can be divided. Layers are normalised before each branch; the mean of the tokens is classified, not a token of its
    own.
    Source: Dosovitskiy et al., An Image Is Worth 16x16 Words, ICLR 2021; the mean of the tokens: Beyer et al., Better
    Plain ViT Baselines for ImageNet-1k, 2022.
    """

    def __init__(
        self,
        *,
        width: PositiveInt = 96,
        depth: PositiveInt = 6,
        heads: PositiveInt = 6,
        hidden: PositiveInt | None = None,
        patch: PositiveInt = 4,
        num_classes: int,
        in_channels: int = 3,
        image_shape: list[int],
    ) -> None:
        if width % heads:
            message = f"a width of {width} cannot be divided among {heads} heads"
            raise ConfigError(Problem(message, key="heads", hint="heads that divide the width"))
        height, breadth = image_shape[1:]
        if height % patch or breadth % patch:
            message = f"images of {height}x{breadth} pixels cannot be cut into patches of {patch}x{patch}"
            raise ConfigError(Problem(message, key="patch", hint="a patch that divides both sides"))
        super().__init__(
            OrderedDict(
                patch=nn.Conv2d(in_channels, width, patch, patch),
                tokens=Tokens(height // patch * (breadth // patch), width),
                blocks=nn.Sequential(*(Block(width, heads, hidden or 2 * width) for _ in range(depth))),
                norm=nn.LayerNorm(width),
                pool=TokenMean(),
                fc=nn.Linear(width, num_classes),
            )
        )
        self._initialise()

    def _initialise(self) -> None:
        """Normal with a deviation of 0.02, cut at twice that; biases zero."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
