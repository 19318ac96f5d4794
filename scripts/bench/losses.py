"""What each loss costs beside plain kd, and beside a whole training step: time, and what it keeps for backward.

    python scripts/bench/losses.py --rounds 15          # writes kdctl/losses/costs.json, which `kdctl explain` reads

Each term gets the same random batch: 128 samples, 100 classes, features of ResNet-20 and ResNet-56 at layer1 to layer3
and their embeddings, the taps that it is meant for. One thread, fp32, CPU time; in every round each kind has its turn
and is compared with kd of the same round. The step is ResNet-20's with ce and kd, the teacher's logits at hand.
saved_bytes: of the tensors that autograd keeps for the term, without its inputs and its own parameters, which are
there anyway.
"""

from __future__ import annotations

import datetime
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import common_parser, conditions, finish, print_table, say
from torch import Tensor, nn

from kdctl import registry
from kdctl.losses.base import DryRun, Loss
from kdctl.signals import Batch, Signals
from kdctl.tasks.classification import Classification

TARGET = Path(__file__).resolve().parents[2] / "kdctl" / "losses" / "costs.json"
BATCH, CLASSES, NUM_SAMPLES = 128, 100, 50_000
SHAPES = {
    "relu": (16, 32, 32), "layer1": (16, 32, 32), "layer2": (32, 16, 16), "layer3": (64, 8, 8), "pool": (64, 1, 1),
    "flatten": (64,), "tokens": (64, 64), "scores": (12, 64, 64),
}  # fmt: skip
STAGES = ("layer1", "layer2", "layer3")
TAPS: dict[str, tuple[str, ...]] = {
    "byot": STAGES, "uskd": ("layer2",), "fitnet": ("layer2",), "attention_transfer": STAGES, "nst": STAGES,
    "vid": STAGES, "ab": STAGES, "fsp": ("relu", *STAGES), "kdsvd": STAGES, "ofd": STAGES,
    "hierarchical_context": STAGES, "reviewkd": (*STAGES, "pool"), "semckd": STAGES, "mmd": ("flatten",),
    "srrl": ("flatten",), "rkd": ("flatten",), "correlation_congruence": ("flatten",), "pkt": ("flatten",),
    "crd": ("flatten",), "srd": ("flatten",), "cwd": ("layer3",), "hidden_mse": ("flatten",), "cosine": ("flatten",),
    "attention_mse": ("scores",), "pkd": ("tokens",), "text_nst": ("tokens",), "text_fsp": ("tokens", "tokens"),
}  # fmt: skip
"""Where it is not the last stage, or nothing: what each kind is measured at."""
LEAST_SECONDS = 0.02
"""Of one measurement: a fast term is run several times."""


class Net(nn.Module):
    """What terms take of a net: its classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(SHAPES["flatten"][0], CLASSES)


def signals(seed: int, learns: bool) -> Signals:
    generator = torch.Generator().manual_seed(seed)
    features = {}
    for tap, shape in SHAPES.items():
        feature = torch.randn(BATCH, *shape, generator=generator).relu_()
        features[tap] = feature.requires_grad_(learns)
    return Signals(torch.randn(BATCH, CLASSES, generator=generator).mul_(3).requires_grad_(learns), features=features)


class Term:
    """A loss of the table on the batch."""

    def __init__(self, kind: str, student: Signals, teacher: Signals, batch: Batch) -> None:
        torch.manual_seed(0)
        self.loss: Loss = registry.create("losses", kind, {})
        declared = self.loss.needs_taps
        taps = TAPS.get(kind, ("layer3",)) if declared or kind in TAPS else ()
        self.loss.taps = tuple((tap, tap) for tap in taps)
        if self.loss.sees_members:
            from dataclasses import replace

            teacher = replace(teacher, members=(teacher, teacher))
            self.loss.taps = tuple((tap, tap) for tap in taps for _ in range(2))
        nets = [Net(), Net()]
        self.loss.setup(DryRun(Classification(), batch, student, teacher, NUM_SAMPLES, nets[0], nets))
        self.loss.bind(nets[0])
        self.loss.train()
        self.student, self.teacher, self.batch = student, teacher, batch

    def run(self) -> None:
        (self.loss(self.student, self.teacher, self.batch) / BATCH).backward()

    def clear(self) -> None:
        for tensor in (self.student.logits, *self.student.features.values(), *self.loss.parameters()):
            tensor.grad = None

    def saved_bytes(self) -> int:
        """Of all storages that autograd keeps, each counted once."""
        given = [s.logits for s in (self.student, self.teacher)] + [self.batch.targets, self.batch.index]
        given += [f for s in (self.student, self.teacher) for f in s.features.values()]
        there = {t.untyped_storage().data_ptr() for t in (*given, *self.loss.parameters(), *self.loss.buffers())}
        kept: dict[int, int] = {}
        alive: list[Tensor] = []  # so that no address is used twice

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in there:
                kept[storage.data_ptr()] = storage.nbytes()
                alive.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.loss(self.student, self.teacher, self.batch)
        return sum(kept.values())


def seconds(run: Callable[[], None], repeats: int) -> float:
    """CPU seconds of one call, the mean of a few."""
    began = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - began) / repeats


def whole_step() -> Callable[[], None]:
    """A training step of ResNet-20 with ce and kd."""
    net = registry.create("models", "resnet20", {}, num_classes=CLASSES, in_channels=3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    images, teacher = torch.rand(BATCH, 3, 32, 32), torch.randn(BATCH, CLASSES)
    batch = Batch(images, torch.arange(BATCH) % CLASSES, torch.arange(BATCH), torch.zeros(BATCH, dtype=torch.int64))
    terms = [(0.1, registry.create("losses", "supervised", {})), (0.9, registry.create("losses", "kd", {}))]
    for _, loss in terms:
        loss.setup(DryRun(Classification(), batch, Signals(teacher), Signals(teacher), NUM_SAMPLES))

    def step() -> None:
        student = Signals(net(images))
        total = sum(weight * loss(student, Signals(teacher), batch) for weight, loss in terms) / BATCH
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    return step


def measure(kinds: list[str], rounds: int) -> tuple[dict[str, dict[str, float]], float]:
    """The costs of each kind, and the median seconds of a step."""
    index = torch.arange(BATCH)
    batch = Batch(torch.zeros(BATCH, 1), index % CLASSES, index, torch.zeros_like(index))
    student, teacher = signals(1, True), signals(2, False)
    terms: dict[str, Term] = {}
    for kind in kinds:
        try:
            terms[kind] = Term(kind, student, teacher, batch)
            terms[kind].run()
            terms[kind].clear()
        except Exception as error:  # a kind that is not for classes, or not there
            say(f"{kind}: left out, {type(error).__name__}: {str(error)[:200]}")
            terms.pop(kind, None)
    step = whole_step()
    step()
    saved = {kind: term.saved_bytes() for kind, term in terms.items()}
    repeats = {kind: max(1, min(50, round(LEAST_SECONDS / seconds(term.run, 2)))) for kind, term in terms.items()}
    times: dict[str, list[float]] = {kind: [] for kind in (*terms, "")}
    names = list(times)
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        at = number % len(names)
        for kind in names[at:] + names[:at]:
            if kind:
                times[kind].append(seconds(terms[kind].run, repeats[kind]))
                terms[kind].clear()
            else:
                times[kind].append(seconds(step, 1))
    whole = statistics.median(times[""])
    costs = {
        kind: {
            "time_vs_kd": _rounded(statistics.median(a / b for a, b in zip(times[kind], times["kd"], strict=True))),
            "step_overhead_percent": _rounded(100 * statistics.median(times[kind]) / whole),
            "saved_bytes": saved[kind],
        }
        for kind in terms
    }
    return costs, whole


def _rounded(value: float) -> float:
    """Two digits: more would say more than a shared machine knows."""
    return float(f"{value:.2g}")


def main() -> None:
    parser = common_parser(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--kinds", nargs="*", help="only these, beside kd")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    kinds = list(registry.catalogue("losses"))
    if args.kinds:
        kinds = [kind for kind in kinds if kind in {*args.kinds, "kd"}]
    costs, whole = measure(kinds, args.rounds)
    rows = [
        [k, *(f"{c[n]:,}" for n in ("time_vs_kd", "step_overhead_percent", "saved_bytes"))] for k, c in costs.items()
    ]
    print_table(["loss", "x kd", "% of a step", "bytes saved"], rows)
    say(f"a step: {1000 * whole:.0f} ms")
    if args.kinds:
        sys.exit()
    meta: dict[str, Any] = {
        **conditions(1), "date": datetime.date.today().isoformat(), "rounds": args.rounds, "batch": BATCH,
        "classes": CLASSES, "step_ms": round(1000 * whole, 1),
    }  # fmt: skip
    finish({"meta": meta, "costs": costs}, args.json or TARGET)


if __name__ == "__main__":
    main()
