"""How long a model takes in ONNX Runtime, predicted from operators that were measured once on this machine.

Time is not proportional to multiply-accumulates: it moves in stairs with the width of the processor's registers, and
the same work costs more on large maps than on small ones, or with channels that do not come in fours. So operators are
measured, on a grid of widths, and a net is the sum of its operators and of the cost of a call. After FastDeepIoT (Yao
et al., SenSys 2018, arXiv 1809.06970): a model of time that is learned on the device drives compression.

Batch 1, one thread, fp32; least CPU times, as other processes disturb them least. What was measured is kept in
`latency/` of the cache, by processor and version of the runtime.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdctl import runs
from kdctl.bench.latency import Cell, processor
from kdctl.bench.latency import measure as measure_cells
from kdctl.compress.latency import profile
from kdctl.compress.latency.operators import Operator, conv_layout, operators
from kdctl.errors import MissingError
from kdctl.export.onnx import Onnx

if TYPE_CHECKING:
    from kdctl.models.record import Model

FORMAT = 1
NUMBERS = (1 << 10, 1 << 13, 1 << 16, 1 << 18, 1 << 20, 1 << 22)
"""Sizes at which an operator that passes over its numbers is measured."""
Corner = tuple[Operator, float]
"""A measured operator and its share in the time of another."""


class LatencyModel:
    """Predicts the time of models on this machine in ONNX Runtime (fp32, batch 1, one thread).

    file: where measured times are kept; by default in the cache, by machine and runtime.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file or runs.cache_home() / "latency" / f"{machine_key()}.json"
        self.times: dict[str, float] = {}
        """By Operator.key, as multiples of the reference net's; `call` is what a call costs,
        `operator` what one costs in a whole net over its own time."""
        self.reference = float("inf")
        """Seconds of the reference net when the machine was at its fastest."""
        self.turn_reference: float | None = None
        """Seconds of the reference net in the turns of the last `measure`."""
        self._read()
        with tempfile.TemporaryDirectory() as folder:
            self.block = profile.block_size(folder)

    def predict(self, model: Model, image_shape: Sequence[int]) -> float:
        """Milliseconds of a call with one image (C, H, W). Operators that were never measured are measured first.

        Raises KdctlError for a model with an operator of unknown cost.
        """
        return self.predict_operators(operators(model, image_shape, self.block))

    def predict_operators(self, found: Iterable[Operator]) -> float:
        """Milliseconds of a call of a net that is made of these operators."""
        found = list(found)
        self._complete({corner for op in found for corner, _ in self._corners(op)})
        relative = self.times["call"] + len(found) * self.times["operator"] + sum(map(self._relative, found))
        return 1000 * self.reference * relative

    def profile(self, model: Model, image_shape: Sequence[int], say: Callable[[str], None] | None = None) -> None:
        """Measures what a prediction of this model, or of the same with fewer channels, needs and is not known yet."""
        wanted: set[Operator] = set()
        for op in operators(model, image_shape, self.block):
            for narrower in self._narrower(op):
                wanted |= {corner for corner, _ in self._corners(narrower)}
        self._complete(wanted, say)

    def measure(self, models: Sequence[Model], image_shape: tuple[int, int, int], seconds: float = 3.0) -> list[float]:
        """Milliseconds of each model: the least process-CPU time of a call, each in a process of its own, in turns.

        seconds: how long each is called in all. Raises KdctlError where a model cannot be exported to ONNX.
        """
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{number}.onnx" for number in range(len(models) + 1)]
            paths[0].write_bytes(profile.reference().SerializeToString())
            for path, model in zip(paths[1:], models, strict=True):
                Onnx().convert(model, image_shape, path, {})
            cells = [Cell(path.stem, "kdctl.export.onnx:open_predictor", {"path": str(path)}) for path in paths]
            reference, *rows = measure_cells(cells, seconds=seconds)
        self.turn_reference = reference.cpu_ms / 1000
        if self.turn_reference < self.reference:  # the machine can be faster than it ever was
            self.reference = self.turn_reference
            self._write()
        return [row.cpu_ms for row in rows]

    # ------------------------------------------------------------------------------------------------------- estimates

    def _relative(self, op: Operator) -> float:
        return sum(share * self.times[corner.key] for corner, share in self._corners(op))

    def _corners(self, op: Operator) -> list[Corner]:
        """The measured operators between which this one lies, with shares that sum to one."""
        if op.kind == "conv":
            return self._conv_corners(op)
        if op.kind == "gemm":
            rows, inputs, outputs = op.size
            return [
                (Operator("gemm", (rows, a, b)), share * other)
                for (a, share), (b, other) in product(_between(inputs, _steps(8)), _between(outputs, _steps(8)))
            ]
        if op.kind == "matmul":
            return [(op, 1.0)]
        return [(Operator(op.kind, (n,)), share) for n, share in _between(op.size[0], NUMBERS)]

    def _conv_corners(self, op: Operator) -> list[Corner]:
        inputs, outputs, groups, *rest = op.size
        layout = conv_layout(inputs, outputs, groups, self.block)
        if groups > 1 and not inputs == outputs == groups:
            return [(op, 1.0)]
        if groups > 1:
            unit = self.block if layout == "blocked" else 1
            widths = _between(_up(inputs, unit), _steps(self.block or 8) if unit > 1 else _uneven(self.block or 8))
            return [(Operator("conv", (c, c, c, *rest)), share) for c, share in widths]
        if layout == "plain":
            step = self.block or 8
            ins, outs = _between(inputs, _uneven(step)), _between(outputs, _uneven(step))
        else:
            ins = [(inputs, 1.0)] if layout == "thin" else _between(_up(inputs, self.block), _doubles(self.block))
            outs = _between(_up(outputs, self.block), _steps(self.block))
        return [(Operator("conv", (a, b, 1, *rest)), share * other) for (a, share), (b, other) in product(ins, outs)]

    def _narrower(self, op: Operator) -> Iterator[Operator]:
        """The operator and those of the same kind with fewer channels, one on each step."""
        yield op
        step = self.block or 8
        if op.kind == "conv" and op.size[2] == 1:
            inputs, outputs, _, *rest = op.size
            narrower = [inputs] if inputs < step else range(step, inputs + 1, step)
            for a, b in product(narrower, range(step, outputs + 1, step)):
                yield Operator("conv", (a, b, 1, *rest))
        elif op.kind == "conv" and op.size[0] == op.size[1] == op.size[2]:
            for c in range(step, op.size[0] + 1, step):
                yield Operator("conv", (c, c, c, *op.size[3:]))

    # ------------------------------------------------------------------------------------------------------- measuring

    def _complete(self, wanted: Iterable[Operator], say: Callable[[str], None] | None = None) -> None:
        """Measures what is not known and keeps it."""
        needed = set(wanted)
        stack = [Operator(*one) for one in profile.stack()[1]]
        if "operator" not in self.times:
            needed |= {corner for op in stack for corner, _ in self._corners(op)}
        missing = sorted({op for op in needed if op.key not in self.times}, key=lambda op: op.key)
        if not missing:
            return
        measured = profile.times([(op.kind, op.size) for op in missing], say)
        self.times |= {op.key: value for op, value in zip(missing, measured.relative, strict=True)}
        self._level()
        self.reference = min(self.reference, measured.reference)
        if "operator" not in self.times:
            call, whole = profile.call_time().relative[0], profile.stack_time().relative[0]
            rest = whole - call - sum(map(self._relative, stack))
            self.times |= {"call": call, "operator": max(0.0, rest / len(stack))}
        self._write()

    def _level(self) -> None:
        """Takes from a convolution what it is said to need more than a wider one: such a time was disturbed."""
        families: dict[Any, list[tuple[int, int, str]]] = {}
        for key in self.times:
            kind, _, text = key.partition(" ")
            if kind == "conv":
                inputs, outputs, groups, *rest = map(int, text.split("-"))
                layout = conv_layout(inputs, outputs, groups, self.block)
                thin = inputs if layout == "thin" else None
                families.setdefault((layout, thin, groups == 1 or groups, *rest), []).append((inputs, outputs, key))
        for points in families.values():
            for a, b, key in points:
                self.times[key] = min(self.times[other] for c, d, other in points if c >= a and d >= b)

    def _read(self) -> None:
        """Takes the times of the file; one that cannot be read is as if it were not there."""
        try:
            document: Any = runs.read_json(self.file)
            if document["format"] == FORMAT:
                self.times = {str(k): float(v) for k, v in document["times"].items()} | self.times
                self.reference = min(self.reference, float(document["reference_seconds"]))
        except (MissingError, KeyError, TypeError, ValueError, AttributeError):
            pass

    def _write(self) -> None:
        self._read()  # what another process has measured meanwhile
        head = {"format": FORMAT, "machine": machine(), "reference_seconds": self.reference}
        runs.write_json(self.file, head | {"times": dict(sorted(self.times.items()))})


# --------------------------------------------------------------------------------------------------------------- widths


def _up(width: int, unit: int) -> int:
    """The width that is computed where channels come in units."""
    return -(-width // unit) * unit


def _steps(unit: int) -> Iterator[int]:
    """1 to 8 units, then 12, 16, 24, 32, ...: stairs are uneven where they are low."""
    yield from range(unit, 8 * unit + 1, unit)
    size = 8
    while True:
        yield size * 3 // 2 * unit
        size *= 2
        yield size * unit


def _doubles(unit: int) -> Iterator[int]:
    """1, 2, 4, ... units."""
    while True:
        yield unit
        unit *= 2


def _uneven(unit: int) -> Iterator[int]:
    """Widths that are no whole units, for kernels that do not care: just above each of `_steps`."""
    yield 1
    for width in _steps(unit):
        yield width + 1


def _between(value: int, axis: Iterable[int]) -> list[tuple[int, float]]:
    """The points of an axis (rising) around a value, with the shares of linear interpolation.

    Below the first it is the first; beyond the last the last two are extended.
    """
    for low, high in pairwise(axis):
        if value <= low:
            return [(low, 1.0)]
        if value <= high:
            break
    share = (value - low) / (high - low)
    return [(high, 1.0)] if share == 1 else [(low, 1 - share), (high, share)]


def machine() -> dict[str, str]:
    """What times depend on: the processor and the runtime."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingError("the latency model needs onnxruntime", hint="pip install 'kdctl[onnx]'") from None
    return {"processor": processor(), "onnxruntime": onnxruntime.__version__}


def machine_key() -> str:
    """The name of this machine's file of times."""
    return hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()[:16]
