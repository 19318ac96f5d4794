"""ExecuTorch: a model as a .pte program for phones and boards, and that program as a predictor.

ExecuTorch is the successor of PyTorch Mobile, whose optimiser torch's wheels no longer hold. What computes is handed to
XNNPACK, the delegate for the CPUs of ARM and x86: its kernels are as quick as any, ExecuTorch's own portable ones tens
of times slower. So a program that leaves a heavy operator to them is refused, by name.

Programs take one image: XNNPACK's time for a batch is that of its images one after another (ResNet-20: 0.64 ms an image
alone and in a batch of 15), and a free batch size would leave reshapes to the portable kernels.
Importing this file does not import torch; ExecuTorch's Python runtime itself does.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdctl import runs
from kdctl.errors import ConfigError, KdctlError, MissingError, Problem
from kdctl.export import elsewhere
from kdctl.export.base import Contents, Exporter, FilePredictor, Floats, Quantization
from kdctl.export.manifest import preprocessing
from kdctl.export.onnx import quiet

if TYPE_CHECKING:
    from kdctl.models.record import Model

TARGET = "executorch"
METADATA = "kdctl_metadata"
"""The method that gives the metadata: a program has no other place for it. JSON as a tensor of bytes."""

MOVES = frozenset({
    "view_copy", "permute_copy", "transpose_copy", "t_copy", "squeeze_copy", "unsqueeze_copy", "expand_copy",
    "slice_copy", "select_copy", "split_copy", "split_with_sizes_copy", "unbind_copy", "alias_copy", "clone",
    "_clone_dim_order", "_to_dim_order_copy", "constant_pad_nd", "cat", "embedding",
})  # fmt: skip
TOLERATED = MOVES | {"native_layer_norm", "mean"}
"""What may stay on portable kernels: it moves numbers or looks them up, or passes over each once."""


class ExecuTorch(Exporter):
    """ExecuTorch with the XNNPACK delegate: fp32, or int8 through PyTorch 2's quantisation of exported graphs.

    int8-static: convolutions, linears, sums, poolings; int8-dynamic: linears, and convolutions that no activation is
    fused into. Calibration: minmax, or mse (the range of a histogram's least squared error).
    """

    target = TARGET
    file_name = "model.pte"
    takes_learned = True
    quantizations = ("int8-static", "int8-dynamic")

    def require(self) -> None:
        elsewhere.python_of(TARGET, converting=True)

    def check(self, quantization: Quantization | None) -> None:
        super().check(quantization)
        if quantization is not None:
            check_choices(TARGET, quantization, calibrations=("minmax", "mse"))

    def convert(
        self,
        model: Model,
        image_shape: tuple[int, ...],
        out: Path,
        metadata: dict[str, Any],
        quantization: Quantization | None = None,
    ) -> None:
        self.check(quantization)
        if quantization is not None and quantization.mode == "static":
            quantization.calibration_images(image_shape)
        document = {"preprocessing": preprocessing(image_shape), **metadata}
        with quiet(), silent():
            data = _lower(model, image_shape, document, quantization)
        with runs.writing(out) as file:
            file.write(data)


def check_choices(target: str, quantization: Quantization, calibrations: tuple[str, ...]) -> None:
    """Raises ConfigError for what of a quantization a target has no form for."""
    if quantization.mode == "static" and quantization.calibration not in calibrations:
        message = f"{target} has no calibration '{quantization.calibration}'; allowed: {', '.join(calibrations)}"
        raise ConfigError(Problem(message, key="calibration"))
    if quantization.group_size is not None:
        message = f"{target} files have a scale an output channel, not one a group of weights"
        raise ConfigError(Problem(message, key="group_size"))


# ---------------------------------------------------------------------------------------------------------- converting


def _lower(
    model: Model, image_shape: tuple[int, ...], document: dict[str, Any], quantization: Quantization | None
) -> bytes:
    """The program's bytes."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    from kdctl.models.plain import plain

    example = (torch.zeros(1, *image_shape),)
    text = json.dumps(document, sort_keys=True).encode()
    try:
        with torch.no_grad():
            program = torch.export.export(plain(model), example)
            if quantization is not None:
                from kdctl.export.pt2e import quantized

                program = torch.export.export(quantized(program.module(), quantization), example)
            told = {METADATA: torch.frombuffer(bytearray(text), dtype=torch.uint8)}
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods=told)
            left = left_behind(edge.exported_program().graph)
            if left:
                named = ", ".join(f"{name} ({count})" for name, count in sorted(left.items()))
                raise KdctlError(
                    f"XNNPACK does not take all of the model: {named} would run on slow portable kernels",
                    hint="use layers that XNNPACK has, or another target",
                )
            return bytes(edge.to_executorch().buffer)
    except KdctlError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise KdctlError(
            f"the model cannot be exported to ExecuTorch: {reason[0]}",
            hint="the forward pass must be traceable by torch.export, with operators that ExecuTorch has",
        ) from error


def left_behind(graph: Any) -> Counter[str]:
    """The operators of a lowered graph that no delegate took and portable kernels are too slow for, and how many."""
    nodes = [node.target for node in graph.nodes if node.op == "call_function"]
    names = Counter(str(target._op._opname) for target in nodes if hasattr(target, "_op"))
    return Counter({name: count for name, count in names.items() if name not in TOLERATED})


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keeps what a runtime's C++ writes to stderr (its guesses about the CPU, its greetings) from the user."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


# ----------------------------------------------------------------------------------------------------------- predictor


class ExecuTorchPredictor(FilePredictor):
    """A .pte program in ExecuTorch's Python runtime: one image a call, more in turns.

    threads: XNNPACK has a thread a core and no safe way to change that (resetting its pool aborts the process), so the
    thread that opens a program is kept on as many cores as it may use, and the pool with it when it is new. None: all.
    """

    fixed_batch = 1

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import torch

        self.path = path
        if threads is not None and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        self._tensor = torch.from_numpy
        self._program, self._method = _load(path)
        self.runtime = f"executorch {_version()}"
        taken, given = self._method.metadata.input_tensor_meta(0), self._method.metadata.output_tensor_meta(0)
        shape = tuple(taken.sizes())
        if self._method.metadata.num_inputs() != 1 or len(shape) != 4 or shape[0] != 1 or len(given.sizes()) != 2:
            raise KdctlError(f"{path} does not take one image (1, C, H, W) and give logits (1, classes)")
        self.image_shape = (shape[1], shape[2], shape[3])
        self.num_classes = int(given.sizes()[1])
        self.metadata = _metadata(self._program, path)
        self.class_names = list(self.metadata.get("class_names", []))

    def __call__(self, images: Floats) -> Floats:
        self.check_images(images)
        logits = np.empty((len(images), self.num_classes), np.float32)
        for i, image in enumerate(np.ascontiguousarray(images, np.float32)):
            logits[i] = self._method.execute([self._tensor(image[None])])[0][0]
        return logits


def open_predictor(path: Path | str, threads: int | None = None) -> ExecuTorchPredictor:
    """The predictor of a .pte file.

    Raises MissingError where there is no file, KdctlError for a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"there is no file {path}", hint="kdctl export makes one")
    return ExecuTorchPredictor(path, threads)


def _version() -> str:
    from importlib.metadata import version

    return version("executorch")


def _load(path: Path) -> tuple[Any, Any]:
    """The program and its method `forward`."""
    with quiet(), silent():
        from executorch.runtime import Runtime

        try:
            program = Runtime.get().load_program(path.read_bytes())
            return program, program.load_method("forward")
        except (RuntimeError, KeyError) as error:
            reason = str(error).strip()
            message = f"{path} is damaged or not an ExecuTorch program: {reason}"
            raise KdctlError(message, hint="make the artefact again") from error


def _metadata(program: Any, path: Path) -> dict[str, Any]:
    if METADATA not in program.method_names:
        return {}
    try:
        document = json.loads(bytes(program.load_method(METADATA).execute([])[0].numpy()))
    except (RuntimeError, ValueError) as error:
        raise KdctlError(f"{path} is damaged: its metadata cannot be read", hint="make the artefact again") from error
    return document if isinstance(document, dict) else {}


# ------------------------------------------------------------------------------------------------------------- reading


def inspect(path: Path) -> Contents:
    """Reads a program's sizes and operators: those of XNNPACK's graphs and those left to portable kernels.

    weights: numbers in filters of convolutions and linears. delegated: XNNPACK's share of the operators.
    """
    _load(path)
    with quiet():
        from executorch.exir._serialize._program import deserialize_pte_binary

        file = deserialize_pte_binary(path.read_bytes())
    from kdctl.export.xnnpack import Graph

    program = file.program
    plan = next(plan for plan in program.execution_plan if plan.name == "forward")
    calls = [instruction.instr_args for chain in plan.chains for instruction in chain.instructions]
    kernels = [plan.operators[call.op_index].name for call in calls if type(call).__name__ == "KernelCall"]
    portable = Counter(name.removeprefix("aten::") for name in kernels)
    with quiet():
        graphs = [Graph(bytes(program.backend_delegate_data[d.processed.index].data)) for d in plan.delegates]
    shared = [] if file.named_data is None else file.named_data.buffers
    held = [constant.storage for constant in program.constant_buffer]
    delegated = sum(graph.operators().total() for graph in graphs)
    operators = delegated + portable.total()
    return Contents(
        bytes=path.stat().st_size,
        weight_bytes=sum(graph.constant_bytes for graph in graphs) + sum(map(len, shared)) + sum(map(len, held)),
        weights=sum(graph.weights() for graph in graphs),
        operators=operators,
        int8_operators=sum(graph.int8_operators().total() for graph in graphs),
        float_operators=dict(sum((graph.float_operators() for graph in graphs), computing(portable))),
        delegated=delegated / max(operators, 1),
    )


def computing(kernels: Counter[str]) -> Counter[str]:
    """Of portable kernels, those that compute."""
    return Counter({name: count for name, count in kernels.items() if name not in MOVES})
