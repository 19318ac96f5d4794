"""Quantisation-aware training: the student learns to compute with integers, and its teacher stays."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from kdctl import sharding
from kdctl.config.types import NonNegative, NonNegativeInt, PositiveInt
from kdctl.errors import ConfigError, Problem
from kdctl.methods.base import Parts
from kdctl.methods.distill import Distill
from kdctl.models import structure
from kdctl.models.fold import folded
from kdctl.models.record import Model
from kdctl.models.structure import Edit
from kdctl.quant import fake
from kdctl.signals import Batch
from kdctl.taps import Taps

_SAMPLES_AT_ONCE = 64


class QAT(Distill):
    """Convolutions and linear layers compute with rounded weights and inputs, and the loss trains what they round.

    Formula: w' = s clamp(round(w / s), -t, t), t = 2^(weight_bits-1) - 1; gradients pass straight through the rounding
        to the weights in full precision, and by the rule of the quantizer to the steps s. Batch normalisation is folded
        into the layer before it first, so what is trained is what is deployed; a layer whose normalisation cannot be
        folded is refused.
    Paper: lsq: Esser, McKinstry, Bablani, Appuswamy & Modha, Learned Step Size Quantization, ICLR 2020, with the offset
        of Bhalgat et al., LSQ+, CVPR workshops 2020. plain: Jacob et al., Quantization and Training of Neural Networks
        for Efficient Integer-Arithmetic-Only Inference, CVPR 2018. With a teacher's term among `losses` it is quantized
        distillation of Polino, Pascanu & Alistarh, Model compression via distillation and quantization, ICLR 2018: the
        weights are projected to the grid, the gradient is taken there and applied to those in full precision.
    Published: lsq starts from trained weights, with a tenth to a hundredth of their learning rate, on a cosine. Without
        normalisation the learning rate has to be smaller still: the pretrained ResNet-20 of CIFAR-10 recovers with adam
        at 0.0002 (step_lr 0.1), and is lost with sgd at 0.001.

    It ships a model that still rounds; an int8 export takes its steps and ranges as they were learned. Taps keep their
    paths: a layer's is what it computes, that of a folded normalisation the same.

    weight_bits, activation_bits: of each layer; activation_bits null keeps the inputs in float, as it has to be in
        models of texts.
    first_last_bits: of the first and the last layer, which suffer most, where the bits of the others are fewer; null:
        the same as the others.
    per_channel: a step for each output channel of a weight, or one for all.
    quantizer: `lsq` learns steps and offsets; `plain` has the steps follow the largest weight, and the extremes of the
        inputs.
    symmetric: inputs have as many levels below zero as above; else the range begins where they do.
    skip: paths of layers that stay in float; `*` stands for any characters.
    calibration: how ranges are chosen before the first step, from `samples` training samples (percentile 99.99 %).
    observe_epochs: of `plain`: how long ranges of inputs follow what they meet; null: to the end.
    step_lr: learning rate of steps and offsets, as a multiple of that of the weights; 0.1 is for adam, which moves
        small numbers as far as large ones. They have no weight decay.
    """

    parallel: ClassVar[bool] = True
    shapes_student: ClassVar[bool] = True
    smoke: ClassVar[dict[str, Any]] = {"samples": 8}
    finetune_optimizer: ClassVar[dict[str, Any]] = {"kind": "adam", "lr": 0.0002}

    def __init__(
        self,
        *,
        weight_bits: Literal[2, 3, 4, 5, 6, 7, 8] = 8,
        activation_bits: Literal[2, 3, 4, 5, 6, 7, 8] | None = 8,
        first_last_bits: Literal[2, 3, 4, 5, 6, 7, 8] | None = 8,
        per_channel: bool = True,
        quantizer: Literal["lsq", "plain"] = "lsq",
        symmetric: bool = False,
        skip: list[str] = [],  # noqa: B006 - read as text, and never changed
        calibration: Literal["minmax", "percentile", "entropy", "mse"] = "mse",
        samples: PositiveInt = 256,
        observe_epochs: NonNegativeInt | None = None,
        step_lr: NonNegative = 0.1,
    ) -> None:
        self.bits = (weight_bits, activation_bits)
        self.first_last_bits = first_last_bits
        self.wrapping = {"per_channel": per_channel, "quantizer": quantizer, "symmetric": symmetric}
        self.skip = skip
        self.calibration = calibration
        self.samples = samples
        self.observe_epochs = observe_epochs
        self.step_lr = step_lr

    # ------------------------------------------------------------------------------------------------ being built

    def prepare(self, student: Model, teachers: Sequence[Model], fresh: Callable[[int], Model]) -> Model:
        if fake.is_quantized(student.net):
            hint = "method: distill trains it further as it is"
            raise ConfigError(Problem("the student is quantised already", key="method", hint=hint))
        if student.record.tokens is not None and self.bits[1] is not None:
            message = f"activation_bits: {self.bits[1]}, and no file of texts holds ranges of activations"
            hint = "activation_bits: null learns the weights' steps alone; `quantize` without qat is dynamic for texts"
            raise ConfigError(Problem(message, key="method.activation_bits", hint=hint))
        net, edits = _folded(student)
        paths = self._chosen(Model(net, student.record, student.base))
        edits += [{"edit": "fake_quant", "path": path, **self._arguments(path, paths)} for path in paths]
        structure.apply(net, [edit for edit in edits if edit["edit"] == "fake_quant"])
        record = replace(student.record, structure=[*(student.record.structure or []), *edits])
        return Model(net, record, student.base).train(student.training)

    def _arguments(self, path: str, paths: Sequence[str]) -> dict[str, Any]:
        """What `wrap` is called with for one of the layers, which are in the order of their calls."""
        weight_bits, activation_bits = self.bits
        if self.first_last_bits is not None and path in (paths[0], paths[-1]):
            weight_bits = max(weight_bits, self.first_last_bits)
            activation_bits = activation_bits and max(activation_bits, self.first_last_bits)
        return {"weight_bits": weight_bits, "activation_bits": activation_bits, **self.wrapping}

    def _chosen(self, model: Model) -> list[str]:
        """The paths of the layers to quantise, in the order in which they are called first.

        Raises ConfigError where there are none, or a pattern of `skip` names none.
        """
        layers = _candidates(model.net)
        for pattern in self.skip:
            if not any(fnmatch(path, pattern) for path in layers):
                hint = f"they are {', '.join(layers[:8])}" + (", ..." if len(layers) > 8 else "")
                raise ConfigError(Problem(f"no layer matches '{pattern}'", key="method.skip", hint=hint))
        chosen = _called(model, [path for path in layers if not any(fnmatch(path, p) for p in self.skip)])
        if not chosen:
            message = "no layer is left to quantise: there is no convolution or linear layer but those in `skip`"
            raise ConfigError(Problem(message, key="method.skip", hint="skip fewer layers"))
        return chosen

    def assemble(self, parts: Parts) -> None:
        if sharding.is_sharded(parts.student.net):
            message = "the student's weights are sharded, and a step is taken from all of a layer's"
            raise ConfigError(Problem(message, key="train.sharding", hint="sharding: none"))
        super().assemble(parts)

    def make_optimizer(self, kind: str, arguments: Mapping[str, Any]) -> torch.optim.Optimizer:
        """The optimizer of all that trains, with a group of its own for learned steps and offsets."""
        optimizer = super().make_optimizer(kind, arguments)
        steps = [p for p in fake.steps(self.student.net) if p.requires_grad]
        if not steps:
            return optimizer
        apart = {id(p) for p in steps}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in apart]
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        rate = optimizer.defaults["lr"] * self.step_lr
        own = {"params": steps, "lr": rate, "initial_lr": rate}
        optimizer.add_param_group(own | ({"weight_decay": 0.0} if "weight_decay" in optimizer.defaults else {}))
        return optimizer

    # ------------------------------------------------------------------------------------------------- being run

    def start(self, loader: Any) -> None:
        """Sets every step and range from training samples, with the student in eval mode and in float."""
        batch: Batch = loader.few(self.samples)
        parts = batch.micro_batches(-(-batch.size // _SAMPLES_AT_ONCE))
        modes = {module: module.training for module in self.student.modules()}

        @torch.no_grad()
        def run() -> None:
            for part in parts:
                self.task.forward(self.student, part)

        self.student.eval()
        fake.calibrate(self.student.net, run, self.calibration)
        for module, training in modes.items():
            module.training = training

    def step(self, batch: Batch, epoch: float) -> dict[str, Tensor]:
        fake.observe(self.student.net, self.observe_epochs is None or epoch < self.observe_epochs)
        return super().step(batch, epoch)


def _folded(student: Model) -> tuple[nn.Module, list[Edit]]:
    """The student's net with batch normalisation folded into the layers before, what trained still training, and the
    edits that say so."""
    before = student.net.eval()
    after = folded(before)
    if after is before:
        return before.train(student.training), []
    trains = {name: p.requires_grad for name, p in before.named_parameters()}
    edits: list[Edit] = []
    for path, module in before.named_modules():
        now = after.get_submodule(path)
        if isinstance(now, nn.Identity) and not isinstance(module, nn.Identity):
            edits.append({"edit": "skip", "path": path})
        elif getattr(module, "bias", 0) is None and getattr(now, "bias", None) is not None:
            edits.append({"edit": "bias", "path": path})
    for name, parameter in after.named_parameters():
        weight = name.removesuffix("bias") + "weight"  # a bias that the layer did not have trains where the weight does
        parameter.requires_grad_(trains.get(name, trains.get(weight, True)))
    return after, edits


def _candidates(net: nn.Module) -> list[str]:
    """The paths of the layers that can be quantised. Raises ConfigError for one that has two of them."""
    layers = {path: part for path, part in net.named_modules(remove_duplicate=False) if fake.can_wrap(part)}
    known: dict[int, str] = {}
    for path, part in layers.items():
        if id(part) in known:
            message = f"'{path}' is the same layer as '{known[id(part)]}'"
            raise ConfigError(Problem(message, key="method", hint="qat needs layers with one path each"))
        known[id(part)] = path
    return list(layers)


def _called(model: Model, layers: Sequence[str]) -> list[str]:
    """The layers in the order in which a forward pass calls them first.

    Raises ConfigError where one is not called, for then its rounding would do nothing, and where a batch normalisation
    is left of which an exporter would multiply the layer's weights: they would leave the grid that was learned.
    """
    trial = copy.deepcopy(model).eval()
    _check_bypassed(trial.net)
    try:
        with Taps(trial.net, layers) as taps, taps.recording() as features:
            left = _normalised(trial.net, layers, lambda: trial(model.record.example(2)))
    except ConfigError as error:
        message = f"a layer cannot be quantised: {error.problems[0].message}"
        raise ConfigError(Problem(message, key="method.skip", hint="add its path to skip")) from None
    if left:
        message = f"the batch normalisation after {', '.join(left[:8])} cannot be folded, and an exporter would fold it"
        hint = "a net that torch.fx can follow, whose norms are called once each; or add these layers to skip"
        raise ConfigError(Problem(message, key="method.skip", hint=hint))
    return list(features)


def _normalised(net: nn.Module, layers: Sequence[str], run: Callable[[], Any]) -> list[str]:
    """The layers whose output goes into a batch normalisation and nowhere else, as the graph of gradients has it.

    run: calls the net. Only such a normalisation is folded by exporters: not one after an activation, nor one that
    shares its input with a sum.
    """
    given: list[tuple[str, Any]] = []
    handles = []
    for path in layers:
        layer = net.get_submodule(path)
        layer.requires_grad_(True)
        handles.append(layer.register_forward_hook(lambda _, __, y, path=path: given.append((path, y.grad_fn))))
    with torch.enable_grad():
        outputs = run()
    for handle in handles:
        handle.remove()
    readers: dict[Any, list[str]] = {}
    waiting = [tensor.grad_fn for tensor in _tensors(outputs) if tensor.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        for source, _ in node.next_functions:
            readers.setdefault(source, []).append(node.name())
            if source is not None and source not in seen:
                seen.add(source)
                waiting.append(source)
    found = [path for path, node in given if len(names := readers.get(node, [])) == 1 and "BatchNorm" in names[0]]
    return list(dict.fromkeys(found))


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors of an output, however deep."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping | list | tuple):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from _tensors(value)


def _check_bypassed(net: nn.Module) -> None:
    """Refuses torch's encoder layers, which use the weights of their linear layers without calling them when they
    predict: the rounding would be left out."""
    for path, module in net.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            message = f"'{path}' is a TransformerEncoderLayer of torch, whose layers are not called when it predicts"
            raise ConfigError(Problem(message, key="method", hint="a student with layers of its own"))
