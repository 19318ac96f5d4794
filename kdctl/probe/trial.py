"""Training steps on synthetic samples, to be timed: student forward, backward and update, and the teacher's forward."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdctl import build
from kdctl.config.schema import Experiment, ModelSpec, TrainStage
from kdctl.data.prepare import Data
from kdctl.device import apply_settings, autocast, compiled
from kdctl.models.record import Model
from kdctl.optim.optimizers import build_optimizer
from kdctl.probe.race import Choice
from kdctl.signals import Batch
from kdctl.teachers.live import LiveTeacher

_LONGEST_STEP_S = 0.5
_FIRST_PART = 16
_GROWTH = 4
_SHORTEST_MEASUREMENT_S = 0.02
_MOST_STEPS = 10


@dataclass
class _Models:
    """Student and teachers in one layout."""

    student: Model
    teachers: list[LiveTeacher]
    optimizer: torch.optim.Optimizer


class Trial:
    """Times steps of a stage's models at `rows` samples of a shape (C, H, W).

    Called with a choice, it gives the seconds a sample takes. A step that takes long, or more memory than there is, is
    made of fewer samples. The loss is the mean square of the logits: what terms cost beside the models is not counted.
    """

    def __init__(
        self,
        experiment: Experiment,
        stage: TrainStage,
        data: Data,
        student: ModelSpec,
        teachers: Sequence[ModelSpec],
        device: torch.device,
        rows: int,
        shape: Sequence[int],
    ) -> None:
        self._settings, self._stage, self._device = experiment.train, stage, device
        self._task = build.build_task(experiment)
        self._student = build.build_model(student, data, "student")
        for path in stage.frozen:
            self._student.net.get_submodule(path).requires_grad_(False)
        self._teachers = [build.build_model(spec, data, "teacher") for spec in teachers]
        self._shape = list(shape)
        self._models: dict[str, _Models] = {}
        self._compiled: dict[str, nn.Module] = {}
        self._seconds: dict[Choice, float] = {}
        self._sized = False
        self._resize(rows)

    def _resize(self, rows: int) -> None:
        inputs = self._student.record.example(rows, self._shape).to(self._device)
        index = torch.arange(rows, device=self._device)
        self._batch = Batch(inputs, torch.zeros_like(index), index, torch.zeros_like(index))

    def __call__(self, choice: Choice) -> float:
        if not self._sized:
            self._find_size(choice)
        guess = self._seconds.get(choice, _SHORTEST_MEASUREMENT_S)
        steps = min(max(1, round(_SHORTEST_MEASUREMENT_S / guess)), _MOST_STEPS)
        self._seconds[choice] = self._timed(choice, steps)
        return self._seconds[choice] / self._batch.size

    def _find_size(self, choice: Choice) -> None:
        """Finds how many samples a step can be timed at, from few to all of them: a step must fit and not take long."""
        rows = self._batch.size
        size = min(rows, max(2, rows // _FIRST_PART))
        while True:
            self._resize(size)
            try:
                seconds = self._timed(choice, 1)
            except torch.OutOfMemoryError:
                self._resize(max(1, size // _GROWTH))
                break
            if size == rows or _GROWTH * seconds > _LONGEST_STEP_S:
                break
            size = min(rows, _GROWTH * size)
        self._sized = True

    def _timed(self, choice: Choice, steps: int) -> float:
        """Seconds a step."""
        apply_settings(self._settings.model_copy(update={"device": str(self._device), "threads": choice.threads}))
        models = self._in_layout(choice.layout)
        forward = self._forward(choice, models)
        self._wait()
        began = time.perf_counter()
        for _ in range(steps):
            self._step(forward, models, choice.precision)
        self._wait()
        return (time.perf_counter() - began) / steps

    def _step(self, forward: nn.Module, models: _Models, precision: str) -> None:
        with autocast(self._device, precision):
            for teacher in models.teachers:
                teacher(self._batch)
            outputs = self._task.forward(forward, self._batch)
        loss: Tensor = self._task.signals(outputs, self._batch).rows().square().mean()
        loss.backward()
        models.optimizer.step()
        models.optimizer.zero_grad(set_to_none=True)

    def _in_layout(self, name: str) -> _Models:
        """The models in a layout; each layout has its own, so that no optimizer's state is of another one."""
        if name not in self._models:
            layout = torch.channels_last if name == "channels_last" else torch.contiguous_format
            student, *teachers = (
                copy.deepcopy(model).to(device=self._device).to(memory_format=layout)  # type: ignore[call-overload]
                for model in (self._student, *self._teachers)
            )
            trained = nn.ModuleDict({"student": student.net.train()})
            optimizer = build_optimizer(self._stage.optimizer.kind, self._stage.optimizer.arguments, trained)
            self._models[name] = _Models(student.train(), [LiveTeacher(t, self._task) for t in teachers], optimizer)
        return self._models[name]

    def _forward(self, choice: Choice, models: _Models) -> nn.Module:
        if not choice.compile:
            return models.student
        if choice.layout not in self._compiled:
            self._compiled[choice.layout] = compiled(models.student)
        return self._compiled[choice.layout]

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
