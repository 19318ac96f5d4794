"""Data-free distillation: the student learns on images that are synthesised from the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kdctl.config.types import NonNegative, NonNegativeInt, Positive, PositiveInt
from kdctl.data.augment import Augment
from kdctl.data.base import Shape
from kdctl.data.loader import TrainLoader, as_inputs
from kdctl.errors import ConfigError, Problem
from kdctl.methods.base import Parts
from kdctl.methods.distill import Distill
from kdctl.methods.synthesis import PRESETS, Recipe, as_bytes, classifier, is_batch_norm
from kdctl.methods.synthesizer import Sizes, Synthesizer
from kdctl.models.record import Model
from kdctl.signals import CLEAN, IGNORE, Batch
from kdctl.teachers.cached import CachedTeacher

_WITHOUT_BN = "dafl, dfad and zskt need none"


class DataFree(Distill):
    """The student learns from the teacher on synthesised images: no real image is needed.

    Formula: images minimise bn * sum over layers (||var_run - var||_2 + ||mean_run - mean||_2)
        + one_hot * CE(t, y) - adversarial * D(s, t) + balance * sum_c p_c log p_c - activation * mean |f_t|
        + tv * TV + l2 * ||x||_2 + contrastive * InfoNCE; p is the mean of softmax(t) over a batch, f_t the input of the
        teacher's classifier, y the class to be shown (with one generator: the teacher's own answer). The student then
        takes kd_steps steps on the experiment's terms (kd, logit_mse, ...), which see these images without labels.
    Paper: presets dafl (Chen et al., Data-Free Learning of Student Networks, ICCV 2019), dfad (Fang et al., Data-Free
        Adversarial Distillation, 2019), zskt (Micaelli & Storkey, NeurIPS 2019, without its attention term), dfq (Choi
        et al., Data-Free Network Quantization With Adversarial Knowledge Distillation, CVPR workshops 2020),
        deep_inversion (Yin et al., Dreaming to Distill, CVPR 2020), cmi (Fang et al., Contrastive Model Inversion,
        IJCAI 2021), fast (Fang et al., Up to 100x Faster Data-free Knowledge Distillation, AAAI 2022).
    Published: CIFAR-10, 200 epochs of 400 steps of 256 images (220 of `fast`), kd with T 20, sgd with lr 0.1 (`fast`
        0.2); the presets' numbers are those of zju-vipa/Fast-Datafree. A pool there keeps all images that were made.
    Images: those that the teacher takes, of the experiment's data set, whose size alone is looked at. data.augment
        augments synthetic images. Real images are measured on and nothing else: the validation split picks the epoch
        that is shipped, unless train.keep is `last`, with which no real image influences the student.

    Presets: adversarial, bn, one_hot, D, steps of the generator : of the student, learning rate; what else is not 0.
        dafl            0    0   1            1 : 5      1e-3   activation 0.001, balance 20, latent 512
        dfad            1    0   0    l1      1 : 5      1e-3
        zskt            1    0   0    kl      1 : 5      1e-3
        dfq             1    1   1    kl      1 : 10     1e-3   balance 20
        deep_inversion  1    10  1    jsd     1000 : 400 0.1    temperature 3, tv 0.001, shift 4, flip
        cmi             0.5  1   1    kl      200 : 400  1e-3   masked, contrastive 0.8, shift 4, flip
        fast            1.1  10  0.4  kl      5 : 400    3e-3   masked, bn_momentum 0.9, warmup 20,
                                                                latent_lr 0.01, shift 4, flip

    preset: the recipe; arguments that are given take the place of its numbers.
    steps: steps of the student that make an epoch.
    adversarial: weight of the disagreement D of student and teacher, which images are to raise.
    bn: weight of the distance from the running statistics of the teacher's batch normalisations.
    one_hot: weight of the cross-entropy of the teacher's answer.
    activation: weight of the size of the teacher's embedding.
    balance: weight of how unevenly classes are shown.
    distance: D is the KL divergence (times T^2), the Jensen-Shannon divergence (jsd), or the L1 distance of logits.
    temperature: T of kl and jsd in D; that of the student's loss is the term's own.
    masked: D counts only on images on whose class student and teacher agree.
    tv: weight of total variation, four directions, L2 norm over the batch.
    l2: weight of the L2 norm of the batch.
    contrastive: weight of telling an image from others by the teacher's features of two views (cmi).
    contrastive_temperature: T of that similarity.
    g_steps: steps of the generator in a round, before every kd_steps steps of the student.
    inversion_steps: the same where pixels are optimised (deep_inversion).
    kd_steps: steps of the student in a round.
    warmup: rounds of synthesis, without the adversarial term, before the student's first step.
    latent: how many random numbers an image is made of.
    generator_lr: learning rate of the generator, or of the pixels.
    latent_lr: learning rate of the random numbers themselves, where these are optimised too (cmi, fast).
    bn_momentum: share of earlier rounds in the statistics that bn compares (fast).
    meta: how the generator of `fast` learns to be a good start: fomaml, or reptile.
    shift: images are looked at shifted by at most this many pixels while they are optimised.
    flip: they are looked at mirrored, half of the time; for digits set it to false.
    synthesis_batch: images of a round; those of a training batch when left out.
    generator_width: channels of the generator's last hidden maps.
    pool_size: how many of the latest images are kept (deep_inversion, cmi, fast).
    memory: of how many earlier images the features are kept (cmi, published: 40960).
    negatives: how many of these are drawn each time (cmi, published: 4096).
    normalize: teacher: the student normalises images as the teacher does; own: as its own record says, which by default
        is a statistic of the data's training images.
    """

    parallel: ClassVar[bool] = False
    makes_samples: ClassVar[bool] = True
    smoke: ClassVar[dict[str, Any]] = {"steps": 2, "g_steps": 1, "inversion_steps": 1, "warmup": 0}

    def __init__(
        self,
        *,
        preset: Literal["dafl", "dfad", "zskt", "dfq", "deep_inversion", "cmi", "fast"] = "fast",
        steps: PositiveInt = 100,
        adversarial: NonNegative | None = None,
        bn: NonNegative | None = None,
        one_hot: NonNegative | None = None,
        activation: NonNegative | None = None,
        balance: NonNegative | None = None,
        distance: Literal["kl", "jsd", "l1"] | None = None,
        temperature: Positive | None = None,
        masked: bool | None = None,
        tv: NonNegative | None = None,
        l2: NonNegative | None = None,
        contrastive: NonNegative | None = None,
        contrastive_temperature: Positive | None = None,
        g_steps: PositiveInt | None = None,
        inversion_steps: PositiveInt | None = None,
        kd_steps: PositiveInt | None = None,
        warmup: NonNegativeInt | None = None,
        latent: PositiveInt | None = None,
        generator_lr: Positive | None = None,
        latent_lr: Positive | None = None,
        bn_momentum: NonNegative | None = None,
        shift: NonNegativeInt | None = None,
        flip: bool | None = None,
        meta: Literal["fomaml", "reptile"] = "fomaml",
        synthesis_batch: PositiveInt | None = None,
        generator_width: PositiveInt = 64,
        pool_size: PositiveInt = 20000,
        memory: PositiveInt = 4096,
        negatives: PositiveInt = 1024,
        normalize: Literal["teacher", "own"] = "teacher",
    ) -> None:
        given = {
            "adversarial": adversarial, "bn": bn, "one_hot": one_hot, "activation": activation, "balance": balance,
            "distance": distance, "temperature": temperature, "masked": masked, "tv": tv, "l2": l2,
            "contrastive": contrastive, "contrastive_temperature": contrastive_temperature, "g_steps": g_steps,
            "inversion_steps": inversion_steps, "kd_steps": kd_steps, "warmup": warmup, "latent": latent,
            "generator_lr": generator_lr, "latent_lr": latent_lr, "bn_momentum": bn_momentum, "shift": shift,
            "flip": flip,
        }  # fmt: skip
        self.recipe = _overridden(PRESETS[preset], given)
        self._steps, self._meta, self._normalize = steps, meta, normalize
        self._batch, self._width, self._pool = synthesis_batch, generator_width, pool_size
        self._memory, self._negatives = memory, negatives
        self._taught = 0

    # ------------------------------------------------------------------------------------------------ being built

    def prepare(self, student: Model, teachers: Sequence[Model], fresh: Callable[[int], Model]) -> Model:
        if len(teachers) != 1:
            message = f"images are synthesised from one teacher, and there are {len(teachers)}"
            raise ConfigError(Problem(message, key="teacher", hint="add teacher: {kind: ..., weights: ...}"))
        _check_teacher(teachers[0], self.recipe)
        if self._normalize == "own":
            return student
        record = replace(student.record, normalize=teachers[0].record.normalize)
        return Model(student.net, record, student.base)

    def loader(self, loader: TrainLoader) -> Any:
        self._augment, self._image_shape, self._batch_size = loader.augment, loader.split.input_shape, loader.batch_size
        return Synthetic(loader.input_shape, loader.batch_size, self._steps, loader.device)

    def assemble(self, parts: Parts) -> None:
        for term in parts.terms:
            if term.loss.needs_targets:
                message = "the term needs labels, and synthetic images have none"
                hint = "losses: [{kind: kd, temperature: 20}], or another term between student and teacher"
                raise ConfigError(Problem(message, key=f"losses.{term.name}", hint=hint))
        if parts.teacher is None or isinstance(parts.teacher, CachedTeacher):
            message = "what the teacher says of synthetic images cannot be stored: they are new at every step"
            raise ConfigError(Problem(message, key="teacher_cache", hint="remove it"))
        super().assemble(parts)
        sizes = Sizes(self._batch or self._batch_size, self._width, self._pool, self._memory, self._negatives)
        self.synthesizer = Synthesizer(
            self.recipe, sizes, parts.teacher.models[0], parts.student, self._image_shape, parts.device,
            meta=self._meta, precision=parts.precision,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------- being run

    def begin_step(self, batch: Batch, epoch: float) -> Batch:
        with self.clock.section("data"):
            if self._taught % self.recipe.kd_steps == 0:
                for _ in range(1 if self._taught else 1 + self.recipe.warmup):
                    self.synthesizer.round()
            images = _augmented(self.synthesizer.images(batch.size), self._augment, batch.index, self._taught)
            self._taught += 1
            return replace(batch, inputs=images)

    def rounds(self) -> tuple[int, int] | None:
        return self.recipe.kd_steps, self.recipe.warmup

    def state_dict(self) -> dict[str, Any]:
        return {"taught": self._taught, "synthesizer": self.synthesizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._taught = state["taught"]
        self.synthesizer.load_state_dict(state["synthesizer"])


class Synthetic:
    """Batches of a size without labels and still without images, which `begin_step` puts in; none is of the data."""

    def __init__(self, image_shape: Shape, batch_size: int, steps: int, device: torch.device) -> None:
        self.image_shape, self.batch_size, self.steps, self.device = image_shape, batch_size, steps, device

    def __len__(self) -> int:
        """Steps an epoch."""
        return self.steps

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from a step on."""
        black = torch.zeros(1, device=self.device).expand(self.batch_size, *self.image_shape)
        for _ in range(start_step, self.steps):
            yield self._batch(black)

    def few(self, count: int) -> Batch:
        """At most `count` images of noise, always the same, of the right shape."""
        size = (min(count, self.batch_size), *self.image_shape)
        return self._batch(torch.rand(size, generator=torch.Generator().manual_seed(0)).to(self.device))

    def _batch(self, images: Tensor) -> Batch:
        index = torch.arange(len(images), device=self.device)
        return Batch(images, torch.full_like(index, IGNORE), index, torch.full_like(index, CLEAN))


def _overridden(recipe: Recipe, given: Mapping[str, Any]) -> Recipe:
    """The recipe with the numbers that were given. Raises ConfigError for ones of which nothing is left."""
    changed = replace(recipe, **{name: value for name, value in given.items() if value is not None})
    if changed.bn_momentum >= 1:
        raise ConfigError(Problem(f"got {changed.bn_momentum}; allowed: below 1", key="method.bn_momentum"))
    if not (changed.adversarial or changed.bn or changed.one_hot):
        message = "images need a goal: adversarial, bn and one_hot are all 0"
        raise ConfigError(Problem(message, key="method", hint="give one of them a weight"))
    if changed.contrastive and changed.style == "generator":
        message = "this preset has no rounds of which images could be remembered"
        raise ConfigError(Problem(message, key="method.contrastive", hint="preset: cmi or fast"))
    if changed.warmup and not (changed.bn or changed.one_hot):
        message = "before the adversarial term starts images would have no goal"
        raise ConfigError(Problem(message, key="method.warmup", hint="warmup: 0"))
    return changed


def _check_teacher(teacher: Model, recipe: Recipe) -> None:
    """Refuses a teacher that lacks what a recipe looks at."""
    for name in ("bn", "contrastive"):
        if getattr(recipe, name) and not any(is_batch_norm(module) for module in teacher.net.modules()):
            message = "the teacher has no batch normalisation whose statistics could be compared"
            raise ConfigError(Problem(message, key=f"method.{name}", hint=f"{name}: 0; the presets {_WITHOUT_BN}"))
    if recipe.activation and classifier(teacher.net) is None:
        message = "the teacher has no linear layer whose input would be the embedding"
        raise ConfigError(Problem(message, key="method.activation", hint="activation: 0"))


def _augmented(images: Tensor, augment: Augment, index: Tensor, view: int) -> Tensor:
    """Synthetic images as the experiment's augmentations show them; untouched where there are none."""
    if not augment.operations:
        return images
    return as_inputs(augment(as_bytes(images), index, torch.full_like(index, view)))
