"""Random numbers that are a pure function of integer keys: a counter-based generator.

No state: a draw is a hash of what it is for (seed, sample, view, ...), so it is the same on every device, in every
order and in any batch. The hash chains the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014), computed in int64, whose products wrap like those of uint64.
"""

from __future__ import annotations

import torch
from torch import Tensor

AUGMENT, ORDER, OFFSET, SPLIT, CORRUPTION, HIDE, SAMPLE, EXPAND = 1, 2, 3, 4, 5, 6, 7, 8
"""First keys: what a hash is for, so that equal seeds of different uses never meet."""

_WORD = 1 << 64
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(word: int) -> int:
    word %= _WORD
    return word - _WORD if word >= _WORD >> 1 else word


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Logical right shift; int64's own keeps the sign."""
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mixed(words: Tensor) -> Tensor:
    words = _shifted(words, 30).bitwise_xor_(words).mul_(_signed(_FIRST))
    words = _shifted(words, 27).bitwise_xor_(words).mul_(_signed(_SECOND))
    return _shifted(words, 31).bitwise_xor_(words)


def key(*numbers: int) -> int:
    """One 64-bit key, as a signed integer, of whole numbers of any size."""
    state = 0
    for number in numbers:
        state = (state + (number + 1) * _GOLDEN) % _WORD
        state = ((state ^ (state >> 30)) * _FIRST) % _WORD
        state = ((state ^ (state >> 27)) * _SECOND) % _WORD
        state ^= state >> 31
    return _signed(state)


def fold(keys: int | Tensor, numbers: int | Tensor) -> Tensor:
    """Keys with one more number hashed in, elementwise; one of the two at least is an int64 tensor."""
    if isinstance(numbers, int):
        return _mixed(torch.as_tensor(keys) + _signed((numbers + 1) * _GOLDEN))
    return _mixed(numbers * _signed(_GOLDEN) + _signed(_GOLDEN) + keys)


def permutation(count: int, *numbers: int) -> Tensor:
    """A permutation (count,) of 0..count-1, int64 on the CPU, keyed by the numbers alone."""
    return torch.argsort(fold(key(*numbers), torch.arange(count)), stable=True)


class Draws:
    """The draws of one operation for a batch of samples, one after the other.

    keys: (N,) int64, one for each sample. number: of the operation in its chain.
    """

    def __init__(self, keys: Tensor, number: int) -> None:
        self._keys = keys
        self._next = number << 16

    def _bits(self) -> Tensor:
        self._next += 1
        return fold(self._keys, self._next)

    def uniform(self) -> Tensor:
        """(N,) float32 in [0, 1), multiples of 2^-24: exact on every device."""
        return _shifted(self._bits(), 40).to(torch.float32).mul_(2.0**-24)

    def uniforms(self, count: int) -> Tensor:
        """(N, count) float32 in [0, 1): that of a column does not depend on how many there are."""
        bits = fold(self._bits()[:, None], torch.arange(count, device=self._keys.device)[None])
        return _shifted(bits, 40).to(torch.float32).mul_(2.0**-24)

    def below(self, count: int) -> Tensor:
        """(N,) int64 in 0..count-1, count < 2^31; off from uniform by less than count / 2^32."""
        return (_shifted(self._bits(), 32) * count) >> 32
