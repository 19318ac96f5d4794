"""Few-sample distillation: layers are aligned with the teacher's by least squares before anything is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kdctl.config.types import NonNegative, PositiveInt, Tap
from kdctl.errors import ConfigError, Problem
from kdctl.methods.distill import Distill
from kdctl.models.record import Model
from kdctl.signals import Batch
from kdctl.taps import Taps

_SAMPLES_AT_ONCE = 64


@dataclass
class _Layer:
    """A place that is aligned: in student and teacher, and the layers of the student that take the solution."""

    student: str
    teacher: str
    conv: str
    norm: str | None = None


class FewSample(Distill):
    """Before training, each named layer of the student is mapped onto the teacher's in closed form, on a few samples.

    Formula: Q, q minimise sum over samples and positions of ||Q f_s + q - f_t||^2 + r m ||Q - 1||^2, with m the mean
        square of a channel's feature; this 1x1 convolution is multiplied into the convolution before it. Layers are
        done in order, each on the features that the ones before have made.
    Paper: Li, Li, Liu & Zhang, Few Sample Knowledge Distillation for Efficient Network Compression, CVPR 2020.
    Published: students that are pruned teachers, 100 to 1000 unlabelled samples of CIFAR-10, no training afterwards.

    Afterwards training goes on with `losses`: where that is not wanted, one epoch with a tiny learning rate. Student
    and teacher need equally many channels and positions at these layers. Labels are not used.

    layers: in order; a convolution of the student, or the BatchNorm2d after one: name that where there is one, so that
        what it gives is aligned and its statistics are made anew. `a=b` where the teacher's place is called b. Behind
        a convolution that is named itself the batch normalisation stays as it is; q is fitted where there is a bias.
    samples: how many of the training samples are looked at.
    ridge: r; keeps the map near the identity where features say little.
    """

    parallel: ClassVar[bool] = False

    def __init__(self, *, layers: list[Tap], samples: PositiveInt = 500, ridge: NonNegative = 0.001) -> None:
        self.layers = layers
        self.samples = samples
        self.ridge = ridge
        self.errors: dict[str, tuple[float, float]] = {}
        """Of each layer aligned: the mean squared distance to the teacher's before and after."""

    def prepare(self, student: Model, teachers: Sequence[Model], fresh: Callable[[int], Model]) -> Model:
        if len(teachers) != 1:
            message = f"few_sample aligns the layers with those of one teacher, and there are {len(teachers)}"
            raise ConfigError(Problem(message, key="teacher", hint="name one: teacher: {kind: ..., weights: ...}"))
        if not self.layers:
            raise ConfigError(Problem("no layer is named", key="method.layers", hint="layers: [layer1.bn, ...]"))
        self._teacher_model = teachers[0]
        self._aligned = [_layer(student, teachers[0], text) for text in self.layers]
        return student

    @torch.no_grad()
    def start(self, loader: Any) -> None:
        batch: Batch = loader.few(self.samples)
        parts = batch.micro_batches(-(-batch.size // _SAMPLES_AT_ONCE))
        training = self.student.training
        self.student.eval()
        for layer in self._aligned:
            before, solution, shift = self._solve(layer, parts)
            self._merge(layer, solution, shift, parts)
            self.errors[layer.student] = (before, self._distance(layer, parts))
        self.student.train(training)

    def _pairs(self, layer: _Layer, parts: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows (M, C) of the student's feature and the teacher's."""
        with Taps(self.student.net, [layer.student]) as mine, Taps(self._teacher_model.net, [layer.teacher]) as theirs:
            for batch in parts:
                with mine.recording() as own, theirs.recording() as other:
                    self.task.forward(self.student, batch)
                    self.task.forward(self._teacher_model, batch)
                yield _rows(own[layer.student]), _rows(other[layer.teacher])

    def _distance(self, layer: _Layer, parts: Sequence[Batch]) -> float:
        total = [(float((own - other).square().sum()), own.numel()) for own, other in self._pairs(layer, parts)]
        return sum(value for value, _ in total) / sum(count for _, count in total)

    def _solve(self, layer: _Layer, parts: Sequence[Batch]) -> tuple[float, Tensor, Tensor | None]:
        """The distance as it is, and Q (C, C) and q (C,) that make it least; q None where nothing can hold it."""
        net = self.student.net
        shifted = layer.norm is not None or net.get_submodule(layer.conv).bias is not None
        products: Tensor | float = 0.0
        targets: Tensor | float = 0.0
        error, count, rows = 0.0, 0, 0
        for own, other in self._pairs(layer, parts):
            error, count, rows = error + float((own - other).square().sum()), count + own.numel(), rows + len(own)
            ones = [own.new_ones(len(own), 1)] if shifted else []
            inputs = torch.cat([own, *ones], 1)
            products = products + inputs.T @ inputs
            targets = targets + inputs.T @ (other - own)
        assert isinstance(products, Tensor) and isinstance(targets, Tensor)
        channels = targets.shape[1]
        keeping = torch.zeros_like(products)
        keeping[:channels, :channels] = torch.eye(channels).to(products) * products.diagonal()[:channels].mean()
        change = torch.linalg.pinv(products + self.ridge * keeping, hermitian=True) @ targets
        solution = torch.eye(channels).to(change) + change[:channels].T
        return error / count, solution, change[channels] if shifted else None

    def _merge(self, layer: _Layer, solution: Tensor, shift: Tensor | None, parts: Sequence[Batch]) -> None:
        """Takes y -> Q y + q into the weights of the student."""
        conv = self.student.net.get_submodule(layer.conv)
        assert isinstance(conv, nn.Conv2d)
        if layer.norm is None:
            conv.weight.copy_(torch.einsum("oc,cihw->oihw", solution, _exact(conv.weight)))
            if conv.bias is not None and shift is not None:
                conv.bias.copy_(solution @ _exact(conv.bias) + shift)
            return
        norm = self.student.net.get_submodule(layer.norm)
        assert isinstance(norm, nn.BatchNorm2d) and shift is not None
        assert norm.running_var is not None and norm.running_mean is not None
        # What it gives is s (conv(x) - mean) + bias: s goes into the convolution, the rest into what is added.
        scale = _exact(norm.weight) / (_exact(norm.running_var) + norm.eps).sqrt()
        added = solution @ (_exact(norm.bias) - scale * _exact(norm.running_mean)) + shift
        merged = solution * scale
        conv.weight.copy_(torch.einsum("oc,cihw->oihw", merged, _exact(conv.weight)))
        if conv.bias is not None:
            conv.bias.copy_(merged @ _exact(conv.bias))
        mean, variance = self._statistics(layer, parts)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt())
        norm.bias.copy_(mean + added)

    def _statistics(self, layer: _Layer, parts: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """Mean and variance of what the convolution gives now (C,)."""
        sums = []
        with Taps(self.student.net, [layer.conv]) as taps:
            for batch in parts:
                with taps.recording() as features:
                    self.task.forward(self.student, batch)
                rows = _rows(features[layer.conv])
                sums.append((len(rows), rows.sum(0), rows.square().sum(0)))
        count = sum(number for number, _, _ in sums)
        mean = torch.stack([total for _, total, _ in sums]).sum(0) / count
        square = torch.stack([total for _, _, total in sums]).sum(0) / count
        return mean, (square - mean.square()).clamp_min(0)


def _rows(feature: Tensor) -> Tensor:
    """A map (N, C, H, W) as rows (N H W, C)."""
    return _exact(feature.movedim(1, -1).flatten(0, -2))


def _exact(value: Tensor) -> Tensor:
    """In float64 and on the CPU, for not every device has it."""
    return value.detach().cpu().double()


def _layer(student: Model, teacher: Model, text: str) -> _Layer:
    """The layer that an entry of `layers` names. Raises ConfigError where it cannot be aligned."""
    own, _, other = text.partition("=")
    other = other or own
    module = _module(student, own, "student")
    _module(teacher, other, "teacher")
    trial, example = copy.deepcopy(student).eval(), torch.rand(2, *student.record.image_shape)
    convs = [name for name, part in trial.net.named_modules() if isinstance(part, nn.Conv2d)]
    norm = own if isinstance(module, nn.BatchNorm2d) else None
    if norm is None and own not in convs:
        message = f"'{own}' is a {type(module).__name__}"
        raise ConfigError(Problem(message, key="method.layers", hint="a Conv2d, or the BatchNorm2d after one"))
    before = own if norm is None else _before(trial, own, convs, example)
    conv = trial.net.get_submodule(before)
    if conv.groups != 1:
        message = f"'{before}' is a grouped convolution, which cannot hold a map between its groups"
        raise ConfigError(Problem(message, key="method.layers", hint="name another layer"))
    mine, theirs = _shape(trial, own, example), _shape(copy.deepcopy(teacher).eval(), other, example)
    if mine != theirs:
        message = f"'{own}' gives {mine}, the teacher's '{other}' {theirs}"
        raise ConfigError(Problem(message, key="method.layers", hint="channels and positions must be equal"))
    return _Layer(own, other, before, norm)


def _module(model: Model, path: str, owner: str) -> nn.Module:
    try:
        return model.net.get_submodule(path)
    except AttributeError:
        message = f"the {owner} has no module '{path}'"
        raise ConfigError(Problem(message, key="method.layers", hint="a=b where the names differ")) from None


@torch.no_grad()
def _shape(model: Model, tap: str, example: Tensor) -> tuple[int, ...]:
    """The shape of what a layer gives for one sample."""
    with Taps(model.net, [tap]) as taps, taps.recording() as features:
        model(example)
    return tuple(features[tap].shape[1:])


@torch.no_grad()
def _before(model: Model, norm: str, convs: Sequence[str], example: Tensor) -> str:
    """The convolution whose output a batch normalisation takes. Raises ConfigError where there is none."""
    part = model.net.get_submodule(norm)
    assert isinstance(part, nn.BatchNorm2d)
    fitting = [name for name in convs if model.net.get_submodule(name).out_channels == part.num_features]
    with Taps(model.net, [f"{norm}:in", *fitting]) as taps, taps.recording() as features:
        model(example)
    found = [name for name in fitting if torch.equal(features[name], features[f"{norm}:in"])]
    if len(found) != 1 or not part.affine or part.running_var is None:
        message = f"'{norm}' does not follow one convolution, or has no weights or statistics of its own"
        raise ConfigError(Problem(message, key="method.layers", hint="name the convolution itself"))
    return found[0]
