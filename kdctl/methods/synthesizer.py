"""The maker of images: rounds of synthesis by any recipe, and the state that makes them resumable."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdctl.device import autocast
from kdctl.methods.generator import Generator
from kdctl.methods.synthesis import (
    Contrast,
    ImagePool,
    Inverted,
    Moments,
    Recipe,
    bn_distance,
    disagreement,
    imbalance,
    moments,
    moved,
    total_variation,
    zoomed,
)
from kdctl.models.record import Model
from kdctl.signals import find_logits

_BETAS = (0.5, 0.999)
_PIXEL_BETAS = (0.5, 0.99)


@dataclass(frozen=True)
class Sizes:
    """Of what synthesis works with. batch: images of a round."""

    batch: int
    width: int
    pool: int
    memory: int
    negatives: int


class Synthesizer:
    """Makes images on which a teacher is sure of itself, as real ones would be, and the student is not yet with it.

    A round makes or improves images; `images` gives some. The student is looked at in eval mode and, like the teacher,
    never changed. meta: how a copy of the generator teaches it, for recipes of that style.
    """

    def __init__(
        self, recipe: Recipe, sizes: Sizes, teacher: Model, student: Model, image_shape: Sequence[int],
        device: torch.device, *, meta: Literal["fomaml", "reptile"] = "fomaml", precision: str = "fp32",
    ) -> None:  # fmt: skip
        self.recipe, self.sizes, self.student, self.device = recipe, sizes, student, device
        self.rounds = 0
        statistics = bool(recipe.bn or recipe.contrastive)
        self.teacher = Inverted(teacher, statistics=statistics, embedding=bool(recipe.activation))
        self.pool = ImagePool(sizes.pool, image_shape, device)
        mean, std = self._scale()
        generator = Generator(
            latent=recipe.latent, width=sizes.width, image_shape=image_shape, mean=mean.cpu(), std=std.cpu()
        )
        self.generator = generator.to(device).train()
        self.generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # One round's copy takes g_steps steps of generator_lr: what it learns from goes as far at once.
        rate = recipe.generator_lr * (recipe.g_steps if recipe.style == "meta" else 1)
        self.optimizer = torch.optim.Adam(self.generator.parameters(), rate, betas=_BETAS)
        self._classes = teacher.record.num_logits
        self._meta = meta
        self._precision = "bf16" if precision == "bf16" else "fp32"
        self._moments: list[Moments] = []
        self._seen: list[Moments] = []
        self._views: tuple[Tensor, Tensor] | None = None
        self._contrast: Contrast | None = None
        if recipe.contrastive:
            channels = sum(norm.num_features for norm in self.teacher.norms)
            contrast = Contrast(channels, recipe.contrastive_temperature, sizes.memory, sizes.negatives)
            self._contrast = contrast.to(device)
            self._contrast_optimizer = torch.optim.Adam(contrast.head.parameters(), recipe.generator_lr)

    # --------------------------------------------------------------------------------------------------- being asked

    def images(self, count: int) -> Tensor:
        """Images to train the student on, float in [0, 1]."""
        if self.recipe.style != "generator":
            return self.pool.draw(count)
        with torch.no_grad(), autocast(self.device, self._precision):
            return self.generator(self.generator.noise(count, self.device)).float()

    def round(self) -> None:
        """One round of synthesis."""
        with _evaluating(self.student):
            if self.recipe.style == "generator":
                for _ in range(self.recipe.g_steps):
                    self._improve_generator()
            elif self.recipe.style == "pixels":
                self._invert_pixels()
            else:
                self._invert_by_generator()
        self.rounds += 1

    # -------------------------------------------------------------------------------------------------------- rounds

    def _improve_generator(self) -> None:
        """The images are what the teacher takes them for: the one-hot target is its own answer."""
        with autocast(self.device, self._precision):
            images = self.generator(self.generator.noise(self.sizes.batch, self.device)).float()
            loss = self.loss(images)
        self._descend(loss, self.optimizer)

    def _invert_pixels(self) -> None:
        mean, std = self._scale()
        low, high = (0 - mean) / std, (1 - mean) / std
        shape = (self.sizes.batch, *self.pool.images.shape[1:])
        pixels = torch.randn(shape, device=self.device).clamp(low, high).requires_grad_()
        optimizer = torch.optim.Adam([pixels], self.recipe.generator_lr, betas=_PIXEL_BETAS)
        targets, best = self._targets(), _Best()
        for _ in range(self.recipe.inversion_steps):
            with autocast(self.device, self._precision):
                images = pixels * std + mean
                loss = self.loss(images, targets, pixels)
            best.offer(loss, images, self._views)
            self._descend(loss, optimizer)
            with torch.no_grad():
                pixels.clamp_(low, high)
        self._keep(best)

    def _invert_by_generator(self) -> None:
        recipe, learns = self.recipe, self.recipe.style == "meta"
        if not learns:
            self.generator.reset()
        generator = copy.deepcopy(self.generator) if learns else self.generator
        latent = self.generator.noise(self.sizes.batch, self.device).requires_grad_()
        groups: list[dict[str, Any]] = [
            {"params": list(generator.parameters())},
            {"params": [latent], "lr": recipe.latent_lr},
        ]
        optimizer = torch.optim.Adam(groups, recipe.generator_lr, betas=_BETAS)
        summed = [torch.zeros_like(p) for p in generator.parameters()]
        targets, best = self._targets(), _Best()
        for _ in range(recipe.g_steps):
            with autocast(self.device, self._precision):
                images = generator(latent).float()
                loss = self.loss(images, targets)
            best.offer(loss, images, self._views)
            gradients = self._descend(loss, optimizer)
            for total, gradient in zip(summed, gradients, strict=False):  # the latent's comes last
                total += gradient
        if learns:
            self._learn_start(generator, summed)
        self._keep(best)

    def _learn_start(self, fast: nn.Module, summed: Sequence[Tensor]) -> None:
        """One step of the generator, from what its copy went through in a round: the sum of the gradients it met
        (first-order MAML), or the way from where it ended (Reptile)."""
        for own, moved_to, gradient in zip(self.generator.parameters(), fast.parameters(), summed, strict=True):
            own.grad = gradient if self._meta == "fomaml" else (own - moved_to).detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _descend(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """A step of what makes the images, and of the head that the contrast learns; the gradients of the former."""
        optimizers = [optimizer] if self._contrast is None else [optimizer, self._contrast_optimizer]
        wanted = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        gradients = torch.autograd.grad(loss, wanted)
        for parameter, gradient in zip(wanted, gradients, strict=True):
            parameter.grad = gradient
        for one in optimizers:
            one.step()
            one.zero_grad(set_to_none=True)
        return list(gradients[: sum(len(group["params"]) for group in optimizer.param_groups)])

    def _keep(self, best: _Best) -> None:
        self.pool.add(best.images)
        if self._contrast is not None and best.views is not None:
            self._contrast.remember(*best.views)
        if self.recipe.bn_momentum:
            rate, now = self.recipe.bn_momentum, [(m.detach(), v.detach()) for m, v in self._seen]
            before = self._moments or now
            self._moments = [
                (rate * m + (1 - rate) * mean, rate * v + (1 - rate) * variance)
                for (m, v), (mean, variance) in zip(before, now, strict=True)
            ]

    def _targets(self) -> Tensor:
        return torch.randint(self._classes, (self.sizes.batch,), device=self.device)

    def _scale(self) -> tuple[Tensor, Tensor]:
        """The teacher's normalisation, in whose units pixels are optimised."""
        model = self.teacher.model
        if model.mean is not None and model.std is not None:
            return model.mean, model.std
        return torch.tensor(0.5, device=self.device), torch.tensor(0.25, device=self.device)

    # ---------------------------------------------------------------------------------------------------------- loss

    def loss(self, images: Tensor, targets: Tensor | None = None, pixels: Tensor | None = None) -> Tensor:
        """What images are optimised by. targets: the classes they are to show, those the teacher sees when left out.
        pixels: the images in units of the teacher's normalisation, for the priors on them."""
        recipe = self.recipe
        shown = moved(images, recipe.shift, recipe.flip)
        seen = self.teacher(shown)
        total = seen.logits.new_zeros(())
        if recipe.bn:
            self._seen = [moments(features) for features in seen.inputs]
            total = total + recipe.bn * bn_distance(self._seen, self.teacher.norms, self._moments, recipe.bn_momentum)
        if recipe.one_hot:
            wanted = seen.logits.argmax(1) if targets is None else targets
            total = total + recipe.one_hot * F.cross_entropy(seen.logits, wanted)
        if recipe.adversarial and self.rounds >= recipe.warmup:
            total = total - recipe.adversarial * self._disagreement(shown, seen.logits)
        if recipe.balance:
            total = total + recipe.balance * imbalance(seen.logits)
        if recipe.activation and seen.embedding is not None:
            total = total - recipe.activation * seen.embedding.abs().mean()
        if recipe.tv:
            total = total + recipe.tv * total_variation(images if pixels is None else pixels)
        if recipe.l2:
            total = total + recipe.l2 * (images if pixels is None else pixels).norm()
        if self._contrast is not None:
            local = self.teacher(zoomed(images, recipe.flip))
            self._views = _channel_means(local.inputs), _channel_means(seen.inputs)
            total = total + recipe.contrastive * self._contrast(*self._views)
        return total

    def _disagreement(self, images: Tensor, teacher_NC: Tensor) -> Tensor:
        """The mean over images; with `masked` those on whose class the student does not agree count as 0: it has yet
        to learn them."""
        student_NC = find_logits(self.student(images)).float()
        each = disagreement(student_NC, teacher_NC, self.recipe.distance, self.recipe.temperature)
        if self.recipe.masked:
            each = each * (student_NC.argmax(1) == teacher_NC.argmax(1))
        return each.mean()

    # --------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "rounds": self.rounds,
            "generator": self.generator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pool": self.pool.state_dict(),
            "moments": list(self._moments),
        }
        if self._contrast is not None:
            state |= {"contrast": self._contrast.state_dict(), "head": self._contrast_optimizer.state_dict()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rounds = state["rounds"]
        self.generator.load_state_dict(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.pool.load_state_dict(state["pool"])
        self._moments = [(mean.to(self.device), variance.to(self.device)) for mean, variance in state["moments"]]
        if self._contrast is not None:
            self._contrast.load_state_dict(state["contrast"])
            self._contrast_optimizer.load_state_dict(state["head"])


class _Best:
    """The images of the lowest loss in a round, and their views."""

    def __init__(self) -> None:
        self.images = torch.empty(0)
        self.views: tuple[Tensor, Tensor] | None = None
        self._lowest: float | None = None

    def offer(self, loss: Tensor, images: Tensor, views: tuple[Tensor, Tensor] | None) -> None:
        """Takes copies: the optimizer writes into what the images are made of."""
        value = loss.item()
        if self._lowest is None or value < self._lowest:
            self._lowest, self.images = value, images.detach().clone()
            self.views = None if views is None else (views[0].detach().clone(), views[1].detach().clone())


def _channel_means(inputs: Sequence[Tensor]) -> Tensor:
    """(N, F): the mean of every channel over its places, of all layers."""
    return torch.cat([features.flatten(2).mean(2) if features.ndim > 2 else features for features in inputs], 1)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each module has the mode it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
