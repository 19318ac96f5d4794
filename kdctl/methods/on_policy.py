"""Language models that learn on texts which one of the two models goes on with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from kdctl.config.types import Fraction, NonNegative, PositiveInt
from kdctl.data import counter
from kdctl.device import autocast
from kdctl.errors import ConfigError, Problem
from kdctl.methods.base import Parts
from kdctl.methods.distill import Distill
from kdctl.models.generate import continued
from kdctl.models.record import Model
from kdctl.signals import IGNORE, Batch
from kdctl.teachers.cached import CachedTeacher


class OnPolicy(Distill):
    """Trains on continuations of the data's texts that the student writes itself, or the teacher (sequence-level).

    Formula: in a share of the steps each text keeps its first tokens, and a model draws the others up to the same
        length; the terms are of the drawn tokens alone. What the student wrote is no truth, so that terms on labels
        have nothing to sum up in these steps; what the teacher wrote is.
    Paper: Agarwal et al., On-Policy Distillation of Language Models (GKD), ICLR 2024, algorithm 1; sampler teacher:
        Kim & Rush, Sequence-Level Knowledge Distillation, EMNLP 2016, section 3.2 (the best of a beam there).
    Published: losses jsd with beta 0.1 to 0.9 or reverse_kl, share 0.5 or 1, the student's temperature 1 (GKD).

    Draws are a function of the text and the step, of the teacher's of the text alone: these are written once.

    sampler: who writes. share: of the steps. prompt: tokens that are kept of each text. temperature: of the draws; 0
    takes the most probable token.
    """

    parallel: ClassVar[bool] = False

    def __init__(
        self,
        *,
        sampler: Literal["student", "teacher"] = "student",
        share: Fraction = 0.5,
        prompt: PositiveInt = 16,
        temperature: NonNegative = 1.0,
    ) -> None:
        self.sampler, self.share, self.prompt, self.temperature = sampler, share, prompt, temperature
        self._written: dict[int, Tensor] = {}

    def prepare(self, student: Model, teachers: Sequence[Model], fresh: Callable[[int], Model]) -> Model:
        for key, model in (("student", student), *(("teacher", teacher) for teacher in teachers)):
            if model.record.head != "vocabulary" or model.record.tokens is None:
                message = "texts are gone on with by models that tell the next token, and this one does not"
                raise ConfigError(Problem(message, key=key, hint="task: {kind: causal_lm}, or method: distill"))
        if self.sampler == "teacher" and len(teachers) != 1:
            message = f"one teacher writes the texts, and there are {len(teachers)}"
            raise ConfigError(Problem(message, key="method.sampler", hint="sampler: student"))
        return student

    def assemble(self, parts: Parts) -> None:
        super().assemble(parts)
        if isinstance(parts.teacher, CachedTeacher):
            message = "what the teacher says of texts that are written in training cannot be stored"
            raise ConfigError(Problem(message, key="teacher_cache", hint="remove it"))
        if parts.task.target != "next":
            message = "texts are gone on with where the next token is learnt"
            raise ConfigError(Problem(message, key="method", hint="task: {kind: causal_lm}, or method: distill"))
        self._device, self._precision, self._steps = parts.device, parts.precision, parts.steps_per_epoch
        self._writer = self.student if self.sampler == "student" or parts.teacher is None else parts.teacher.models[0]

    def begin_step(self, batch: Batch, epoch: float) -> Batch:
        step = round(epoch * self._steps)
        (drawn,) = counter.Draws(torch.tensor([counter.key(counter.SAMPLE, step)]), 0).uniform().tolist()
        length = batch.inputs.shape[1]
        if drawn >= self.share or length <= self.prompt:
            return batch
        assert self.student.record.tokens is not None
        whole = self.student.record.tokens.is_text(batch.inputs).all(1)
        if not bool(whole.any()):
            return batch
        batch = batch if bool(whole.all()) else batch.take(whole.nonzero().flatten())
        with self.clock.section("sampling"):
            texts = self._own(batch, step) if self.sampler == "student" else self._of_teacher(batch)
        return _written(batch, texts, self.prompt, self.sampler == "teacher")

    def _own(self, batch: Batch, step: int) -> Tensor:
        self.student.eval()
        texts = self._continue(batch.inputs, counter.key(counter.SAMPLE, step, 1), batch.index)
        self.train()
        return texts

    def _of_teacher(self, batch: Batch) -> Tensor:
        """The teacher's continuation of each text, written when it is first wanted."""
        numbers = batch.index.tolist()
        new = [row for row, number in enumerate(numbers) if number not in self._written]
        if new:
            rows = torch.tensor(new, device=batch.inputs.device)
            texts = self._continue(batch.inputs[rows], counter.key(counter.SAMPLE), batch.index[rows])
            self._written |= {numbers[row]: text.int() for row, text in zip(new, texts.cpu(), strict=True)}
        return torch.stack([self._written[number] for number in numbers]).long().to(batch.inputs.device)

    def _continue(self, texts: Tensor, key: int, index: Tensor) -> Tensor:
        draws = counter.Draws(counter.fold(key, index), 0).uniforms(texts.shape[1])
        with autocast(self._device, self._precision):
            return continued(self._writer, texts[:, : self.prompt], texts.shape[1], draws, self.temperature)


def _written(batch: Batch, texts: Tensor, prompt: int, is_truth: bool) -> Batch:
    """The batch with other texts, of which the tokens behind the prompt are asked about."""
    keep = torch.zeros_like(texts, dtype=torch.bool)
    keep[:, prompt - 1 : -1] = True
    targets = torch.full_like(texts, IGNORE)
    if is_truth:
        targets[:, prompt - 1 : -1] = texts[:, prompt:]
    extra = {"attention_mask": torch.ones_like(texts)}
    return replace(batch, inputs=texts, targets=targets, keep=keep, extra=extra)
