"""One optimizer step: every term's sum divided by its count over the whole batch, whatever processes and micro-batches.

Nothing here waits for the device but what has to: on CUDA a loss that is not finite is looked for every so many steps,
elsewhere at each.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kdctl import checkpoint, ranks, sharding
from kdctl.build import Built
from kdctl.clock import Clock
from kdctl.config.schema import TrainStage
from kdctl.device import autocast
from kdctl.errors import ConfigError, DivergedError, OutOfMemoryError, Problem, is_out_of_memory
from kdctl.methods.base import Method
from kdctl.shares import balancing_factors, gradients, shares
from kdctl.signals import Batch
from kdctl.watch import Reporter

_SHARES_EVERY = 100
"""Steps between two measurements of the terms' parts in the gradient: each costs a backward pass a term."""
_LOOK_EVERY = 50
"""Steps on CUDA between two looks at whether the loss is finite."""


@dataclass
class Sums:
    """The loss of a step, and what it is made of: each term's sum and count. Tensors on the device, in float64."""

    loss: Tensor | float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor | int] = field(default_factory=dict)


class _Trained(nn.Module):
    """A method as the module that DistributedDataParallel wants: its forward pass is the method's step."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.trained = method.trained
        self._step = method.step

    def forward(self, batch: Batch, epoch: float) -> dict[str, Tensor]:
        return self._step(batch, epoch)


class Step:
    """The update of what a method trains, by one batch.

    parts: micro-batches of a step; doubled when one does not fit into memory. With several processes each takes its
    part of the batch, and their gradients are summed.
    """

    def __init__(self, built: Built, stage: TrainStage, clock: Clock, reporter: Reporter, parts: int) -> None:
        self.built, self.stage, self.clock, self.reporter, self.parts = built, stage, clock, reporter, parts
        self.scaler = torch.amp.GradScaler(built.device.type, enabled=built.precision == "fp16")
        self._ranks = ranks.current()
        self._number = 0
        self.shares: dict[str, float] = {}
        """Each term's part of the norm of the student's gradient, when it was last measured."""
        self.factors: dict[str, float] = {}
        """What multiplies the terms' weights, with `balance`."""
        self._shared: nn.parallel.DistributedDataParallel | None = None
        self._sharded = sharding.is_sharded(built.method.trained)
        if self._ranks.size > 1 and not self._sharded:
            own = [built.device] if built.device.type == "cuda" else None
            self._shared = nn.parallel.DistributedDataParallel(
                _Trained(built.method), device_ids=own, find_unused_parameters=True
            )

    def resume(self, steps: int, parts: int, shares: dict[str, float], factors: dict[str, float]) -> None:
        """Takes over from a training that was stopped after so many steps."""
        self._number, self.parts, self.shares, self.factors = steps, parts, shares, factors

    def __call__(self, batch: Batch, epoch: float) -> Sums:
        """Updates the weights by this batch; `epoch` is the fractional number of epochs done.

        Raises DivergedError before the update where the loss is not finite, OutOfMemoryError where even the smallest
        micro-batch does not fit.
        """
        batch = self.built.method.begin_step(batch, epoch)
        self._number += 1
        while True:
            generators = checkpoint.random_state(self.built.device)
            try:
                done = self._gradients(batch, epoch)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            self.built.optimizer.zero_grad(set_to_none=True)
            checkpoint.restore_random_state(generators, self.built.device)
            self._take_smaller(batch)
        with self.clock.section("optimizer"):
            self._update()
            self.built.method.end_step()
        return done

    def _gradients(self, batch: Batch, epoch: float) -> Sums:
        """The gradients of the whole batch, in micro-batches."""
        method = self.built.method
        with self.clock.section("exchange"):
            counts, weights = method.counts(batch), method.weights(epoch)
        done = Sums(counts={name: counts[name] for name, weight in weights.items() if weight})
        scale = {n: self.factors.get(n, 1.0) * w / _at_least_one(counts[n]) for n, w in weights.items()}
        parts = batch.micro_batches(self._num_parts(batch))
        by_term: dict[str, Tensor] = {}
        for number, micro in enumerate(parts):
            with self._syncing(number == len(parts) - 1), self.clock.section("forward"):
                with autocast(self.built.device, self.built.precision):
                    sums = self._forward(micro, epoch)
                if not sums:  # every weight is zero at this moment
                    continue
                losses = {name: scale[name] * value for name, value in sums.items()}
                own_losses = {name: value for name, value in losses.items() if name not in method.elsewhere}
                loss = torch.stack([value.detach() for value in losses.values()]).sum()
                self._check_finite(loss, sums)
                with self.clock.section("backward"):
                    if self._measures(own_losses):
                        own = gradients(self._scaled(own_losses), method.student.net.parameters())
                        by_term = {name: by_term.get(name, 0) + vector for name, vector in own.items()}
                    method.backward(losses, self._backward)
            done.loss = done.loss + _exact(loss)
            for name, value in sums.items():
                done.sums[name] = done.sums.get(name, 0) + _exact(value)
        if by_term:
            self._take_shares(by_term, weights)
        return done

    def _backward(self, loss: Tensor, keep_graph: bool) -> None:
        self.scaler.scale(loss * self._ranks.size).backward(retain_graph=keep_graph)

    def _measures(self, losses: dict[str, Tensor]) -> bool:
        """Whether the terms' gradients are looked at in this step: once in a while, and where `balance` meets a term
        that it has no factor for."""
        new = self.stage.balance == "gradient" and any(name not in self.factors for name in losses)
        return (new or self._number % _SHARES_EVERY == 1) and len(losses) > 1 and not self._sharded

    def _scaled(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.scaler.scale(loss) for name, loss in losses.items()}

    def _take_shares(self, by_term: dict[str, Tensor], weights: dict[str, float]) -> None:
        """How much of the gradient of the whole batch comes from each term, and with `balance` the factors that give
        each its part from the next step on."""
        scale = self.scaler.get_scale()
        norms = {name: float(self._ranks.total(vector).norm()) / scale for name, vector in by_term.items()}
        self.shares = shares(norms)
        if self.stage.balance == "gradient" and self.shares:
            bare = {name: norm / self.factors.get(name, 1.0) for name, norm in norms.items()}
            self.factors = self.factors | balancing_factors(bare, weights)

    def _num_parts(self, batch: Batch) -> int:
        """Micro-batches of this step, as many in every process: parts of a batch differ by one sample."""
        if self.parts == 1 or self._ranks.size == 1:
            return self.parts
        return min(self.parts, int(self._ranks.total(torch.tensor(batch.size))) // self._ranks.size)

    def _forward(self, batch: Batch, epoch: float) -> dict[str, Tensor]:
        try:
            return self.built.method.step(batch, epoch) if self._shared is None else self._shared(batch, epoch)
        except ValueError as error:  # torch's own check
            if batch.size > 1 or "more than 1 value per channel" not in str(error):
                raise
            message = "batch normalisation has no statistics of a single sample, and a micro-batch is of one"
            hint = "fewer micro-batches (train.accumulate) or processes, or a larger data.batch_size"
            raise ConfigError(Problem(message, key="data.batch_size", hint=hint)) from None

    def _syncing(self, last: bool) -> contextlib.AbstractContextManager[object]:
        """Processes exchange gradients once a step: with the last micro-batch. Sharded ones do with each, for
        the sum of whole gradients is what does not fit."""
        return contextlib.nullcontext() if last or self._shared is None else self._shared.no_sync()

    def _update(self) -> None:
        optimizer = self.built.optimizer
        if self.scaler.is_enabled() and all(p.grad is None for p in self.built.method.parameters()):
            return  # every weight is zero at this moment, and the scaler fails without a gradient
        if self._sharded:
            sharding.reduce(self.built.method.parameters())
        if self.stage.clip_norm is not None and self._sharded:
            sharding.clip(self.built.method.parameters(), self.stage.clip_norm)
        elif self.stage.clip_norm is not None:
            self.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(self.built.method.parameters(), self.stage.clip_norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def _check_finite(self, loss: Tensor, sums: dict[str, Tensor]) -> None:
        if loss.device.type == "cuda" and self._number % _LOOK_EVERY:
            return
        if not torch.isfinite(loss):
            bad = [name for name, value in sums.items() if not torch.isfinite(value)]
            raise diverged(bad or list(sums), f"step {self._number}")

    def _take_smaller(self, batch: Batch) -> None:
        """Halves the micro-batches after one that did not fit; the loss stays the same but for the statistics of batch
        normalisation, which are those of a micro-batch."""
        term = next((t.name for t in self.built.method.terms if t.loss.batchwise), None)
        if term is not None or self._ranks.size > 1 or 2 * self.parts > batch.size:
            why = f"the term {term} needs the whole batch at once" if term else "smaller micro-batches are not possible"
            hint = "a smaller data.batch_size or student needs less; so does train.precision=bf16"
            raise OutOfMemoryError(f"a training step does not fit into memory, and {why}", hint=hint)
        self.parts *= 2
        if self.built.device.type == "cuda":
            torch.cuda.empty_cache()
        text = f"out of memory: {self.parts} micro-batches a step from here on"
        self.reporter.say(f"{text}; the loss stays the same, but batch normalisation sees the smaller ones")


def diverged(names: list[str], where: str) -> DivergedError:
    """The error of a loss that is not finite."""
    message = (
        f"the loss is not finite in {where}: {', '.join(names)}; "
        "stopped before anything was saved. Try a lower optimizer.lr, schedule.warmup_epochs or train.clip_norm"
    )
    return DivergedError(Problem(message, key="losses"))


def _exact(value: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return value.detach() if value.device.type == "mps" else value.detach().double()


def _at_least_one(count: int | Tensor) -> int | Tensor:
    return count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1)
