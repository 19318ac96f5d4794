"""Augmentation: right pixels, and a pure function of (seed, index, view, stream)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from kdctl import registry
from kdctl.data import AUGMENTATIONS, augment, pixels
from kdctl.data.augment import Augment, Augmentation, Views
from kdctl.data.color_jitter import ColorJitter
from kdctl.data.rand_augment import CHANGES, RandAugment
from kdctl.data.spatial import Cutout, HorizontalFlip, RandomCrop, RandomResizedCrop
from kdctl.errors import ConfigError

SHAPE = (3, 12, 10)


def images(count: int = 40, shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def applied(chain: Augment, batch: Tensor, view: int = 0, stream: int = 0) -> Tensor:
    index = torch.arange(len(batch))
    return chain(batch, index, torch.full_like(index, view), stream)


CHAINS: dict[str, list[Augmentation]] = {
    "crop": [RandomCrop(padding=2)],
    "flip": [HorizontalFlip()],
    "cutout": [Cutout(size=5)],
    "crop flip cutout": [RandomCrop(), HorizontalFlip(p=0.3), Cutout(size=4)],
    "resized crop": [RandomResizedCrop(size=9)],
    "color jitter": [ColorJitter()],
    "rand augment": [RandAugment(num_ops=2, magnitude=10)],
    "all": [RandomResizedCrop(), HorizontalFlip(), ColorJitter(brightness=0.2), RandAugment(), Cutout(size=3)],
}


@pytest.fixture(params=CHAINS)
def chain(request: pytest.FixtureRequest) -> Augment:
    return Augment(CHAINS[request.param], seed=3)


# ------------------------------------------------------------------------------------------------------------- purity


def test_a_sample_does_not_depend_on_its_batch(chain: Augment) -> None:
    batch, index, view = images(), torch.arange(40) * 7, torch.arange(40) % 5
    together = chain(batch, index, view)
    rows = torch.tensor([31, 2, 17])
    assert chain(batch[rows], index[rows], view[rows]).equal(together[rows])
    alone = [chain(batch[i : i + 1], index[i : i + 1], view[i : i + 1]) for i in range(0, 40, 7)]
    assert torch.cat(alone).equal(together[::7])


def test_parts_of_a_batch_change_nothing(chain: Augment, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = applied(chain, images())
    monkeypatch.setattr(augment, "_PART_BYTES", 7 * 360)
    assert applied(chain, images()).equal(whole)


def test_memory_layout_changes_nothing(chain: Augment) -> None:
    batch = images()
    assert applied(chain, batch.to(memory_format=torch.channels_last)).equal(applied(chain, batch))
    assert batch.equal(images()), "the input is left as it was"


def test_every_key_changes_the_draws(chain: Augment) -> None:
    batch = images(1).expand(40, -1, -1, -1)
    base = applied(chain, batch)
    assert not base.equal(applied(chain, batch, view=1))
    assert not base.equal(applied(chain, batch, stream=1))
    assert not base.equal(applied(Augment(chain.operations, seed=4), batch))
    assert len(torch.unique(base.flatten(1), dim=0)) > 1, "samples differ"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_makes_the_same_pixels(chain: Augment) -> None:
    batch, index = images(), torch.arange(40)
    on_gpu = chain(batch.cuda(), index.cuda(), index.cuda())
    assert on_gpu.cpu().equal(chain(batch, index, index))


def test_a_known_result_stays_the_same_between_releases() -> None:
    """Stores of teacher outputs and resumed runs rely on it: a change here must change the store's key."""
    batch = torch.arange(2 * 8 * 8, dtype=torch.uint8).view(2, 1, 8, 8)
    out = applied(Augment([RandomCrop(padding=1), HorizontalFlip()], seed=1), batch, view=5)
    assert out.sum((2, 3)).flatten().tolist() == [1792, 4459]


# ------------------------------------------------------------------------------------------------- crop, flip, cutout


def naive(image: np.ndarray, padding: int, top: int, left: int, flip: bool) -> np.ndarray:
    height, width = image.shape[1:]
    padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
    window = padded[:, top : top + height, left : left + width]
    return window[:, :, ::-1] if flip else window


def test_crop_and_flip_equal_a_per_image_loop() -> None:
    batch, places = images(60), torch.arange(60)
    crop, flip = RandomCrop(padding=4), HorizontalFlip()
    out = flip.apply(crop.apply(batch, places), places % 2)
    for i in range(60):
        top, left = divmod(i, 9)
        np.testing.assert_array_equal(out[i].numpy(), naive(batch[i].numpy(), 4, top, left, bool(i % 2)))


@pytest.mark.parametrize(("padding", "size"), [(0, 7), (2, 11), (3, None), (0, None), (1, 3)])
def test_crop_sizes(padding: int, size: int | None) -> None:
    crop = RandomCrop(padding=padding, size=size)
    _, height, width = crop.output_shape(SHAPE)
    rows, columns = 12 + 2 * padding - height + 1, 10 + 2 * padding - width + 1
    count = crop.num_choices(SHAPE)
    assert count == rows * columns
    batch = images(count)
    out = crop.apply(batch, torch.arange(count))
    padded = np.pad(batch.numpy(), ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    for i in range(count):
        top, left = divmod(i, columns)
        np.testing.assert_array_equal(out[i].numpy(), padded[i, :, top : top + height, left : left + width])


def test_crop_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"17x17.*12x10.*padding 2"):
        Augment([RandomCrop(padding=2, size=17)]).output_shape(SHAPE)


def test_flip_probability() -> None:
    batch = images(1).expand(4000, -1, -1, -1)
    flipped = batch[0].flip(2)
    for p in (0.0, 0.25, 1.0):
        out = applied(Augment([HorizontalFlip(p=p)]), batch)
        share = (out == flipped).flatten(1).all(1).float().mean().item()
        assert abs(share - p) < 0.03
        assert ((out == flipped).flatten(1).all(1) | (out == batch).flatten(1).all(1)).all()


@pytest.mark.parametrize("size", [1, 4, 5, 40])
def test_cutout_equals_a_per_image_loop(size: int) -> None:
    batch = images(120).clamp_min(1)
    out = Cutout(size=size).apply(batch, torch.arange(120))
    for i in range(120):
        y, x = divmod(i, 10)
        expected = batch[i].clone()
        top, left = y - size // 2, x - size // 2
        expected[:, max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = 0
        assert out[i].equal(expected)


# --------------------------------------------------------------------------------------------------------- enumeration


def test_all_views_of_crop_and_flip_are_162_different_ones() -> None:
    shape = (3, 32, 32)
    chain = Augment([RandomCrop(padding=4), HorizontalFlip()]).enumerate(shape)
    assert chain.num_choices(shape) == 162
    batch = images(1, shape).expand(162, -1, -1, -1)
    index = torch.full((162,), 9)
    out = chain(batch, index, torch.arange(162))
    assert len(torch.unique(out.flatten(1), dim=0)) == 162
    places = torch.arange(81)
    crops = RandomCrop(padding=4).apply(batch[:81], places)
    expected = torch.cat([crops, crops.flip(3)])
    assert torch.unique(out.flatten(1), dim=0).equal(torch.unique(expected.flatten(1), dim=0))
    other = chain(batch, index, torch.arange(162), stream=1)
    assert not (out == other).flatten(1).all(1).any(), "another stream shows another choice at every view"


def test_all_reaches_each_view_once_in_as_many_epochs_and_mixes_a_batch() -> None:
    views = Views("all", 0, 162)
    index = torch.arange(1000)
    seen = torch.stack([views.at(epoch, index) for epoch in range(162)])
    assert seen.sort(0).values.equal(torch.arange(162)[:, None].expand(-1, 1000))
    assert len(torch.unique(seen[0])) > 150


def test_views_fresh_and_k() -> None:
    index = torch.arange(4)
    assert Views("fresh", 0, None).at(7, index).tolist() == [7] * 4
    assert Views(3, 0, None).at(7, index).tolist() == [1] * 4


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        ([RandomCrop(), RandomResizedCrop()], "RandomResizedCrop"),
        ([ColorJitter()], "ColorJitter"),
        ([Cutout()] * 4, "2\\^31"),
    ],
)
def test_infinite_sets_cannot_be_enumerated(operations: list[Augmentation], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Augment(operations).enumerate((3, 256, 256))


# ------------------------------------------------------------------------------------------------------- resized crop


def test_resized_crop_of_the_whole_image_is_the_image() -> None:
    chain = Augment([RandomResizedCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0))])
    batch = images(8, (3, 9, 9))
    assert applied(chain, batch).equal(batch)


def test_resized_crop_is_near_exact_bilinear() -> None:
    batch = images(6, (3, 20, 16))
    top, left = torch.tensor([0, 3, 5, 0, 19, 7]), torch.tensor([0, 4, 2, 15, 0, 1])
    tall, wide = torch.tensor([20, 9, 4, 20, 1, 6]), torch.tensor([16, 5, 14, 1, 16, 13])
    out = RandomResizedCrop(size=24).apply(batch, (top, left, tall, wide))
    for i in range(6):
        window = batch[i, :, top[i] : top[i] + tall[i], left[i] : left[i] + wide[i]].float()[None]
        exact = torch.nn.functional.interpolate(window, (24, 24), mode="bilinear", align_corners=False)[0]
        assert (out[i].float() - exact).abs().max() <= 3  # two passes with weights in 128ths
        assert (out[i].float() - exact).abs().mean() < 1


def test_resized_crop_windows_have_the_asked_areas_and_ratios() -> None:
    operation = RandomResizedCrop(scale=(0.2, 0.6), ratio=(0.5, 2.0))
    from kdctl.data.counter import Draws, fold

    top, left, tall, wide = operation.draw(Draws(fold(0, torch.arange(4000)), 0), (3, 200, 300))
    assert bool((top >= 0).all() and (left >= 0).all() and (top + tall <= 200).all() and (left + wide <= 300).all())
    inside = (tall < 200) & (wide < 300)
    area = (tall * wide)[inside] / 60000
    ratio = (wide / tall)[inside]
    assert 0.19 < area.min() and area.max() < 0.61 and 0.49 < ratio.min() and ratio.max() < 2.05
    assert abs(float(ratio.log().mean())) < 0.2
    assert top.float().std() > 20 and left.float().std() > 20


@pytest.mark.parametrize("arguments", [{"scale": (0.9, 0.1)}, {"scale": (0.5, 1.5)}, {"ratio": (2.0, 1.0)}])
def test_resized_crop_refuses_empty_ranges(arguments: dict[str, tuple[float, float]]) -> None:
    with pytest.raises(ConfigError, match="allowed"):
        RandomResizedCrop(**arguments)


# ------------------------------------------------------------------------------------------------------------- pixels

PILLOW: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Image.Image], Image.Image]]] = {
    "brightness": (lambda x: pixels.brightness(x, 1.4), lambda i: ImageEnhance.Brightness(i).enhance(1.4)),
    "darkness": (lambda x: pixels.brightness(x, 0.3), lambda i: ImageEnhance.Brightness(i).enhance(0.3)),
    "contrast": (lambda x: pixels.contrast(x, 1.5), lambda i: ImageEnhance.Contrast(i).enhance(1.5)),
    "less contrast": (lambda x: pixels.contrast(x, 0.4), lambda i: ImageEnhance.Contrast(i).enhance(0.4)),
    "color": (lambda x: pixels.color(x, 1.7), lambda i: ImageEnhance.Color(i).enhance(1.7)),
    "sharpness": (lambda x: pixels.sharpness(x, 1.9), lambda i: ImageEnhance.Sharpness(i).enhance(1.9)),
    "blur": (lambda x: pixels.sharpness(x, 0.2), lambda i: ImageEnhance.Sharpness(i).enhance(0.2)),
    "posterize": (lambda x: pixels.posterize(x, 3), lambda i: ImageOps.posterize(i, 3)),
    "solarize": (lambda x: pixels.solarize(x, 99), lambda i: ImageOps.solarize(i, 99)),
    "invert": (pixels.invert, ImageOps.invert),
    "autocontrast": (pixels.autocontrast, ImageOps.autocontrast),
    "equalize": (pixels.equalize, ImageOps.equalize),
    "grey": (lambda x: pixels.grey(x).to(torch.uint8), lambda i: i.convert("L")),
}
EXACT = {"posterize", "solarize", "invert", "equalize", "grey"}


@pytest.mark.parametrize("name", PILLOW)
def test_pixel_operations_compute_what_pillow_computes(name: str) -> None:
    ours, pillow = PILLOW[name]
    shape = (3, 33, 40)
    flat, dim = images(1, shape), images(1, shape) // 8 + 90
    flat[:] = 77
    batch = torch.cat([images(4, shape), images(2, shape, seed=1) // 3 + 40, flat, dim])
    out = ours(batch)
    for image, result in zip(batch, out, strict=True):
        array = np.asarray(pillow(Image.fromarray(image.permute(1, 2, 0).numpy())))
        expected = array.transpose(2, 0, 1) if array.ndim == 3 else array[None]
        difference = np.abs(result.numpy().astype(int) - expected.astype(int))
        assert difference.max() <= (0 if name in EXACT else 1)


def test_grey_images_pass_through_every_operation() -> None:
    batch = images(200, (1, 8, 8))
    out = applied(Augment([ColorJitter(), RandAugment(num_ops=2, magnitude=20)]), batch)
    assert out.shape == batch.shape and out.dtype == torch.uint8


# ------------------------------------------------------------------------------------------------------- rand_augment


def test_geometric_operations_equal_pillow_but_for_ties() -> None:
    """A smooth image, so that a neighbour taken on a tie or a rounded matrix shows as a small difference."""
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    image = (3 * y + 4 * x).to(torch.uint8).expand(1, 3, 32, 32)
    pillow = Image.fromarray(image[0].permute(1, 2, 0).numpy())

    def warped(*matrix: float) -> np.ndarray:
        return np.asarray(pillow.transform((32, 32), Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST))

    expected = {
        ("translate_x", 1): warped(1, 0, round(150 / 331 * 0.5 * 32), 0, 1, 0),
        ("translate_y", -1): warped(1, 0, 0, 0, 1, -round(150 / 331 * 0.5 * 32)),
        ("rotate", 1): np.asarray(pillow.rotate(15)),
        ("rotate", -1): np.asarray(pillow.rotate(-15)),
        ("shear_x", 1): warped(1, 0.15, -0.15 * 16, 0, 1, 0),
        ("shear_y", -1): warped(1, 0, 0, -0.15, 1, 0.15 * 16),
    }
    for (name, sign), reference in expected.items():
        out = CHANGES[name](0.5, sign)(image)[0].permute(1, 2, 0).numpy()
        difference = np.abs(out.astype(int) - reference.astype(int))
        assert (difference <= (0 if name.startswith("translate") else 7)).mean() > 0.97, name


def test_rand_augment_is_the_chosen_operations_in_a_row() -> None:
    names = ["invert", "rotate", "equalize"]
    operation = RandAugment(num_ops=2, magnitude=15, operations=names)
    count = operation.num_choices(SHAPE)
    assert count == 36
    batch = images(count)
    out = operation.apply(batch, torch.arange(count))
    signed = [(name, sign) for name in names for sign in (1, -1)]
    for i in range(count):
        expected = batch[i : i + 1]
        for name, sign in (signed[i % 6], signed[i // 6]):
            expected = CHANGES[name](0.5, sign)(expected)
        assert out[i].equal(expected[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operations": ["rotat"]}, "did you mean 'rotate'"),
        ({"operations": []}, "allowed: identity"),
        ({"magnitude": 31}, "at most 30"),
        ({"num_ops": 6}, "at most 5"),
    ],
)
def test_rand_augment_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RandAugment(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_does_something_at_full_strength(name: str) -> None:
    batch = images(3, (3, 32, 32)) // 2 + 20
    changed = CHANGES[name](1.0, 1)(batch)
    assert changed.shape == batch.shape and changed.dtype == torch.uint8
    assert changed.equal(batch) == (name == "identity")


def test_color_jitter_factors_span_their_ranges() -> None:
    from kdctl.data.counter import Draws, fold

    factors = ColorJitter(brightness=0.5, contrast=0.0).draw(Draws(fold(0, torch.arange(4000)), 0), SHAPE)
    assert 0.5 <= factors[0].min() < 0.51 and 1.49 < factors[0].max() <= 1.5
    assert bool((factors[1] == 1).all())


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_table_entries_are_augmentations_that_the_registry_can_make(name: str) -> None:
    assert isinstance(registry.create("augment", name, {}), Augmentation)
