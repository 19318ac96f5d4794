"""What a method is: the owner of one training step. `fit` runs any method and knows none of them.

A method is made from its own arguments in the file, asked to `prepare` the student, then given its parts. From then on
`fit` calls begin_epoch, begin_step, step (once a micro-batch), backward and end_step, in this order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kdctl.clock import Clock
from kdctl.data.loader import TrainLoader
from kdctl.losses.base import Loss
from kdctl.models.record import Model
from kdctl.optim.optimizers import build_optimizer
from kdctl.optim.schedules import WeightSchedule
from kdctl.signals import Batch, Signals
from kdctl.tasks.base import Task
from kdctl.teachers.base import Teacher


class Term(nn.Module):
    """A loss with its name and its weight over the epochs."""

    def __init__(self, name: str, loss: Loss, weight: WeightSchedule) -> None:
        super().__init__()
        self.name = name
        self.loss = loss
        self.weight = weight


@dataclass
class Parts:
    """What a stage gives its method.

    student: on the device. teacher: None where there is none. terms: set up. frozen: module paths of the student that
    do not train. compile: whether the student's forward pass is compiled. steps_per_epoch: of the method's own loader.
    precision: the arithmetic of training, for what a method computes outside of `step`. epochs: of the stage.
    """

    student: Model
    teacher: Teacher | None
    terms: Sequence[Term]
    task: Task
    device: torch.device
    frozen: Sequence[str] = ()
    compile: bool = False
    steps_per_epoch: int = 1
    precision: str = "fp32"
    epochs: int = 1


class Method:
    """Owns the modules that train and turns a batch into named sums of loss.

    student: the model that is validated and shipped.
    terms: the terms of its loss. trained: every module whose parameters the optimizer moves, by name; all of it goes
    into checkpoints. clock: where the seconds of its parts are counted. frozen: parts of the student that stay in eval
    mode. elsewhere: names of terms that train something else than the student, so that they have no part in its
    gradient.
    """

    provides_teacher: ClassVar[bool] = False
    """Whether it is itself what teaches, so that its terms need no teacher of the experiment."""
    parallel: ClassVar[bool] = False
    """Whether several processes may train it together."""
    one_gradient: ClassVar[bool] = True
    """Whether the gradient of a step is one, so that its norm can be clipped and its scale undone as a whole."""
    shapes_student: ClassVar[bool] = False
    """Whether it changes what the student computes with, teacher or not, so that its controls are trained by it too."""
    makes_samples: ClassVar[bool] = False
    """Whether it trains on samples that it makes of the teacher, and on none of the data."""
    finetune_optimizer: ClassVar[dict[str, Any]] = {}
    """The optimizer of a `finetune` with this method that names none; empty: the experiment's, slowed down."""
    smoke: ClassVar[dict[str, Any]] = {}
    """The arguments that a smoke test sets, where two steps of the method would else take long."""

    student: Model
    terms: list[Term]
    trained: nn.ModuleDict
    clock: Clock
    frozen: Sequence[nn.Module] = ()
    elsewhere: Collection[str] = ()

    # ------------------------------------------------------------------------------------------------ being built

    def prepare(self, student: Model, teachers: Sequence[Model], fresh: Callable[[int], Model]) -> Model:
        """The model that trains, on the CPU: the student, or one made of it. fresh(i): the i-th other student of the
        same kind, with other initial weights. Raises ConfigError for models that the method cannot take."""
        return student

    def rehearse(self, teacher: Teacher | None, task: Task, taps: Sequence[str]) -> Teacher | None:
        """What teaches in the dry run of the terms."""
        return teacher

    def loader(self, loader: TrainLoader) -> Any:
        """The batches to train on: those of the data, or others that the method makes (`len`, `epoch`, `few`)."""
        return loader

    def assemble(self, parts: Parts) -> None:
        """Takes its parts; sets student, terms, trained and clock."""
        raise NotImplementedError

    def make_optimizer(self, kind: str, arguments: Mapping[str, Any]) -> torch.optim.Optimizer:
        """The optimizer of all that trains."""
        return build_optimizer(kind, arguments, self.trained)

    # ------------------------------------------------------------------------------------------------- being run

    def start(self, loader: Any) -> None:
        """Called once before the first step of a stage, not when it is resumed."""

    def begin_epoch(self, epoch: int) -> None:
        """Called before the first step of each epoch."""

    def begin_step(self, batch: Batch, epoch: float) -> Batch:
        """Called with the whole batch before it is split; returns the batch to train on."""
        return batch

    def end_step(self) -> None:
        """Called after the optimizer's update."""

    def counts(self, batch: Batch) -> dict[str, int | Tensor]:
        """What the sum of each term runs over in the whole batch, that of all processes."""
        return {term.name: count_units(term.loss, batch) for term in self.terms}

    def step(self, batch: Batch, epoch: float) -> dict[str, Tensor]:
        """The sum of each term over one micro-batch, differentiable; `epoch` is the fractional number of epochs.

        With several processes: over this process's part, so that the sum of all is that of the whole batch.
        """
        raise NotImplementedError

    def weights(self, epoch: float) -> dict[str, float]:
        """The weight of each term at this moment."""
        return {term.name: term.weight.at(epoch) for term in self.terms}

    def backward(self, losses: Mapping[str, Tensor], run: Callable[[Tensor, bool], None]) -> None:
        """Runs the backward pass of the weighted terms of a micro-batch. run(loss, keep_graph) does one."""
        run(torch.stack(list(losses.values())).sum(), False)

    def train(self) -> None:
        """Puts what trains into train mode; frozen parts keep their mode."""
        self.trained.train()
        for module in self.frozen:
            module.eval()

    def parameters(self) -> Iterable[nn.Parameter]:
        return (p for p in self.trained.parameters() if p.requires_grad)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps beside `trained`: plain values and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a saved state."""

    def averaged(self) -> None:
        """Called when the student has its averaged weights, before these are measured or kept."""

    def rounds(self) -> tuple[int, int] | None:
        """Where `data` of the clock is spent in rounds: before every how many steps there is one, and how many more
        there are before the first step. None: each step is like the others."""
        return None

    def ready(self) -> bool:
        """Whether the student could be shipped as it is: until then no epoch is the best one."""
        return True

    def finalize(self) -> Model:
        """The model to ship, without adapters."""
        return self.student


def over_streams(loss: Loss, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
    """A term's sum over a batch, and over its strongly augmented version where there is one."""
    value = loss(student, teacher, batch)
    if batch.strong is None or student.strong is None or loss.sees_streams:
        return value
    return value + loss(student.strong, None if teacher is None else teacher.strong, batch.strongly())


def count_units(loss: Loss, batch: Batch) -> int | Tensor:
    """What the sum of `over_streams` runs over."""
    return loss.count(batch) * (1 if batch.strong is None or loss.sees_streams else 2)
