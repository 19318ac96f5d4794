"""Images synthesised from what a teacher knows: recipes of the literature, their losses, and the pool of images.

N images, C classes, F features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdctl.losses.kd import kl_divergence
from kdctl.models.record import Model
from kdctl.signals import find_logits
from kdctl.taps import Taps

Style = Literal["generator", "pixels", "reset", "meta"]
Distance = Literal["kl", "jsd", "l1"]


@dataclass(frozen=True)
class Recipe:
    """How images are made. The names are those of the arguments of DataFree, where they are explained.

    style: `generator` trains one generator and draws new images from it at every step; the others put images into a
    pool, optimised as pixels, by a generator with fresh weights, or by a copy of one that is learnt to be a good start.
    """

    style: Style = "generator"
    adversarial: float = 0.0
    bn: float = 0.0
    one_hot: float = 0.0
    activation: float = 0.0
    balance: float = 0.0
    distance: Distance = "kl"
    temperature: float = 1.0
    masked: bool = False
    tv: float = 0.0
    l2: float = 0.0
    contrastive: float = 0.0
    contrastive_temperature: float = 0.2
    g_steps: int = 1
    inversion_steps: int = 1000
    kd_steps: int = 5
    warmup: int = 0
    latent: int = 256
    generator_lr: float = 1e-3
    latent_lr: float = 1e-3
    bn_momentum: float = 0.0
    shift: int = 0
    flip: bool = False


PRESETS: dict[str, Recipe] = {
    "dafl": Recipe(one_hot=1, activation=1e-3, balance=20, latent=512),
    "dfad": Recipe(adversarial=1, distance="l1"),
    "zskt": Recipe(adversarial=1),
    "dfq": Recipe(adversarial=1, bn=1, one_hot=1, balance=20, kd_steps=10),
    "deep_inversion": Recipe(
        "pixels", adversarial=1, bn=10, one_hot=1, distance="jsd", temperature=3, tv=1e-3, generator_lr=0.1,
        kd_steps=400, shift=4, flip=True,
    ),
    "cmi": Recipe(
        "reset", adversarial=0.5, bn=1, one_hot=1, masked=True, contrastive=0.8, g_steps=200, kd_steps=400, shift=4,
        flip=True,
    ),
    "fast": Recipe(
        "meta", adversarial=1.1, bn=10, one_hot=0.4, masked=True, g_steps=5, kd_steps=400, warmup=20,
        generator_lr=3e-3, latent_lr=0.01, bn_momentum=0.9, shift=4, flip=True,
    ),
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------- the teacher


@dataclass
class Seen:
    """What a teacher says of images, with gradients: logits (N, C), the input of each batch normalisation, and that of
    the classifier (N, F), empty where they were not asked for."""

    logits: Tensor
    inputs: list[Tensor]
    embedding: Tensor | None


class Inverted:
    """A teacher as synthesis sees it: in eval mode, with constant weights, differentiable by its images.

    norms: its batch normalisations, whose statistics say how features of real images are distributed.
    """

    def __init__(self, model: Model, *, statistics: bool, embedding: bool) -> None:
        self.model = model
        named = [(n, m) for n, m in model.net.named_modules() if is_batch_norm(m)] if statistics else []
        self.norms = [module for _, module in named]
        self._places = [f"{name}:in" for name, _ in named]
        self._classifier = f"{classifier(model.net)}:in" if embedding else None
        self._taps = Taps(model.net, [*self._places, *([self._classifier] if self._classifier else [])])

    def __call__(self, images: Tensor) -> Seen:
        with self._taps.recording() as features:
            logits = find_logits(self.model(images)).float()
        embedding = None if self._classifier is None else features[self._classifier].float()
        return Seen(logits, [features[place].float() for place in self._places], embedding)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether the module has running statistics of a batch."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None


def classifier(net: nn.Module) -> str | None:
    """The path of the last linear layer of a net, None where it has none."""
    return next((name for name, m in reversed(list(net.named_modules())) if isinstance(m, nn.Linear)), None)


# ------------------------------------------------------------------------------------------------------------- losses

Moments = tuple[Tensor, Tensor]
"""Mean and variance of each channel (F,)."""


def moments(features: Tensor) -> Moments:
    """Mean and variance of each channel over samples and places: of (N, F) or (N, F, ...)."""
    dims = [d for d in range(features.ndim) if d != 1]
    variance, mean = torch.var_mean(features, dims, correction=0)
    return mean, variance


def bn_distance(
    found: Sequence[Moments], norms: Sequence[nn.Module], before: Sequence[Moments] = (), momentum: float = 0.0
) -> Tensor:
    """Sum over layers of ||running var - var||_2 + ||running mean - mean||_2.

    before: moments of earlier images, which count for `momentum` of what is compared.
    """
    total = []
    for number, ((mean, variance), norm) in enumerate(zip(found, norms, strict=True)):
        if before:
            mean = (1 - momentum) * mean + momentum * before[number][0]
            variance = (1 - momentum) * variance + momentum * before[number][1]
        total.append((norm.running_var - variance).norm() + (norm.running_mean - mean).norm())  # type: ignore[operator]
    return torch.stack(total).sum()


def disagreement(student_NC: Tensor, teacher_NC: Tensor, distance: Distance, temperature: float = 1.0) -> Tensor:
    """How far student and teacher are apart on each image (N,).

    kl: T^2 KL(teacher || student); jsd: the Jensen-Shannon divergence, both of softmax(z / T); l1: the mean absolute
    difference of the logits.
    """
    if distance == "l1":
        return (student_NC - teacher_NC).abs().mean(1)
    if distance == "kl":
        return temperature**2 * kl_divergence(student_NC, teacher_NC, temperature)
    log_s = F.log_softmax(student_NC / temperature, 1)
    log_t = F.log_softmax(teacher_NC / temperature, 1)
    log_m = torch.logaddexp(log_s, log_t) - math.log(2)
    return ((log_s.exp() * (log_s - log_m)).sum(1) + (log_t.exp() * (log_t - log_m)).sum(1)) / 2


def imbalance(logits_NC: Tensor) -> Tensor:
    """Sum of p log p of the mean probabilities: lowest, -log C, where all classes are as frequent."""
    mean = F.softmax(logits_NC, 1).mean(0)
    return torch.special.xlogy(mean, mean).sum()


def total_variation(images: Tensor) -> Tensor:
    """Sum of the L2 norms of the differences of neighbours in four directions, over the whole batch."""
    across = images[..., 1:] - images[..., :-1]
    down = images[..., 1:, :] - images[..., :-1, :]
    falling = images[..., 1:, 1:] - images[..., :-1, :-1]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    return across.norm() + down.norm() + falling.norm() + rising.norm()


class Contrast(nn.Module):
    """The contrastive term of CMI: an image is told from all others, those of earlier rounds too, by two views of it.

    Of each view the teacher's channel means (N, F) go through a learnt head; the similarity (cosine / T) of a local
    view with the global view of the same image is to stand out from that with all other global views. memory: of how
    many earlier images the features are kept; negatives: how many of these are drawn each time.
    """

    def __init__(self, features: int, temperature: float, memory: int, negatives: int) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(features, features), nn.ReLU(inplace=True), nn.Linear(features, 128))
        self.temperature, self.negatives = temperature, negatives
        self.memory: Tensor
        self.stored: Tensor
        self.register_buffer("memory", torch.zeros(memory, 2, features))
        self.register_buffer("stored", torch.zeros((), dtype=torch.int64))

    def forward(self, local_NF: Tensor, global_NF: Tensor) -> Tensor:
        """The loss of the images at hand, plus that of the drawn earlier ones: each a mean."""
        known = min(int(self.stored), len(self.memory))
        drawn = torch.randperm(known, device=self.memory.device)[: self.negatives]
        earlier = self.memory[drawn]
        queries = F.normalize(self.head(torch.cat([local_NF, earlier[:, 0]])), dim=1)
        keys = F.normalize(self.head(torch.cat([global_NF, earlier[:, 1]])), dim=1).detach()
        labels = torch.arange(len(queries), device=queries.device)
        each = F.cross_entropy(queries @ keys.T / self.temperature, labels, reduction="none")
        new, old = each[: len(local_NF)], each[len(local_NF) :]
        return new.mean() + (old.mean() if len(old) else 0.0)

    @torch.no_grad()
    def remember(self, local_NF: Tensor, global_NF: Tensor) -> None:
        """Keeps features of images; the oldest make room."""
        places = (torch.arange(len(local_NF), device=self.memory.device) + self.stored) % len(self.memory)
        self.memory[places] = torch.stack([local_NF, global_NF], 1)
        self.stored += len(local_NF)


# -------------------------------------------------------------------------------------------------------------- images


class ImagePool:
    """The latest `size` images that were made, kept as uint8 (P, C, H, W): never aliases of what is still optimised."""

    def __init__(self, size: int, image_shape: Sequence[int], device: torch.device) -> None:
        self.size = size
        self.images = torch.zeros(0, *image_shape, dtype=torch.uint8, device=device)

    def add(self, images: Tensor) -> None:
        """Puts images in [0, 1] in; the oldest make room."""
        self.images = torch.cat([self.images, as_bytes(images)])[-self.size :]

    def draw(self, count: int) -> Tensor:
        """Random ones of them, float in [0, 1]."""
        rows = torch.randint(len(self.images), (count,), device=self.images.device)
        return self.images[rows].float().div_(255)

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.images = state["images"].to(self.images.device)


def as_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8 0..255."""
    return images.detach().float().mul(255).round_().clamp_(0, 255).to(torch.uint8)


def moved(images: Tensor, shift: int, flip: bool) -> Tensor:
    """Each image by its own offset of at most `shift` pixels, black moving in, and mirrored or not; differentiable."""
    count, _, height, width = images.shape
    if shift:
        rows, columns = (torch.randint(2 * shift + 1, (count, 1), device=images.device) for _ in range(2))
        rows = rows + torch.arange(height, device=images.device)
        columns = columns + torch.arange(width, device=images.device)
        sample = torch.arange(count, device=images.device)[:, None, None]
        padded = F.pad(images, [shift] * 4)
        images = padded[sample, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
    if flip:
        mirrored = torch.rand(count, 1, 1, 1, device=images.device) < 0.5
        images = torch.where(mirrored, images.flip(3), images)
    return images


def zoomed(images: Tensor, flip: bool) -> Tensor:
    """A random crop of a quarter to all of each image's area, at full size again; differentiable."""
    count = len(images)
    scale = torch.empty(count, device=images.device).uniform_(0.25, 1.0).sqrt()
    offset = torch.empty(count, 2, device=images.device).uniform_(-1, 1) * (1 - scale)[:, None]
    theta = torch.zeros(count, 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = offset
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return moved(F.grid_sample(images, grid, padding_mode="border", align_corners=False), 0, flip)
