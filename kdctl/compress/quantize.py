"""Post-training quantisation: a file with few-bit numbers, made by the exporter of the runtime that opens it."""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kdctl import registry
from kdctl.bench.cost import counting
from kdctl.compress.base import Compressor, Workbench
from kdctl.compress.sensitivity import Sensitivity, sensitivities
from kdctl.config.types import PositiveInt
from kdctl.errors import ConfigError, KdctlError, Problem
from kdctl.export import files
from kdctl.export.base import Exporter, Mode, Quantization
from kdctl.models.record import Model, released
from kdctl.quant import fake
from kdctl.quant.learned import Learned

Array = NDArray[Any]

SENSITIVITY_SAMPLES = 128
LAYERS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
    nn.Embedding,
)  # fmt: skip


class Quantize(Compressor):
    """Post-training quantisation of convolutions and linears, with the layers that suffer most left in fp32 on request.

    Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, 2018;
    int8: Krishnamoorthi, Quantizing deep convolutional networks for efficient inference, 2018.
    dtype: of the weights; int8 takes learnt weights of any bits as they are, int4 those of up to 4. mode: static,
    activations are int8 in ranges fixed ahead; dynamic, linears find them at each call; weight_only, all is computed in
    float; auto is static where convolutions hold most of the multiplications and dynamic elsewhere and for texts, which
    have no static mode, weight_only for int4, fp16 and bf16, and with int8 what training learnt: static with ranges
    of inputs, weight_only without. calibration: of static ranges; minmax takes the extremes, percentile leaves out
    0.01 % of the values, entropy takes the range that changes the distribution least, mse the one with the least
    squared error. samples: calibration images. per_channel: one scale an output channel of a weight (or one a
    tensor). group_size: how many weights share a scale in weight_only, a channel's without it. target: the
    exporter. keep: globs over paths of layers that stay in fp32. With `max_drop` of the stage, the most sensitive
    layers stay in fp32 too, as many as it takes.
    """

    smoke = {"samples": 8}

    def __init__(
        self,
        *,
        dtype: Literal["int8", "int4", "fp16", "bf16"] = "int8",
        mode: Literal["auto", "static", "dynamic", "weight_only"] = "auto",
        calibration: Literal["minmax", "percentile", "entropy", "mse"] = "minmax",
        samples: PositiveInt = 512,
        per_channel: bool = True,
        group_size: PositiveInt | None = None,
        target: str = "onnx",
        keep: list[str] | None = None,
    ) -> None:
        self.dtype, self.mode, self.calibration = dtype, mode, calibration
        self.samples, self.per_channel, self.group_size = samples, per_channel, group_size
        self.target, self.keep = target, list(keep or [])
        if dtype in ("fp16", "bf16") and mode not in ("auto", "weight_only"):
            raise ConfigError(Problem(f"{dtype} has no mode {mode}: it keeps weights in 16 bits", key="mode"))
        self._check_groups(mode)
        self.exporter: Exporter = registry.create("exporters", target, {})
        self.exporter_arguments: dict[str, Any] = {}
        """Those of an export stage, which ships what a model learnt through here; a quantize stage has none."""
        self.file_name = self.exporter.file_name
        if mode != "auto" or dtype != "int8":
            self.exporter.check(Quantization(dtype=dtype, mode="weight_only" if mode == "auto" else mode))

    def require(self) -> None:
        self.exporter.require()

    def check(self, model: Model) -> None:
        matching(model.net, self.keep)
        if model.record.tokens is not None:
            self.exporter.check_texts("fp32")

    def convert(
        self,
        model: Model,
        bench: Workbench,
        image_shape: tuple[int, ...],
        out: Path,
        metadata: dict[str, Any],
        max_drop: float | None = None,
    ) -> dict[str, Any]:
        """Writes the quantised model to `out`; returns mode, layers kept in fp32, and with max_drop the qualities.

        Calibration takes the first `samples` of bench.images. A model that learnt its quantisation goes as it learnt
        it. max_drop: where the file loses more points of bench.quality, layers are ranked by `sensitivities` and the
        worst stay in fp32, 1, 2, 4, ... of them until it holds, then as few as still hold; none where that quality has
        nothing to be measured by. Raises KdctlError where the images do not fit or a glob of `keep` matches nothing,
        ConfigError where the mode that auto found has no groups.
        """
        model, how = self._plan(model, bench)
        self.exporter.check(how)
        before = bench.of_student() if max_drop is not None else 0.0
        if not math.isfinite(before):
            bench.say("max_drop: no label outside the test split to measure by: no layer stays in fp32 for its sake")
            max_drop = None
        files.write(self.target, model, out, metadata, how, self.exporter_arguments)
        details: dict[str, Any] = {
            "dtype": how.dtype,
            "mode": how.mode,
            "target": self.target,
            "kept": sorted(how.keep),
        }
        if how.learned:
            details["learned"] = len(how.learned)
        if max_drop is None:
            return details
        drop = before - bench.quality(files.open_file(self.target, out))
        details |= {"quality_before": before, "quality_quantized": before - drop, "quality_after": before - drop}
        if drop <= max_drop + 1e-9 or how.learned:
            return details
        return details | self._mixed(model, bench, how, out, metadata, (before, max_drop))

    # ------------------------------------------------------------------------------------------------------- planning

    def _plan(self, model: Model, bench: Workbench) -> tuple[Model, Quantization]:
        """The plain model and how its numbers are to be kept."""
        learned: dict[str, Learned] = {}
        if fake.is_quantized(model.net):
            model, learned = released(model)
        mode = self._mode(model, learned)
        self._check_groups(mode)
        texts = model.record.tokens is not None
        if texts:
            self.exporter.check_texts(Quantization(dtype=self.dtype, mode=mode).name)
        needs_none = mode == "weight_only" or texts
        images = None if needs_none else take(bench.images(), self.samples, model.record.input_shape)
        keep = matching(model.net, self.keep)
        how = Quantization(
            dtype=self.dtype, mode=mode, images=images,
            calibration=self.calibration, per_channel=self.per_channel, group_size=self.group_size, keep=keep,
            learned={path: layer for path, layer in learned.items() if path not in keep and self._takes(layer)},
        )  # fmt: skip
        return model, how

    def _takes(self, layer: Learned) -> bool:
        """Whether the file can hold the layer's weights as whole multiples of the step that was learnt."""
        most = {"int8": 8, "int4": 4}.get(self.dtype, 0)
        return self.exporter.takes_learned and layer.weight_bits <= most

    def _check_groups(self, mode: str) -> None:
        if self.group_size is not None and (self.dtype in ("fp16", "bf16") or mode in ("static", "dynamic")):
            hint = "group_size is for mode: weight_only with int8 or int4"
            message = f"weights of {self.dtype} {mode} have no groups"
            raise ConfigError(Problem(message, key="group_size", hint=hint))

    def _mode(self, model: Model, learned: Mapping[str, Learned]) -> Mode:
        if self.mode != "auto":
            return self.mode
        if self.dtype != "int8":
            return "weight_only"
        if any(layer.input_range is not None for layer in learned.values()):
            if self.exporter.takes_learned:
                return "static"
        elif learned and "int8-weight_only" in self.exporter.quantizations:
            return "weight_only"
        dynamic = f"{self.dtype}-dynamic" in self.exporter.quantizations
        if dynamic and model.record.tokens is not None:
            return "dynamic"
        return "static" if not dynamic or convolution_share(model, model.record.image_shape) >= 0.5 else "dynamic"

    # ------------------------------------------------------------------------------------------------ mixed precision

    def _mixed(
        self,
        model: Model,
        bench: Workbench,
        how: Quantization,
        out: Path,
        metadata: dict[str, Any],
        limit: tuple[float, float],
    ) -> dict[str, Any]:
        """Writes the file with as few layers in fp32 as hold the quality. limit: (quality before, points to lose)."""
        ranked = self._ranked(model, bench, how)
        if not ranked:
            return {"layers": 0, "sensitivity": []}
        before, max_drop = limit
        qualities: dict[int, float] = {}

        def holds(count: int) -> bool:
            kept = how.keep | {layer.path for layer in ranked[:count]}
            files.write(self.target, model, out, metadata, replace(how, keep=kept), self.exporter_arguments)
            qualities[count] = bench.quality(files.open_file(self.target, out))
            bench.say(f"  {count} of {len(ranked)} layers in fp32: {qualities[count]:.2f}, before {before:.2f}")
            return before - qualities[count] <= max_drop + 1e-9

        count = fewest(holds, len(ranked))
        if list(qualities)[-1] != count:
            holds(count)
        return {
            "kept": sorted(how.keep | {layer.path for layer in ranked[:count]}),
            "layers": len(ranked),
            "quality_after": qualities[count],
            "sensitivity": [layer.as_dict() for layer in ranked],
        }

    def _ranked(self, model: Model, bench: Workbench, how: Quantization) -> list[Sensitivity]:
        record, samples = model.record, min(self.samples, SENSITIVITY_SAMPLES)
        images = take(bench.images(), samples, record.input_shape, None if record.tokens is None else record.tokens.pad)
        bits = {"int8": 8, "int4": 4}.get(how.dtype, 8)
        inputs = None if how.mode == "weight_only" else 8
        return sensitivities(
            model, images, bits=bits, activation_bits=inputs, per_channel=how.per_channel,
            calibration=how.calibration, skip=how.keep,
        )  # fmt: skip


def fewest(holds: Callable[[int], bool], most: int) -> int:
    """The least count of 1..most that holds, taken to hold for all above it: by doubling, then by bisection.

    `most` where none does.
    """
    failed, count = 0, 1
    while count < most and not holds(count):
        failed, count = count, min(2 * count, most)
    if count == most:
        holds(most)
    while count - failed > 1:
        middle = (failed + count) // 2
        if holds(middle):
            count = middle
        else:
            failed = middle
    return count


def matching(net: nn.Module, globs: Iterable[str]) -> frozenset[str]:
    """Paths of the convolutions, linears and embeddings that globs match, or that lie inside a module they match.

    Raises KdctlError for a glob without any.
    """
    layers = [path for path, module in net.named_modules() if isinstance(module, LAYERS)]
    found: set[str] = set()
    for glob in globs:
        hits = [path for path in layers if fnmatch.fnmatch(path, glob) or fnmatch.fnmatch(path, f"{glob}.*")]
        if not hits:
            raise KdctlError(f"keep: '{glob}' matches no layer", hint=f"the model's layers: {', '.join(layers)}")
        found.update(hits)
    return frozenset(found)


def convolution_share(model: Model, image_shape: Iterable[int]) -> float:
    """The share of convolutions in the multiply-accumulates of a model, in [0, 1]; 0 for a model without any."""
    copied = copy.deepcopy(model).cpu().float().eval()
    with counting() as counter:
        copied(torch.zeros(1, *image_shape))
    counts = {str(operator): flops for operator, flops in counter.get_flop_counts().get("Global", {}).items()}
    convolutions = sum(flops for operator, flops in counts.items() if "conv" in operator)
    return convolutions / max(sum(counts.values()), 1)


def take(batches: Iterable[Array], samples: int, shape: tuple[int, ...], pad: int | None = None) -> Array:
    """The first images of a stream of batches, as one array (N, C, H, W). Raises KdctlError where they do not fit.

    Of texts, which have a number for padding, int64 (N, L), L as in `shape`.
    """
    taken: list[Array] = []
    missing = samples
    for batch in batches:
        if pad is not None:
            short = shape[0] - batch.shape[1]
            batch = np.pad(batch, ((0, 0), (0, short)), constant_values=pad)
        elif batch.ndim != 4 or tuple(batch.shape[1:]) != tuple(shape):
            expected = ", ".join(map(str, shape))
            raise KdctlError(f"calibration images are {tuple(batch.shape)}; the model takes (N, {expected})")
        taken.append(np.asarray(batch[:missing], np.float32 if pad is None else np.int64))
        missing -= len(taken[-1])
        if missing == 0:
            break
    if sum(map(len, taken)) == 0:
        raise KdctlError("there are no calibration images", hint="static quantisation needs some of the training split")
    return np.concatenate(taken)
