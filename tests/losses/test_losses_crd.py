"""crd: its formula in numpy, what it keeps in memory and when, and its form without a memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kdctl.errors import ConfigError

Example = Callable[..., Any]
Build = Callable[..., Any]
SMALL = {"feature_dim": 4, "negatives": 9}


def embedded(loss: Any, given: Any) -> list[Any]:
    found = []
    for signals, embed in ((given[0], loss.embed_s), (given[1], loss.embed_t)):
        rows = signals.features["f"].detach().numpy()
        rows = rows @ embed.linear.weight.detach().numpy().T + embed.linear.bias.detach().numpy()
        found.append(rows / np.sqrt((rows**2).sum(1, keepdims=True)))
    return found


def scores(loss: Any, given: Any, rows: Any, temperature: float) -> list[Any]:
    """exp(v . m / T) of the student's and of the teacher's side."""
    memories = [m.numpy()[rows] for m in (loss.memory_v2, loss.memory_v1)]
    sides = zip(memories, embedded(loss, given), strict=True)
    return [np.exp((m @ v[:, :, None])[..., 0] / temperature) for m, v in sides]


def contrast(p: Any, size: int) -> float:
    c, negatives = (p.shape[1] - 1) / size, p[:, 1:]
    return -np.log(p[:, 0] / (p[:, 0] + c + 1e-7)).sum() - np.log(c / (negatives + c + 1e-7)).sum()


@pytest.fixture
def vectors(example: Example) -> Any:
    student, teacher, batch = example(size=5, student=(6,), teacher=(3,))
    rows = torch.randint(64, (5, 10), generator=torch.Generator().manual_seed(7))
    rows[:, 0] = batch.index
    return student, teacher, replace(batch, extra={"contrast_indices": rows})


def test_formula_with_normalisers_of_the_first_batch(vectors: Any, build: Build) -> None:
    loss = build("crd", vectors, temperature=0.2, **SMALL)
    both = scores(loss, vectors, vectors[2].extra["contrast_indices"].numpy(), 0.2)
    expected = sum(contrast(p / (p.mean() * 64), 64) for p in both)
    assert loss(*vectors).item() == pytest.approx(expected, rel=1e-9)


def test_normalisers_stay_those_of_the_first_training_batch(vectors: Any, build: Build) -> None:
    loss = build("crd", vectors, temperature=0.2, momentum=1.0, **SMALL)
    rows = vectors[2].extra["contrast_indices"].numpy()
    first = [p.mean() * 64 for p in scores(loss, vectors, rows, 0.2)]
    loss.train()(*vectors)
    np.testing.assert_allclose(loss.log_z.exp().numpy(), first, rtol=1e-9)
    vectors[0].features["f"] = -vectors[0].features["f"]
    expected = sum(contrast(p / z, 64) for p, z in zip(scores(loss, vectors, rows, 0.2), first, strict=True))
    assert loss(*vectors).item() == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(loss.log_z.exp().numpy(), first, rtol=1e-9)


def test_gradient_is_that_of_finite_differences(vectors: Any, build: Build) -> None:
    student, teacher, batch = vectors
    loss = build("crd", vectors, **SMALL)
    loss.log_z.fill_(0.5)

    def value(feature: Any, *parameters: Any) -> Any:
        return loss(replace(student, features={"f": feature}), teacher, batch)

    assert torch.autograd.gradcheck(value, (student.features["f"], *loss.parameters()))


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_memory_moves_in_training_only_and_only_where_the_batch_is(momentum: float, vectors: Any, build: Build) -> None:
    student, teacher, batch = vectors
    batch.index[:] = torch.tensor([3, 60, 7, 8, 1])
    loss = build("crd", vectors, momentum=momentum, **SMALL)
    before = [loss.memory_v1.clone(), loss.memory_v2.clone()]
    loss(*vectors)
    assert loss.memory_v1.equal(before[0]) and not loss.log_z.isfinite().any()
    loss.train()(*vectors).backward()
    for memory, old, v in zip((loss.memory_v1, loss.memory_v2), before, embedded(loss, vectors), strict=True):
        moved = momentum * old[batch.index].numpy() + (1 - momentum) * v
        expected = old.clone()
        expected[batch.index] = torch.from_numpy(moved / np.sqrt((moved**2).sum(1, keepdims=True)))
        torch.testing.assert_close(memory, expected)
    once = loss.memory_v1.clone()
    loss(student, teacher, replace(batch, stream=1))
    assert loss.memory_v1.equal(once), "the strongly augmented version of a batch is no second step"


def test_training_draws_with_the_global_generator(example: Example, build: Build) -> None:
    given = example(size=5, student=(6,), teacher=(3,))
    loss = build("crd", given, **SMALL).train()
    loss.log_z.fill_(0.0)
    drawn = [loss._drawn(given[2])]
    state = torch.get_rng_state()
    drawn.append(loss._drawn(given[2]))
    torch.set_rng_state(state)
    drawn.append(loss._drawn(given[2]))
    assert drawn[1].equal(drawn[2]) and not drawn[0].equal(drawn[1])
    assert all(rows[:, 0].equal(given[2].index) and rows.shape == (5, 10) for rows in drawn)
    assert loss.eval()(*given) == loss(*given)


def test_the_memory_is_part_of_a_checkpoint(vectors: Any, build: Build) -> None:
    loss, other = build("crd", vectors, **SMALL).train(), build("crd", vectors, **SMALL).train()
    for _ in range(2):
        loss(*vectors)
    other.load_state_dict(loss.state_dict())
    assert other(*vectors).item() == loss(*vectors).item()
    names = {"memory_v1", "memory_v2", "log_z", "embed_s.linear.weight", "embed_t.linear.bias"}
    assert names <= set(loss.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 4])
def test_a_small_temperature_stays_finite(size: int, dtype: Any, example: Example, build: Build) -> None:
    """exp(1 / 0.005) is no float32."""
    given = example(size=size, student=(6,), teacher=(3,), dtype=dtype)
    loss = build("crd", given, temperature=0.005, **SMALL).train()
    for _ in range(2):
        value = loss(*given)
    value.backward()
    assert value.isfinite() and given[0].features["f"].grad.isfinite().all()


def test_info_nce_of_the_batch(example: Example, build: Build) -> None:
    given = example(size=5, student=(6,), teacher=(3,))
    loss = build("crd", given, bank="batch", temperature=0.2, feature_dim=4)
    v1, v2 = embedded(loss, given)
    similarity = v1 @ v2.T / 0.2
    expected = sum(np.log(np.exp(s).sum(1)).sum() - np.trace(s) for s in (similarity, similarity.T))
    assert loss(*given).item() == pytest.approx(expected, rel=1e-10)
    assert not list(loss.buffers())


def test_the_size_of_the_memory(example: Example, build: Build) -> None:
    given = example(size=5, student=(6,), teacher=(3,))
    assert build("crd", given, **SMALL).memory_v1.shape == (64, 4)
    assert build("crd", given, dataset_size=70, **SMALL).memory_v2.shape == (70, 4)
    with pytest.raises(ConfigError, match="dataset_size is 63, and the samples are 64"):
        build("crd", given, dataset_size=63, **SMALL)


def test_two_pairs_of_taps_are_refused(example: Example, build: Build) -> None:
    with pytest.raises(ConfigError, match="one pair of taps"):
        build("crd", example(student=[(6,), (6,)], teacher=[(3,), (3,)]))
