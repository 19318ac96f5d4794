"""The time of single operators in ONNX Runtime, each measured inside a small net: no torch here.

A session of one operator also pays for the call, for its input and output and for changes of layout that a whole net
does not pay. So an operator stands several times in a net between a stem and a tail, and its time is that of the net
with more of them less that of the net with few, divided by the difference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kdctl.errors import MissingError

if TYPE_CHECKING:
    import onnx

ROUNDS, TURN_SECONDS = 14, 0.004
"""How often each net has its turn, and for how long of this thread's time."""
TOGETHER, TOGETHER_BYTES = 24, 400_000_000
"""So many operators take turns, fewer where their weights fill memory."""
HEAVY_MACS = 20_000_000
"""An operator of so many multiply-accumulates is repeated less."""
Size = tuple[int, ...]


class Chain:
    """An ONNX graph in the making: nodes and constants, by names that it gives."""

    def __init__(self, image_shape: Sequence[int]) -> None:
        self.image_shape = list(image_shape)
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.random = np.random.default_rng(0)

    def weight(self, *shape: int) -> str:
        """The name of a new constant, uniform with the variance that keeps features of their size."""
        from onnx import numpy_helper

        name = f"w{len(self.constants)}"
        scale = np.float32((3 / max(1, int(np.prod(shape[1:])))) ** 0.5)
        values = self.random.random(shape, dtype=np.float32) * 2 - 1
        self.constants.append(numpy_helper.from_array(values * scale, name))
        return name

    def integers(self, *values: int) -> str:
        from onnx import numpy_helper

        name = f"w{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def add(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Puts an operator behind its inputs; the name of its output."""
        from onnx import helper

        output = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], domain=domain, **attributes))
        return output

    def model(self, output: str) -> onnx.ModelProto:
        """The graph that ends in `output`, flattened."""
        from onnx import TensorProto, helper

        self.nodes.append(helper.make_node("Flatten", [output], ["logits"]))
        images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, *self.image_shape])
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "chain", [images], [logits], self.constants)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft.nchwc", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


# ------------------------------------------------------------------------------------------------------------ operators


def chain(kind: str, size: Size, repeats: int) -> onnx.ModelProto:
    """A net that holds the operator `repeats` times. Raises KeyError for a kind that is none of Operator's."""
    if kind == "conv":
        return _convolutions(size, repeats)
    if kind in ("gemm", "matmul"):
        return _products(kind, size, repeats)
    return _passes(kind, size, repeats)


def _convolutions(size: Size, repeats: int) -> onnx.ModelProto:
    """A stem, then the convolutions side by side, each added to what came before it (which is fused)."""
    inputs, outputs, groups, kh, kw, sh, sw, ph, pw, dh, dw, height, width = size
    net = Chain((3, height, width))
    features = "images"
    if inputs != 3:
        features = net.add("Relu", net.add("Conv", "images", net.weight(inputs, 3, 1, 1), net.weight(inputs)))
    total = ""
    for _ in range(repeats):
        weights = net.weight(outputs, inputs // groups, kh, kw), net.weight(outputs)
        branch = net.add(
            "Conv", features, *weights, kernel_shape=[kh, kw], strides=[sh, sw], pads=[ph, pw, ph, pw],
            dilations=[dh, dw], group=groups,
        )  # fmt: skip
        total = net.add("Relu", net.add("Add", branch, total) if total else branch)
    return net.model(net.add("GlobalAveragePool", total))


def _products(kind: str, size: Size, repeats: int) -> onnx.ModelProto:
    """Products of the same features with several weights, each added to the last by the product itself (Gemm's C)."""
    if kind == "gemm":
        rows, inputs, outputs = size
        net = Chain((inputs, rows))
        features = net.add("Reshape", net.add("Relu", "images"), net.integers(rows, inputs))
        total = net.weight(1, outputs)
        for _ in range(repeats):
            total = net.add("Gemm", features, net.weight(outputs, inputs), total, transB=1)
        return net.model(total)
    batch, rows, inner, columns = size
    net = Chain((batch, rows, inner))
    features, other = "images", net.add("Relu", net.weight(1, batch, inner, columns))
    total = ""
    for _ in range(repeats):
        product = net.add("MatMul", net.add("Mul", features, net.weight(1)), other)
        total = net.add("Add", product, total) if total else product
    return net.model(total)


def _passes(kind: str, size: Size, repeats: int) -> onnx.ModelProto:
    """The operator again and again on the same map, behind a convolution, so that it lies as in a net of them."""
    channels = 64
    side = max(1, round((size[0] / channels) ** 0.5))
    net = Chain((3, side, side))
    start = now = net.add("Conv", "images", net.weight(channels, 3, 1, 1), net.weight(channels))
    if kind in _PLAIN:
        start = now = net.add("Transpose", start, perm=[0, 2, 3, 1])
    if kind == "global_pool":
        return net.model(_pooled(net, start, repeats))
    for _ in range(repeats):
        now = _LINKS[kind](net, now, start)
    return net.model(net.add("GlobalAveragePool", now))


def _pooled(net: Chain, start: str, repeats: int) -> str:
    """As many sums in every net, of which `repeats` are pooled: the difference is in the pooling alone."""
    sums = [start]
    for _ in range(8):
        sums.append(net.add("Add", sums[-1], start))
    total = net.add("GlobalAveragePool", sums[-1])
    for one in sums[:repeats]:
        total = net.add("Add", net.add("GlobalAveragePool", one), total)
    return total


def _pool(kind: str) -> Callable[[Chain, str, str], str]:
    name, _, digits = kind.partition("_pool")
    kernel, before = int(digits), int(digits) // 2
    pads = [before, before, kernel - 1 - before, kernel - 1 - before]
    return lambda net, x, start: net.add(
        {"max": "MaxPool", "avg": "AveragePool"}[name], x, kernel_shape=[kernel] * 2, pads=pads, strides=[1, 1]
    )


def _reorder(net: Chain, x: str, start: str) -> str:
    """Into the blocked layout and out of it: two changes, of which one counts (see `times`)."""
    domain = "com.microsoft.nchwc"
    return net.add("ReorderOutput", net.add("ReorderInput", x, domain=domain), domain=domain, channels=64)


def _shuffle(net: Chain, x: str, start: str) -> str:
    """Channels in another order, as ShuffleNet has it; the groups differ, else two of them would cancel out."""
    groups = 2 if len(net.nodes) % 2 else 8
    folded = net.add("Reshape", x, net.integers(1, groups, 64 // groups, -1))
    turned = net.add("Transpose", folded, perm=[0, 2, 1, 3])
    return net.add("Reshape", turned, net.integers(1, 64, *net.image_shape[1:]))


_PLAIN = {"layer_norm", "softmax", "gelu", "mul"}


class _Links(dict[str, Callable[[Chain, str, str], str]]):
    def __missing__(self, kind: str) -> Callable[[Chain, str, str], str]:
        return _pool(kind)


_LINKS = _Links(
    add=lambda net, x, start: net.add("Add", x, start),
    mul=lambda net, x, start: net.add("Mul", x, start),
    relu=lambda net, x, start: net.add("LeakyRelu", x, alpha=0.5),
    sigmoid=lambda net, x, start: net.add("Sigmoid", x),
    gelu=lambda net, x, start: net.add("Gelu", x),
    layer_norm=lambda net, x, start: net.add("LayerNormalization", x, net.weight(64), net.weight(64)),
    softmax=lambda net, x, start: net.add("Softmax", x),
    copy=_shuffle,
    reorder=_reorder,
)


# -------------------------------------------------------------------------------------------------------------- timing


@dataclass(frozen=True)
class Times:
    """Times of operators as multiples of the reference net's. reference: its least time of a call here, in seconds."""

    relative: list[float]
    reference: float


def reference() -> onnx.ModelProto:
    """The net that everything is compared to: some convolutions that fit the processor's first caches."""
    return chain("conv", (32, 32, 1, 3, 3, 1, 1, 1, 1, 1, 1, 16, 16), 8)


def times(wanted: Sequence[tuple[str, Size]], say: Callable[[str], None] | None = None) -> Times:
    """The time of one of each operator, of this thread's CPU."""
    found: list[float] = []
    best = float("inf")
    while len(found) < len(wanted):
        part = _group(wanted[len(found) :])
        repeats = [_repeats(one) for one in part]
        nets = [chain(*one, n) for one, pair in zip(part, repeats, strict=True) for n in pair]
        measured = _measure(nets)
        best = min(best, measured.reference)
        for number, (few, many) in enumerate(repeats):
            each = (measured.relative[2 * number + 1] - measured.relative[2 * number]) / (many - few)
            found.append(max(0.0, each) / (2 if part[number][0] == "reorder" else 1))
        if say is not None:
            say(f"profiled {len(found)} of {len(wanted)} operators")
    return Times(found, best)


def _repeats(one: tuple[str, Size]) -> tuple[int, int]:
    return (1, 3) if macs(*one) > HEAVY_MACS else (2, 8)


def _group(wanted: Sequence[tuple[str, Size]]) -> Sequence[tuple[str, Size]]:
    """The first of them, as many as take turns together."""
    held, count = 0, 0
    for kind, size in wanted[:TOGETHER]:
        weights = {"conv": lambda n: n[0] // n[2] * n[1] * n[3] * n[4], "gemm": lambda n: n[1] * n[2]}
        held += 4 * sum(_repeats((kind, size))) * weights.get(kind, lambda n: 0)(size)
        if count and held > TOGETHER_BYTES:
            break
        count += 1
    return wanted[:count]


def call_time() -> Times:
    """What a call costs before the first operator: a session with next to nothing in it."""
    net = Chain((3, 32, 32))
    return _measure([net.model(net.add("GlobalAveragePool", "images"))])


def stack() -> tuple[onnx.ModelProto, list[tuple[str, Size]]]:
    """A net of many small and different operators (inverted residual blocks), and what they are.

    In a row, each new to the processor's caches, they take longer than side by side: the difference belongs to them.
    """
    net, width, inner, side = Chain((3, 4, 4)), 32, 192, 4
    held: list[tuple[str, Size]] = []

    def convolve(x: str, inputs: int, outputs: int, kernel: int, groups: int = 1) -> str:
        pad = kernel // 2
        held.append(("conv", (inputs, outputs, groups, kernel, kernel, 1, 1, pad, pad, 1, 1, side, side)))
        weights = net.weight(outputs, inputs // groups, kernel, kernel), net.weight(outputs)
        return net.add("Conv", x, *weights, kernel_shape=[kernel] * 2, pads=[pad] * 4, group=groups)

    features = net.add("Relu", convolve("images", 3, width, 3))
    for _ in range(10):
        branch = net.add("Relu", convolve(features, width, inner, 1))
        branch = net.add("Relu", convolve(branch, inner, inner, 3, inner))
        features = net.add("Add", convolve(branch, inner, width, 1), features)
    held.append(("global_pool", (width * side * side,)))
    return net.model(net.add("GlobalAveragePool", features)), held


def stack_time() -> Times:
    """The time of a call of the net of `stack`."""
    return _measure([stack()[0]])


def macs(kind: str, size: Size) -> int:
    """Multiply-accumulates of an operator; of one that passes over its numbers, how many they are."""
    if kind == "conv":
        inputs, outputs, groups, kh, kw, sh, sw, *_, height, width = size
        return inputs // groups * outputs * kh * kw * (height // sh) * (width // sw)
    return int(np.prod(size))


def _measure(nets: Sequence[onnx.ModelProto]) -> Times:
    """The time of a call of each net, in turns with the others and with the reference.

    A shared processor is slower at times, for everything that runs on it, and other processes spoil its caches: both
    make a call longer, never shorter. So the least time of many turns counts, as a multiple of the least of the
    reference in the same turns.
    """
    calls = [_call(net) for net in [*nets, reference()]]
    least = [float("inf")] * len(calls)
    for turn in range(ROUNDS):
        order = range(len(nets)) if turn % 2 == 0 else reversed(range(len(nets)))
        for number in order:
            least[number] = min(least[number], _least(calls[number], TURN_SECONDS))
            if number % 4 == 0:
                least[-1] = min(least[-1], _least(calls[-1], TURN_SECONDS))
    return Times([value / least[-1] for value in least[:-1]], least[-1])


def _call(net: onnx.ModelProto) -> Callable[[], Any]:
    session = open_graph(net)
    feed = {"images": np.random.default_rng(0).random(session.get_inputs()[0].shape, dtype=np.float32)}
    return lambda: session.run(None, feed)


def _least(call: Callable[[], Any], seconds: float) -> float:
    """The least CPU time of calls during so many seconds of it, after one that fills the caches."""
    call()
    least, start = float("inf"), time.thread_time_ns()
    end = start + int(seconds * 1e9)
    while start < end:
        call()
        now = time.thread_time_ns()
        least, start = min(least, (now - start) / 1e9), now
    return least


def open_graph(graph: onnx.ModelProto, optimized: str | None = None) -> Any:
    """A session of one thread for a graph in memory. optimized: where ONNX Runtime writes what it makes of it."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingError("the latency model needs onnxruntime", hint="pip install 'kdctl[onnx]'") from None
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if optimized is not None:
        options.optimized_model_filepath = optimized
    return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])


def block_size(folder: str) -> int:
    """How many channels the blocked layout of ONNX Runtime holds together on this processor; 0 where it has none.

    Read from what it makes of a convolution with 36 channels: their weights are padded to whole blocks. folder: where
    the optimised graph may be written.
    """
    import onnx

    path = f"{folder}/optimized.onnx"
    open_graph(chain("conv", (36, 36, 1, 3, 3, 1, 1, 1, 1, 1, 1, 8, 8), 1), path)
    widths = {tensor.dims[0] for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 4}
    return {40: 8, 48: 16}.get(max(widths), 0)
