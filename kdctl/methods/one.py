"""On-the-fly native ensemble: branches of one net that their gated ensemble teaches."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kdctl.clock import Clock
from kdctl.config.types import NonNegative, PositiveInt, Tap
from kdctl.data.loader import TrainLoader
from kdctl.device import compiled
from kdctl.errors import ConfigError, Problem
from kdctl.losses.adapters import to_vectors
from kdctl.methods.base import Method, Parts, Term, over_streams
from kdctl.methods.cut import parts_of
from kdctl.methods.moving import MovingTeacher, moved_beside
from kdctl.models.record import Model, build_model
from kdctl.signals import Batch, Signals
from kdctl.tasks.base import Task
from kdctl.teachers.base import Teacher


class ONE(Method):
    """Branches over a shared trunk; their ensemble, weighted sample by sample by a gate, teaches each of them.

    Formula: z_e = sum_i g_i z_i with the gate g = softmax(ReLU(BN(Linear(f)))), f the trunk's last feature averaged
        over positions. Each term without a teacher is summed over the branches and the ensemble; each term with one
        over the branches, against z_e as a constant. With ce and kd: sum_i CE(z_i) + CE(z_e) + T^2 sum_i KL(e || i).
    Paper: Lan, Zhu & Gong, Knowledge Distillation by On-the-Fly Native Ensemble, NeurIPS 2018, eq. 3 to 8.
    Published: 3 branches that share all but the last stage; losses ce and kd of weight 1, T 3. The authors' code takes
        the ensemble as a constant in kd, as is done here, and ramps kd up over the first 80 of 300 epochs.

    The first branch is the student, which is validated and shipped; the others are copies of its end with weights of
    their own. Terms look at logits: taps are refused. Metrics name those of the student by their name, and the others
    <term>.branch2, ..., <term>.ensemble.

    branches: how many there are, with the student's own.
    at: the first of the student's top-level modules that is repeated; the net must be sequential.
    rampup_epochs: terms with a teacher are multiplied by exp(-5 (1 - t)^2), with t from 0 to 1 in so many epochs.
    """

    provides_teacher: ClassVar[bool] = True

    def __init__(self, *, branches: PositiveInt = 3, at: Tap = "layer3", rampup_epochs: NonNegative = 0.0) -> None:
        self.branches = branches
        self.at = at
        self.rampup_epochs = rampup_epochs

    def prepare(self, student: Model, teachers: Sequence[Model], fresh: Callable[[int], Model]) -> Model:
        if teachers:
            message = "the ensemble of the branches is the teacher, and a teacher is given too"
            hint = "leave the teacher out, or set method: distill"
            raise ConfigError(Problem(message, key="teacher", hint=hint))
        if self.branches < 2:
            raise ConfigError(Problem("one branch has nobody to learn from", key="method.branches", hint="2 or more"))
        trunk, _ = parts_of(student, self.at, "method.at")
        if not trunk:
            message = f"nothing comes before '{self.at}': the branches would share nothing"
            raise ConfigError(Problem(message, key="method.at", hint="a later part, or method: mutual"))
        self._others = [build_model(student.record, student.base) for _ in range(1, self.branches)]
        return student

    def loader(self, loader: TrainLoader) -> Any:
        if loader.batch_size < 2:
            message = "the gate normalises over the samples of a batch, and there is one"
            raise ConfigError(Problem(message, key="data.batch_size", hint="2 or more"))
        return loader

    def rehearse(self, teacher: Teacher | None, task: Task, taps: Sequence[str]) -> Teacher | None:
        if taps:
            raise _tapped()
        return MovingTeacher(copy.deepcopy(self._others[0]), task)

    def assemble(self, parts: Parts) -> None:
        if any(term.loss.taps for term in parts.terms):
            raise _tapped()
        self.student, self.task, self.clock = parts.student, parts.task, Clock()
        self._net = _Branched(self.student, self._others, self.at, self._width())
        moved_beside(self._net, parts.student, parts.device)
        branched = Model(self._net, self.student.record, self.student.base).to(parts.device)
        self._forward = compiled(branched) if parts.compile else branched
        self._terms = [self._terms_of(parts.terms, number) for number in range(1, self.branches + 1)]
        self._terms.append([t for t in self._terms_of(parts.terms, None) if not t.loss.needs_teacher])
        self.terms = [term for terms in self._terms for term in terms]
        self.trained = nn.ModuleDict(
            {
                "student": self.student.net,
                "branches": self._net.branches,
                "gate": self._net.gate,
                "terms": nn.ModuleList(self.terms),
            }
        )
        self.frozen = [self.student.net.get_submodule(path) for path in parts.frozen]

    @torch.no_grad()
    def _width(self) -> int:
        """Channels of the feature that the branches start from."""
        trunk, _ = parts_of(self.student, self.at, "method.at")
        shared = copy.deepcopy(Model(nn.Sequential(trunk), self.student.record, self.student.base)).cpu().eval()
        inputs = self.student.record.example(2)
        return to_vectors(shared(inputs)).shape[1]

    def _terms_of(self, terms: Sequence[Term], branch: int | None) -> list[Term]:
        """The terms of a branch (from 1), or of the ensemble (None): copies but for those of the student."""
        if branch == 1:
            return list(terms)
        copies = [copy.deepcopy(term) for term in terms]
        net = self.student.net if branch is None else self._net.as_student(branch - 2)
        for term in copies:
            term.name = f"{term.name}.{'ensemble' if branch is None else f'branch{branch}'}"
            term.loss.bind(net)
        return copies

    def weights(self, epoch: float) -> dict[str, float]:
        return {term.name: self._weight(term, epoch) for term in self.terms}

    def _weight(self, term: Term, epoch: float) -> float:
        weight = term.weight.at(epoch)
        if not term.loss.needs_teacher or epoch >= self.rampup_epochs:
            return weight
        return weight * math.exp(-5 * (1 - epoch / self.rampup_epochs) ** 2)

    def step(self, batch: Batch, epoch: float) -> dict[str, Tensor]:
        *seen, ensemble = self._see(batch)
        teacher = ensemble.map(Tensor.detach)
        sums: dict[str, Tensor] = {}
        for signals, terms in zip([*seen, ensemble], self._terms, strict=True):
            for term in terms:
                if self._weight(term, epoch) != 0:
                    term.loss.epoch = epoch
                    taught = teacher if term.loss.needs_teacher else None
                    sums[term.name] = over_streams(term.loss, signals, taught, batch)
        return sums

    def _see(self, batch: Batch) -> list[Signals]:
        """What each branch says of a batch, and last the ensemble."""
        outputs = self.task.forward(self._forward, batch)
        said = [self.task.signals(output, batch) for output in outputs]
        if batch.strong is None:
            return said
        strong = self._see(batch.strongly())
        return [replace(signals, strong=other) for signals, other in zip(said, strong, strict=True)]


def _tapped() -> ConfigError:
    message = "with branches, terms look at logits alone"
    return ConfigError(Problem(message, key="losses", hint="leave out those with taps"))


class _Branched(nn.Module):
    """The student's net with further branches: gives the logits of each branch, and those of the gated ensemble."""

    def __init__(self, student: Model, others: Sequence[Model], at: str, width: int) -> None:
        super().__init__()
        trunk, own = parts_of(student, at, "method.at")
        self.trunk, self.own = nn.Sequential(trunk), nn.Sequential(own)
        self.branches = nn.ModuleList(nn.Sequential(parts_of(other, at, "method.at")[1]) for other in others)
        number = len(others) + 1
        self.gate = nn.Sequential(nn.Linear(width, number), nn.BatchNorm1d(number), nn.ReLU(), nn.Softmax(1))

    def forward(self, images: Tensor) -> list[Tensor]:
        shared = self.trunk(images)
        gates_NB = self.gate(to_vectors(shared))
        # Each branch has its own copy: what starts with an operation in place would change the others' input.
        logits = [branch(shared.clone()) for branch in (self.own, *self.branches)]
        shape = (-1, *[1] * (logits[0].ndim - 1))
        gated = [gate.view(shape) * said for gate, said in zip(gates_NB.unbind(1), logits, strict=True)]
        return [*logits, torch.stack(gated).sum(0)]

    def as_student(self, number: int) -> nn.Sequential:
        """The net that the student would be with branch `number` of the others."""
        parts = [*self.trunk.named_children(), *self.branches[number].named_children()]
        net = nn.Sequential()
        for name, module in parts:
            net.add_module(name, module)
        return net
