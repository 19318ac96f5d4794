"""Labels and probabilities for image files, arrays and texts, by a run's student or by an artefact in its own runtime.

Needs neither the data nor the teacher of the run. Images become what the data pipeline would make of them: decoded as
those of an image folder, in the channels and the size that the model's record names; texts become numbers by the
tokenizer that lies beside the model. N samples, C channels, H x W pixels.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdctl.artefacts.yardstick import open_file
from kdctl.data.image_folder import EXTENSIONS, Decoder
from kdctl.data.tokenizer import FILE as TOKENIZER
from kdctl.data.tokenizer import Tokenizer
from kdctl.errors import KdctlError, MissingError, Problem
from kdctl.evaluate import Floats, Predictor, TorchPredictor, quick
from kdctl.export import manifest
from kdctl.models.record import load_model
from kdctl.runs import Run
from kdctl.watch import Bar, no_bar

BATCH = 128
ARRAYS = {".npy", ".npz"}
Shape = tuple[int, ...]
_NOT_READ = {"label": None, "class": None, "probability": None}
"""Of a word that lies beyond the longest text that the model takes."""
_ROUNDING = 1e-6
"""How far a value may lie outside of [0, 1]: what float arithmetic adds."""
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)[:, None, None]


@dataclass(frozen=True)
class Sample:
    """One sample to predict. pixels: float32 (C, H, W) in [0, 1] as the model takes it; of a text its numbers (L,).

    words: of a text whose words are tagged these; begun: which of them each token begins, -1 for none.
    """

    name: str
    pixels: NDArray[Any]
    words: Sequence[str] = ()
    begun: Sequence[int] = ()


def open_student(run: Run, device: str = "cpu") -> TorchPredictor:
    """The shipped student of a run, in fp32. Raises MissingError where the run has none yet."""
    return TorchPredictor(quick(load_model(run.path)), device)


def open_artefact(folder: Path) -> Any:
    """The predictor of an artefact, in its own runtime. Raises KdctlError where a file is not its manifest's."""
    made = manifest.verify(folder)
    return open_file(str(made["target"]), folder / made["model"])


def predict_files(
    predictor: Predictor, places: Sequence[str], top: int = 1, bar: Bar = no_bar, home: Path | None = None
) -> dict[str, Any]:
    """What a predictor says of files and of all that lies in folders: `predictions` and `failed`, in order.

    A prediction is {input, label, class, probability, top}: the most probable class and, in `top`, that many of them;
    probabilities are softmax in float64. Of several classes a sample it is {input, labels, top}, `labels` being those
    whose probability is above one half, by a sigmoid each; of a number {input, value}; of an embedding
    {input, embedding}, a list of its numbers, not scaled to a length; of tagged words {input, words},
    with word, label, class and probability of each, None for words beyond the model's length. Each file or image that
    cannot be read is one of `failed` {input, message, hint} and does not keep the others from being predicted. bar:
    shows how far it is, in images or texts. home: the folder of the run or the artefact, where the tokenizer of a model
    of texts lies. Raises MissingError without it.
    """
    tokens, link = getattr(predictor, "tokens", None), getattr(predictor, "link", "softmax")
    if getattr(predictor, "head", "sample") == "vocabulary":
        hint = "`kdctl eval` measures it"
        raise KdctlError("the model says which token stands at each place of a text, and has no labels", hint=hint)
    tagged = getattr(predictor, "head", "sample") == "token"
    tokenizer = None if tokens is None else open_tokenizer(home, tokens)
    names = [str(number) for number in range(predictor.num_classes)]
    known = getattr(predictor, "class_names", None) or []
    names = [known[i] or name if i < len(known) else name for i, name in enumerate(names)]
    predictions: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    waiting: list[Sample] = []

    def ask() -> None:
        if waiting:
            inputs = [sample.pixels for sample in waiting]
            logits = predictor(np.stack(inputs) if tokens is None else _padded(inputs, tokens.pad))
            for sample, row in zip(waiting, logits, strict=True):
                own = row[: len(sample.begun)] if sample.words else row
                if not np.isfinite(own).all():
                    message = "the model gives numbers for it that are not finite"
                    failed.append({"input": sample.name, "message": message, "hint": None})
                else:
                    predictions.append({"input": sample.name} | _answer(sample, own, names, link, top))
            waiting.clear()

    found_in = samples(places, predictor.image_shape) if tokenizer is None else texts(places, tokenizer, tokens, tagged)
    with bar("predicting", _count(places) if tokenizer is None else None) as advance:
        for found in found_in:
            advance(1)
            if isinstance(found, Problem):
                failed.append({"input": found.file, "message": found.message, "hint": found.hint})
                continue
            waiting.append(found)
            if len(waiting) == BATCH:
                ask()
        ask()
    return {"samples": len(predictions), "predictions": predictions, "failed": failed}


def open_tokenizer(home: Path | None, tokens: Any) -> Tokenizer:
    """The tokenizer in the folder of a run or an artefact. Raises MissingError where it is not there, KdctlError where
    it is not the one whose numbers the model takes."""
    file = None if home is None else home / TOKENIZER
    if file is None or not file.is_file():
        place = "the model's folder" if home is None else str(home)
        hint = f"copy the {TOKENIZER} of the run that the model is from there"
        raise MissingError(f"the model takes texts, and there is no {TOKENIZER} in {place}", hint=hint)
    tokenizer = Tokenizer.read(file)
    if tokenizer.sha256 != tokens.tokenizer:
        message = f"{file} is not the tokenizer that this model was trained with"
        raise KdctlError(message, hint=f"copy the {TOKENIZER} of the run that the model is from there")
    return tokenizer


def _padded(rows: Sequence[NDArray[Any]], pad: int) -> NDArray[np.int64]:
    """Numbers of texts as one array (N, L), padded behind."""
    result = np.full((len(rows), max(map(len, rows))), pad, np.int64)
    for row, own in zip(result, rows, strict=True):
        row[: len(own)] = own
    return result


def softmax(logits: Floats) -> NDArray[np.float64]:
    """Probabilities (N, C) of logits (N, C), in float64; NaN in rows whose largest logit is not finite."""
    rows = np.asarray(logits, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        shifted = np.exp(rows - rows.max(1, keepdims=True))
        return shifted / shifted.sum(1, keepdims=True)


def _answer(sample: Sample, row: NDArray[Any], names: Sequence[str], link: str, top: int) -> dict[str, Any]:
    """What the logits of a sample say, (C,), or (L, C) of the tokens of a text."""
    if link == "embedding":
        return {"embedding": [float(value) for value in row]}
    if link == "identity":
        return {"value": float(row[0])}
    if sample.words:
        begins = {word: token for token, word in enumerate(sample.begun) if word >= 0}
        rows = softmax(row)
        said = [_chosen(rows[begins[i]], names, 1) if i in begins else _NOT_READ for i in range(len(sample.words))]
        return {"words": [{"word": word} | _without(one) for word, one in zip(sample.words, said, strict=True)]}
    if link == "sigmoid":
        with np.errstate(over="ignore"):  # below -709 it is 1 / inf
            probabilities = 1 / (1 + np.exp(-np.asarray(row, np.float64)))
        ordered = _chosen(probabilities, names, len(names))["top"]
        return {"labels": [one for one in ordered if one["probability"] > 0.5], "top": ordered[:top]}
    return _chosen(softmax(row[None])[0], names, top)


def _without(one: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in one.items() if name != "top"}


def _chosen(row: NDArray[np.float64], names: Sequence[str], top: int) -> dict[str, Any]:
    order = np.argsort(-row, kind="stable")[:top].tolist()  # of equal ones the lower number, as in evaluation
    best = [{"label": names[i], "class": i, "probability": float(row[i])} for i in order]
    return best[0] | {"top": best}


# -------------------------------------------------------------------------------------------------------------- inputs


def samples(places: Sequence[str], shape: Shape) -> Iterator[Sample | Problem]:
    """Every image of the files and folders, decoded one after the other; a Problem for what is none."""
    for place in places:
        path = Path(place)
        if path.is_dir():
            inside = list(_walk(path))
            if not inside:
                yield Problem("the folder has no image and no array", file=place, hint=_known())
            for file in inside:
                yield from _of_file(file, shape)
        elif not path.exists():
            yield Problem("there is no such file", file=place)
        else:
            yield from _of_file(path, shape)


def texts(places: Sequence[str], tokenizer: Tokenizer, tokens: Any, tagged: bool = False) -> Iterator[Sample | Problem]:
    """Every line of the files as a text, of pairs as two with a tab between; a Problem for what is none.

    tagged: whether a text is its words, with spaces between them.
    Empty lines are left out; a sample is called FILE:LINE.
    """
    for place in places:
        try:
            lines = Path(place).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            yield Problem(f"cannot be read as text: {reason}", file=place, hint="a file with one text a line")
            continue
        for number, line in enumerate(lines, 1):
            name, parts = f"{place}:{number}", line.split("\t") if tokens.pairs else [line]
            if tokens.pairs and line.strip() and len(parts) != 2:
                yield Problem("the model takes pairs of texts, with one tab between them", file=name)
            elif line.strip() and tagged:
                ((ids, begun),) = tokenizer.encode_words([line.split()], tokens.length)
                yield Sample(name, np.asarray(ids, np.int64), line.split(), begun)
            elif line.strip():
                (numbers,) = tokenizer.encode(parts[:1], parts[1:] if tokens.pairs else None, tokens.length)
                yield Sample(name, np.asarray(numbers, np.int64))


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders.sort()
        wanted = (n for n in sorted(names) if not n.startswith(".") and Path(n).suffix.lower() in EXTENSIONS | ARRAYS)
        yield from (Path(place, name) for name in wanted)


def _count(places: Sequence[str]) -> int | None:
    """How many images there are to be read; None where arrays are among them, which only tell once they are read."""
    files = [file for place in places for file in (_walk(Path(place)) if Path(place).is_dir() else [Path(place)])]
    return None if any(file.suffix.lower() in ARRAYS for file in files) else len(files)


def _known() -> str:
    return f"looked for {' '.join(sorted(EXTENSIONS | ARRAYS))}"


def _of_file(path: Path, shape: Shape) -> Iterator[Sample | Problem]:
    try:
        if path.suffix.lower() in ARRAYS:
            yield from _of_arrays(path, shape)
        else:
            yield Sample(str(path), _decoded(path, shape))
    except KdctlError as error:
        yield Problem(error.problems[0].message, file=str(path), hint=error.problems[0].hint)


def _decoded(path: Path, shape: Shape) -> Floats:
    channels, height, width = shape
    if channels not in (1, 3):
        raise KdctlError(f"the model takes images of {channels} channels, which no image file has", hint="give arrays")
    return _unit(Decoder([str(path)], (height, width), channels)(0).numpy())


def _of_arrays(path: Path, shape: Shape) -> Iterator[Sample]:
    """The images of a .npy file, or of every array of a .npz file that can be images."""
    arrays = _read(path)
    for name, array in arrays.items():
        label = str(path) + (f":{name}" if len(arrays) > 1 else "")
        images = _channels_first(_checked(array, label), shape, label)
        for number in range(len(images)):
            yield Sample(f"{label}[{number}]", _fitted(np.asarray(images[number]), shape))


def _read(path: Path) -> dict[str, NDArray[Any]]:
    try:
        file = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(file, np.ndarray):
            return {"": file}
        with file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise KdctlError(f"cannot be read as arrays: {error}") from None
    images = {name: array for name, array in arrays.items() if array.ndim in (3, 4)}
    if not images:
        raise KdctlError(f"has no array of images: {_shapes(arrays)}", hint="(N, H, W), (N, H, W, C) or (N, C, H, W)")
    return images


def _shapes(arrays: dict[str, NDArray[Any]]) -> str:
    return ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "it is empty"


def _checked(array: NDArray[Any], label: str) -> NDArray[Any]:
    """The array, if it is uint8, or floating point within [0, 1]."""
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise KdctlError(f"{label} is {array.dtype}; images are uint8, or floating point in [0, 1]")
    if array.dtype.kind == "f" and array.size:
        low, high = float(array.min()), float(array.max())
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # also where one of them is NaN
            hint = "divide by 255, or give uint8" if high > 1 else "the model normalises by itself: give plain images"
            raise KdctlError(f"{label} has values from {low:g} to {high:g}; floating point is in [0, 1]", hint=hint)
    return array


def _channels_first(array: NDArray[Any], shape: Shape, label: str) -> NDArray[Any]:
    """The array as (N, C, H, W). Which axis the channels are is told by its 1 or 3 entries, else by the model."""
    if array.ndim == 3 and array.shape[2] not in (1, 3):
        return array[:, None]
    if array.ndim == 4:
        if array.shape[1:] == shape:
            return array
        first, last = (array.shape[axis] in (1, 3, shape[0]) for axis in (1, 3))
        if first != last:
            return array if first else array.transpose(0, 3, 1, 2)
        if (array.shape[3], *array.shape[1:3]) == shape:
            return array.transpose(0, 3, 1, 2)
    expected = "(N, H, W), (N, H, W, C) or (N, C, H, W)"
    hint = f"one image is given as (1, ...); the model takes images of {shape} as (C, H, W)"
    raise KdctlError(f"{label} has shape {array.shape}; expected {expected}", hint=hint)


def _fitted(image: NDArray[Any], shape: Shape) -> Floats:
    """One image (C, H, W) in the channels and the size of the model: the middle of it, resized as image files are."""
    from PIL import Image, ImageOps

    channels, height, width = shape
    if image.shape[0] != channels:
        image = _recoloured(image, channels)
    if image.shape[1:] != (height, width):
        mode = np.uint8 if image.dtype == np.uint8 else np.float32
        planes = [Image.fromarray(np.ascontiguousarray(plane, dtype=mode)) for plane in image]
        fitted = [ImageOps.fit(plane, (width, height), Image.Resampling.BILINEAR) for plane in planes]
        image = np.stack([np.asarray(plane) for plane in fitted])
    return _unit(image)


def _recoloured(image: NDArray[Any], channels: int) -> NDArray[Any]:
    """Grey as colour, or colour as grey by its luma (ITU-R 601), as pillow does it."""
    if (image.shape[0], channels) == (1, 3):
        return np.repeat(image, 3, axis=0)
    if (image.shape[0], channels) != (3, 1):
        raise KdctlError(f"images of {image.shape[0]} channels; the model takes {channels}")
    if image.dtype != np.uint8:
        return (image.astype(np.float32) * _LUMA).sum(0, keepdims=True)
    from PIL import Image

    return np.asarray(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).convert("L"))[None]


def _unit(image: NDArray[Any]) -> Floats:
    """Pixels as float32 in [0, 1]."""
    if image.dtype == np.uint8:
        return image.astype(np.float32) / np.float32(255)
    return np.clip(image, 0, 1).astype(np.float32)
