"""What an exporter is: it writes a model into a file of another runtime, and says how that file is opened.

Each target is one file of this room, with a class derived from Exporter and two functions: `open_predictor(path,
threads)` and `inspect(path)`. Importing it imports neither torch nor the runtime.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from kdctl.errors import ConfigError, KdctlError, Problem
from kdctl.quant.learned import Learned
from kdctl.quant.ranges import Calibration

if TYPE_CHECKING:
    from kdctl.models.record import Model

Floats = NDArray[np.float32]
Dtype = Literal["int8", "int4", "fp16", "bf16"]
Mode = Literal["static", "dynamic", "weight_only"]


@dataclass(frozen=True)
class Quantization:
    """How the numbers of a file are kept.

    dtype: of the weights. mode: static (activations are int8 too, their ranges fixed ahead), dynamic (int8, ranges
    found at each call) or weight_only; fp16 and bf16 are weight_only. images: (N, C, H, W) in [0, 1], from which static
    takes ranges by `calibration`. per_channel: a scale an output channel of a weight, or one a tensor. group_size: of
    weight_only, how many weights along the input share a scale (`group_length`), None for all of a channel. keep: paths
    of layers (modules of the net) that stay in fp32. learned: by path, what training found; it is taken as it is.
    """

    dtype: Dtype = "int8"
    mode: Mode = "static"
    images: Floats | None = None
    calibration: Calibration = "minmax"
    per_channel: bool = True
    group_size: int | None = None
    keep: frozenset[str] = frozenset()
    learned: Mapping[str, Learned] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """`int8-static`, `int4-weight_only`, `fp16`."""
        return self.dtype if self.dtype in ("fp16", "bf16") else f"{self.dtype}-{self.mode}"

    def calibration_images(self, image_shape: tuple[int, ...]) -> Floats:
        """The images. Raises ConfigError where there are none, or they are not what the model takes."""
        if self.images is None or len(self.images) == 0:
            hint = "static quantisation needs some of the training split"
            raise ConfigError(Problem("there are no calibration images", key="mode", hint=hint))
        if self.images.ndim != 4 or tuple(self.images.shape[1:]) != tuple(image_shape):
            expected = ", ".join(map(str, image_shape))
            message = f"calibration images are {tuple(self.images.shape)}; the model takes (N, {expected})"
            raise ConfigError(Problem(message, key="mode"))
        return self.images


def group_length(inputs: int, wanted: int | None) -> int:
    """How many of a channel's weights share a scale: the largest divisor of their number up to what is wanted.

    Where that is less than half of it (a prime number of weights has but 1), scales would outweigh the weights: then
    all of the channel shares one.
    """
    if wanted is None or wanted >= inputs:
        return inputs
    divisor = max(size for size in range(1, wanted + 1) if inputs % size == 0)
    return divisor if 2 * divisor >= wanted else inputs


def reason(error: BaseException) -> str:
    """What an exception of torch's says, in one line: its first, or of a traceback the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if "Traceback" in str(error) else lines[0])[:300] if lines else type(error).__name__


def available_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Tokens:
    """What a file of texts takes, as it says itself: what a caller needs of signals.TokenInput, without torch.

    vocab_size: token numbers are below it. length: the longest text. pad: the number behind a shorter one. pairs:
    whether a row is two texts. tokenizer: the hash of what makes the numbers.
    """

    vocab_size: int
    length: int
    pad: int
    pairs: bool = False
    tokenizer: str = ""

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Tokens:
        """From a document with these names among others."""
        return cls(**{name: told[name] for name in ("vocab_size", "length", "pad", "pairs", "tokenizer")})


class Exporter:
    """Writes a model into one file. target: its runtime, a name of EXPORTERS.

    quantizations: what it can write beside fp32, as names of `Quantization.name`. takes_learned: whether it keeps the
    steps that quantisation-aware training found; other targets find their own for the weights that it left.
    of_texts: which of these it can write of a model of texts, `fp32` among them; none where it writes images alone.
    """

    target: ClassVar[str]
    file_name: ClassVar[str]
    quantizations: ClassVar[tuple[str, ...]] = ()
    takes_learned: ClassVar[bool] = False
    of_texts: ClassVar[tuple[str, ...]] = ()

    def require(self) -> None:
        """Raises MissingError where what makes and runs its files is not installed."""

    def convert(
        self,
        model: Model,
        image_shape: tuple[int, ...],
        out: Path,
        metadata: dict[str, Any],
        quantization: Quantization | None = None,
    ) -> None:
        """Writes the model to `out`, with `metadata` in the file; in fp32 without a quantization.

        The model is left as it is. The file takes float images (N, C, H, W) in [0, 1], what normalises them being
        inside, or of a model of texts token numbers, int64 (N, L), and gives float logits. image_shape: (C, H, W), or
        (L,) of the longest text. Raises KdctlError where the model has no such form.
        """
        raise NotImplementedError

    def files(self, out: Path) -> list[Path]:
        """What `convert` writes for `out`, that file first: some targets keep their constants beside the graph."""
        return [out]

    def check(self, quantization: Quantization | None) -> None:
        """Raises ConfigError for a quantization that this target cannot write."""
        if quantization is not None and quantization.name not in self.quantizations:
            allowed = ", ".join(("fp32", *self.quantizations))
            message = f"{self.target} files cannot be {quantization.name}; allowed: {allowed}"
            raise ConfigError(Problem(message, key="mode"))

    def check_texts(self, quantization: str) -> None:
        """Raises ConfigError where this target cannot write models of texts in this way (`fp32`, `int8-dynamic`)."""
        if not self.of_texts:
            hint = "target: onnx takes texts"
            message = f"{self.target} files are of models of images so far; the model takes texts"
            raise ConfigError(Problem(message, key="target", hint=hint))
        if quantization not in self.of_texts:
            allowed = ", ".join(self.of_texts)
            message = f"{self.target} files of models of texts cannot be {quantization} yet; allowed: {allowed}"
            raise ConfigError(Problem(message, key="mode", hint="mode: auto is dynamic for texts"))


class FilePredictor:
    """A file as a predictor: float32 images (N, C, H, W) in [0, 1] to float32 logits (N, classes), any N.

    Of texts: int64 token numbers (N, L), any L up to the longest text; `tokens` then says what they are, and
    `image_shape` is (L,).
    runtime: name and version. metadata: what the exporter wrote into the file. input, output: their names in the file.
    fixed_batch: how many images the file itself takes at a time, None for any number; more are given to it in turns.
    """

    path: Path
    runtime: str
    image_shape: tuple[int, ...]
    num_classes: int
    class_names: list[str]
    metadata: dict[str, Any]
    tokens: Tokens | None = None
    input: str = "images"
    output: str = "logits"
    fixed_batch: int | None = None

    @property
    def link(self) -> str:
        """How its logits become what it says: see ModelRecord.link."""
        return str(self._record("link", "softmax"))

    @property
    def head(self) -> str:
        """What a row of its logits is of: see ModelRecord.head."""
        return str(self._record("head", "sample"))

    def _record(self, name: str, usual: str) -> Any:
        record = self.metadata.get("record")
        return record.get(name, usual) if isinstance(record, dict) else usual

    def __call__(self, images: Floats) -> Floats:
        raise NotImplementedError

    def check_images(self, images: NDArray[Any]) -> None:
        """Raises KdctlError for images of another shape than the file takes."""
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise KdctlError(f"{self.path.name} takes images (N, {expected}); these are {tuple(images.shape)}")


@dataclass(frozen=True)
class Contents:
    """What a file holds and what its runtime makes of it on this machine.

    bytes: the file. weight_bytes: its constants; the rest describes the graph. weights: numbers in weights of
    convolutions and linears. operators: how many the runtime executes. int8_operators: how many of them compute in
    int8, None where the runtime does not tell. float_operators: names and counts of those that compute in float.
    delegated: the share of operators on the runtime's fast path, None where there is only one path.
    """

    bytes: int
    weight_bytes: int
    weights: int
    operators: int
    int8_operators: int | None
    float_operators: dict[str, int]
    delegated: float | None = None
