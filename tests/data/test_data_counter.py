"""The counter-based generator: uniform, uncorrelated along every key, and the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from kdctl.data import counter

COUNT = 20_000


def uniforms(seed: int = 0, index: int | None = None, view: int | None = None, number: int = 0) -> np.ndarray:
    """Draws along the one key that is None."""
    along = torch.arange(COUNT)
    keys = counter.fold(counter.key(counter.AUGMENT, seed, 0), along if index is None else torch.full((COUNT,), index))
    keys = counter.fold(keys, along if view is None else torch.full((COUNT,), view))
    return counter.Draws(keys, number).uniform().numpy()


def along_operations(index: int) -> np.ndarray:
    keys = counter.fold(counter.key(0), torch.tensor([index]))
    return torch.cat([counter.Draws(keys, number).uniform() for number in range(2000)]).numpy()


SEQUENCES = {
    "samples": lambda: uniforms(view=3),
    "views": lambda: uniforms(index=7),
    "samples with a large seed": lambda: uniforms(seed=2**70 + 1, view=0),
    "operations": lambda: along_operations(5),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_draws_are_uniform_and_uncorrelated(name: str) -> None:
    values = SEQUENCES[name]()
    counts = np.histogram(values, bins=100, range=(0, 1))[0]
    assert 1e-4 < stats.chisquare(counts).pvalue < 1 - 1e-4
    assert stats.kstest(values, "uniform").pvalue > 1e-4
    for lag in (1, 2, 8, 64):
        correlation = np.corrcoef(values[:-lag], values[lag:])[0, 1]
        assert abs(correlation) < 4.5 / np.sqrt(len(values))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"view": 0}, {"view": 1}),
        ({"seed": 0, "view": 0}, {"seed": 1, "view": 0}),
        ({"view": 0, "number": 0}, {"view": 0, "number": 1}),
    ],
)
def test_neighbouring_keys_give_unrelated_draws(one: dict[str, int], other: dict[str, int]) -> None:
    a, b = uniforms(**one), uniforms(**other)
    assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / np.sqrt(COUNT)
    table = np.histogram2d(a, b, bins=10, range=((0, 1), (0, 1)))[0]
    assert 1e-4 < stats.chisquare(table.ravel()).pvalue < 1 - 1e-4


def test_streams_and_consecutive_draws_are_unrelated() -> None:
    keys = [counter.fold(counter.key(counter.AUGMENT, 0, stream), torch.arange(COUNT)) for stream in (0, 1)]
    first, second = counter.Draws(keys[0], 0), counter.Draws(keys[1], 0)
    sequences = [first.uniform(), first.uniform(), second.uniform()]
    matrix = np.corrcoef(torch.stack(sequences).numpy())
    assert np.abs(matrix - np.eye(3)).max() < 4.5 / np.sqrt(COUNT)


def test_every_bit_flips_half_the_time() -> None:
    numbers = torch.arange(4096)
    base = counter.fold(counter.key(0), numbers)
    for bit in (0, 1, 5, 11, 31, 62):
        changed = base ^ counter.fold(counter.key(0), numbers ^ (1 << bit))
        shares = [(((changed >> b) & 1).double().mean().item()) for b in range(64)]
        assert 0.45 < min(shares) and max(shares) < 0.55


@pytest.mark.parametrize("count", [1, 2, 9, 81, 162, 1000])
def test_below_covers_its_range_evenly(count: int) -> None:
    keys = counter.fold(counter.key(1, 2), torch.arange(COUNT * 2))
    values = counter.Draws(keys, 0).below(count)
    counts = torch.bincount(values, minlength=count)
    assert len(counts) == count
    if count > 1:
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4


def test_hash_is_splitmix64() -> None:
    """The known first outputs of SplitMix64 seeded with 1234567: state advances by the golden ratio, then is mixed."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    got = counter.fold(1234567, torch.arange(3))
    assert [int(g) % 2**64 for g in got] == known
    assert [int(counter.fold(torch.tensor([1234567]), n)) % 2**64 for n in range(3)] == known


def test_scalar_key_and_tensor_fold_agree() -> None:
    assert counter.key(3, 5, 2**40) == int(counter.fold(counter.fold(counter.key(3), torch.tensor([5])), 2**40))


def test_permutation_is_one_and_depends_on_each_key() -> None:
    drawn = counter.permutation(500, counter.ORDER, 1, 2)
    assert drawn.sort().values.equal(torch.arange(500))
    assert drawn.equal(counter.permutation(500, counter.ORDER, 1, 2))
    for other in ((counter.ORDER, 1, 3), (counter.ORDER, 2, 2), (counter.SPLIT, 1, 2)):
        assert not drawn.equal(counter.permutation(500, *other))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_draws_what_the_cpu_draws() -> None:
    index = torch.arange(1000)
    draws = [counter.Draws(counter.fold(counter.key(5), index.to(device)), 2) for device in ("cpu", "cuda")]
    assert draws[0].uniform().equal(draws[1].uniform().cpu())
    assert draws[0].below(81).equal(draws[1].below(81).cpu())
