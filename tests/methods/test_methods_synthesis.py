"""Synthetic images: their losses by hand, the generator and its pools, and the rounds that make them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pytest import approx
from torch import Tensor, nn
from torch.nn import functional as F

from kdctl.data.augment import Augment
from kdctl.data.spatial import RandomCrop
from kdctl.methods.data_free import _augmented
from kdctl.methods.generator import Generator
from kdctl.methods.synthesis import (
    PRESETS,
    Contrast,
    ImagePool,
    bn_distance,
    disagreement,
    imbalance,
    moments,
    moved,
    total_variation,
    zoomed,
)  # fmt: skip
from kdctl.methods.synthesizer import Sizes, Synthesizer, _Best
from kdctl.models.record import Model, ModelRecord, build_model

CPU = torch.device("cpu")
SHAPE = [1, 8, 8]


def model(width: int, seed: int, normalize: dict[str, list[float]] | None = None) -> Model:
    """A net with batch normalisation whose statistics are not those that it starts with, and that sees many classes."""
    torch.manual_seed(seed)
    record = ModelRecord("digits_cnn", {"width": width}, 10, [str(i) for i in range(10)], SHAPE, normalize)
    made = build_model(record)
    made.train()
    for _ in range(5):
        made(torch.rand(32, *SHAPE))
    made.eval().requires_grad_(False)
    fc: Any = made.net.fc
    fc.weight *= 5
    fc.bias -= made(torch.rand(64, *SHAPE)).mean(0)
    return made


TEACHER = {"mean": [0.3], "std": [0.4]}


def synthesizer(preset: str, meta: Any = "fomaml", **changed: Any) -> Synthesizer:
    recipe = replace(PRESETS[preset], **{"g_steps": 2, "inversion_steps": 3, "latent": 6, "warmup": 0} | changed)
    student = model(6, 0).requires_grad_(True)
    torch.manual_seed(2)
    with torch.no_grad():  # near enough to the teacher to agree on some images
        student.net.get_parameter("fc.weight").add_(0.2 * torch.randn(10, 12))
    return Synthesizer(recipe, Sizes(12, 4, 30, 30, 20), model(6, 0, TEACHER), student, SHAPE, CPU, meta=meta)


# -------------------------------------------------------------------------------------------------------------- losses


def softmax(z: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    e = np.exp(z / temperature)
    return e / e.sum(1, keepdims=True)


def test_disagreement_by_hand_and_by_its_temperature() -> None:
    s, t = (torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    for temperature in (1.0, 3.0):
        p, q = softmax(t.numpy(), temperature), softmax(s.numpy(), temperature)
        m = (p + q) / 2
        kl = temperature**2 * (p * np.log(p / q)).sum(1)
        jsd = ((p * np.log(p / m)).sum(1) + (q * np.log(q / m)).sum(1)) / 2
        assert disagreement(s, t, "kl", temperature).numpy() == approx(kl)
        assert disagreement(s, t, "jsd", temperature).numpy() == approx(jsd)
    assert disagreement(s, t, "l1").numpy() == approx(np.abs(s.numpy() - t.numpy()).mean(1))


def test_imbalance_and_total_variation_by_hand() -> None:
    z = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p = softmax(z.numpy()).mean(0)
    assert imbalance(z).item() == approx((p * np.log(p)).sum())
    assert imbalance(torch.tensor([[800.0, 0.0], [0.0, 800.0]])).item() == approx(-np.log(2))
    assert imbalance(torch.tensor([[800.0, 0.0]])).item() == 0
    x = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    a = x.numpy()
    parts = [
        a[..., :, 1:] - a[..., :, :-1], a[..., 1:, :] - a[..., :-1, :],
        a[..., 1:, 1:] - a[..., :-1, :-1], a[..., 1:, :-1] - a[..., :-1, 1:],
    ]  # fmt: skip
    assert total_variation(x).item() == approx(sum(np.sqrt((part**2).sum()) for part in parts))


def test_bn_distance_by_hand_with_and_without_momentum() -> None:
    features = [torch.rand(6, 3, 2, 2).double(), torch.rand(6, 4).double()]
    norms = [nn.BatchNorm2d(3).double(), nn.BatchNorm1d(4).double()]
    before = [(torch.rand(c).double(), torch.rand(c).double()) for c in (3, 4)]
    for momentum in (0.0, 0.9):
        expected = 0.0
        for x, (old_mean, old_var) in zip(features, before, strict=True):
            a = x.numpy().reshape(6, x.shape[1], -1)
            mean = (1 - momentum) * a.mean((0, 2)) + momentum * old_mean.numpy()
            var = (1 - momentum) * a.var((0, 2)) + momentum * old_var.numpy()
            expected += float(np.linalg.norm(1 - var) + np.linalg.norm(0 - mean))
        got = bn_distance([moments(x) for x in features], norms, before if momentum else (), momentum)
        assert got.item() == approx(expected)


def test_contrast_is_infonce_over_new_and_remembered_images() -> None:
    torch.manual_seed(0)
    contrast = Contrast(5, temperature=0.2, memory=6, negatives=10)
    views = [torch.rand(4, 5) for _ in range(4)]

    def by_hand(local: Tensor, other: Tensor) -> np.ndarray:
        with torch.no_grad():
            q, k = (F.normalize(contrast.head(x), dim=1).numpy().astype(np.float64) for x in (local, other))
        return -np.log(np.diag(softmax(q @ k.T / 0.2)))

    assert contrast(views[0], views[1]).item() == approx(by_hand(views[0], views[1]).mean(), rel=1e-5)
    contrast.remember(views[0], views[1])
    contrast.remember(views[2], views[3])  # the memory holds six of these eight: the first two made room
    assert {tuple(row) for row in contrast.memory[:, 0].tolist()} == {
        tuple(row) for row in [*views[0][2:].tolist(), *views[2].tolist()]
    }
    new = torch.rand(2, 4, 5)
    both = by_hand(torch.cat([new[0], contrast.memory[:, 0]]), torch.cat([new[1], contrast.memory[:, 1]]))
    assert contrast(new[0], new[1]).item() == approx(both[:4].mean() + both[4:].mean(), rel=1e-5)


@pytest.mark.parametrize("preset", ["dafl", "dfad", "zskt", "dfq", "deep_inversion", "fast"])
@pytest.mark.parametrize("targets", [None, torch.arange(12) % 10])
def test_the_loss_of_images_is_the_weighted_sum_by_hand(preset: str, targets: Tensor | None) -> None:
    made = synthesizer(preset, shift=0, flip=False, l2=0.3, tv=0.1)
    recipe, teacher, student = made.recipe, made.teacher.model, made.student
    images = torch.rand(12, *SHAPE)
    inputs: list[Tensor] = []
    watched = copy.deepcopy(teacher)
    for module in watched.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Linear):
            module.register_forward_pre_hook(lambda _, given: inputs.append(given[0].clone()))
    with torch.no_grad():
        t, s = watched(images), student(images)
        distance = 0.0
        for norm, x in zip([m for m in watched.modules() if isinstance(m, nn.BatchNorm2d)], inputs, strict=False):
            var, mean = x.var((0, 2, 3), unbiased=False), x.mean((0, 2, 3))
            assert norm.running_var is not None and norm.running_mean is not None
            distance += float((norm.running_var - var).norm() + (norm.running_mean - mean).norm())
        p, q = F.softmax(t / recipe.temperature, 1), F.softmax(s / recipe.temperature, 1)
        m = (p + q) / 2
        apart = {
            "kl": (p * (p / q).log()).sum(1),
            "jsd": ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)) / 2,
            "l1": (t - s).abs().mean(1),
        }[recipe.distance]
        if recipe.masked:
            agreed = t.argmax(1) == s.argmax(1)
            assert 0 < agreed.sum() < 12
            apart = apart * agreed
        share = F.softmax(t, 1).mean(0)
        expected = (
            recipe.bn * distance
            + recipe.one_hot * F.cross_entropy(t, t.argmax(1) if targets is None else targets)
            - recipe.adversarial * apart.mean()
            + recipe.balance * (share * share.log()).sum()
            - recipe.activation * inputs[-1].abs().mean()
            + 0.1 * total_variation(images)
            + 0.3 * images.norm()
        )
    assert made.loss(images, targets).item() == approx(float(expected), rel=1e-4)


def test_the_adversarial_term_waits_for_the_warm_up() -> None:
    images = torch.rand(12, *SHAPE)
    waiting, never = (synthesizer("dfq", **given) for given in ({"warmup": 2}, {"adversarial": 0.0}))
    assert waiting.loss(images).item() == approx(never.loss(images).item())
    waiting.rounds = 2
    assert waiting.loss(images).item() < never.loss(images).item() - 1e-6


# -------------------------------------------------------------------------------------------------------------- images


def test_a_generator_starts_with_the_mean_and_deviation_of_the_teachers_images() -> None:
    torch.manual_seed(0)
    shape = [3, 9, 14]
    generator = Generator(latent=7, width=4, image_shape=shape, mean=torch.tensor([0.3, 0.5, 0.7]), std=0.1)
    images = generator(generator.noise(64, CPU))
    assert images.shape == (64, *shape) and 0 <= images.min() and images.max() <= 1
    assert images.mean((0, 2, 3)).tolist() == approx([0.3, 0.5, 0.7], abs=0.03)
    assert images.std((0, 2, 3)).tolist() == approx([0.1] * 3, abs=0.03)


def test_a_pool_keeps_copies_of_the_latest_images() -> None:
    pool = ImagePool(5, SHAPE, CPU)
    images = torch.arange(4.0)[:, None, None, None].expand(4, *SHAPE).clone() / 255
    pool.add(images)
    images += 4 / 255
    assert pool.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    pool.add(images)
    assert pool.images[:, 0, 0, 0].tolist() == [3, 4, 5, 6, 7]
    drawn = pool.draw(200)
    assert set((drawn[:, 0, 0, 0] * 255).round().int().tolist()) == {3, 4, 5, 6, 7}


def test_the_best_images_of_a_round_are_copies() -> None:
    best, images = _Best(), torch.ones(2, 1)
    best.offer(torch.tensor(2.0), images, None)
    images += 1
    best.offer(torch.tensor(3.0), images, None)
    images += 1
    assert best.images.tolist() == [[1.0], [1.0]]
    best.offer(torch.tensor(1.0), images, None)
    images += 1
    assert best.images.tolist() == [[3.0], [3.0]]


def test_images_are_moved_each_by_its_own_offset() -> None:
    torch.manual_seed(0)
    images = torch.rand(20, 2, 6, 6)
    seen = moved(images, 1, False)
    padded, offsets = F.pad(images, [1] * 4), set()
    for number in range(20):
        found = [
            (r, c) for r in range(3) for c in range(3)
            if torch.equal(padded[number, :, r : r + 6, c : c + 6], seen[number])
        ]  # fmt: skip
        assert len(found) == 1
        offsets.update(found)
    assert len(offsets) > 5
    flipped = moved(images, 0, True)
    same = [torch.equal(a, b) for a, b in zip(flipped, images, strict=True)]
    assert 0 < sum(same) < 20
    assert all(torch.equal(flipped[i], images[i].flip(2)) for i in range(20) if not same[i])
    assert zoomed(images, False).shape == images.shape and zoomed(images, False).max() <= images.max() + 1e-6


def test_data_augment_shows_synthetic_images_in_other_views() -> None:
    images, index = torch.rand(8, 1, 8, 8), torch.arange(8)
    assert _augmented(images, Augment([]), index, 3) is images
    augment = Augment([RandomCrop(padding=2)])
    first, again, other = (_augmented(images, augment, index, view) for view in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape == images.shape


# -------------------------------------------------------------------------------------------------------------- rounds


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_round_changes_neither_teacher_nor_student(preset: str) -> None:
    made = synthesizer(preset)
    models = [made.teacher.model, made.student]
    made.student.train()
    made.student.net.get_submodule("layer1").eval()  # a frozen part
    before = [copy.deepcopy(m.state_dict()) for m in models]
    modes = [[module.training for module in m.modules()] for m in models]
    for _ in range(2):
        made.round()
        images = made.images(7)
        assert images.shape == (7, *SHAPE) and 0 <= images.min() < images.max() <= 1 and not images.requires_grad
    for m, state, mode in zip(models, before, modes, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in m.state_dict().items())
        assert [module.training for module in m.modules()] == mode
        assert all(p.grad is None for p in m.parameters())
    assert not any(p.requires_grad for p in made.teacher.model.parameters())


@pytest.mark.parametrize("preset", list(PRESETS))
def test_rounds_lower_the_loss_of_images(preset: str) -> None:
    made = synthesizer(preset, g_steps=20, inversion_steps=20, generator_lr=0.02, bn_momentum=0.0)
    losses: list[Tensor] = []
    loss = made.loss
    made.loss = lambda *given: (losses.append(loss(*given)), losses[-1])[1]  # type: ignore
    made.round()
    values = [value.item() for value in losses]
    assert len(values) == 20
    assert sum(values[-5:]) < sum(values[:5]) - 0.01


@pytest.mark.parametrize("meta", ["fomaml", "reptile"])
def test_the_generator_learns_from_what_its_copy_went_through(meta: str) -> None:
    made = synthesizer("fast", meta, g_steps=1, adversarial=0.0, shift=0, flip=False)
    start = copy.deepcopy(made.generator)
    torch.manual_seed(5)
    made.round()
    torch.manual_seed(5)
    latent, targets = torch.randn(12, 6), torch.randint(10, (12,))
    made._moments = []
    gradients = torch.autograd.grad(made.loss(start(latent), targets), list(start.parameters()))
    lr = made.recipe.generator_lr  # one step of Adam on g is lr g / (|g| + 1e-8); Reptile's g is that step itself
    for before, after, g in zip(start.parameters(), made.generator.parameters(), gradients, strict=True):
        step = lr * g / (g.abs() + 1e-8)
        far = g.abs() > 1e-5
        seen = (step if meta == "reptile" else g)[far]
        assert torch.allclose((before - after)[far], lr * seen / (seen.abs() + 1e-8), atol=lr / 50)
    assert not torch.equal(made.generator.get_parameter("fc.weight"), start.get_parameter("fc.weight"))


def test_statistics_of_earlier_rounds_count_for_the_momentum() -> None:
    made = synthesizer("fast")
    made.round()
    first, seen = made._moments, made._seen
    for one, other in zip(first, seen, strict=True):
        assert all(torch.allclose(a, b) for a, b in zip(one, other, strict=True))
    made.round()
    for old, new, kept in zip(first, made._seen, made._moments, strict=True):
        for a, b, got in zip(old, new, kept, strict=True):
            assert torch.allclose(got, 0.9 * a + 0.1 * b) and not got.requires_grad


def test_the_generator_of_cmi_starts_anew_each_round() -> None:
    made = synthesizer("cmi", g_steps=1, generator_lr=1e-9)
    made.round()
    first = made.generator.get_parameter("fc.weight").clone()
    made.round()
    assert (made.generator.get_parameter("fc.weight") - first).abs().mean() > 0.01
    assert int(made._contrast.stored) == 24 and len(made.pool.images) == 24  # type: ignore[union-attr]
