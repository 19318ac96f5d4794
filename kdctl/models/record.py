"""A model and its architecture record: what it takes to build the net again, beside every weights file.

`<stem>.safetensors` holds the tensors of the bare net (fp32, no adapters), `<stem>.json` the record: kind, arguments,
classes, image shape, normalisation, and the hash of the weights that it belongs to. The weights file carries the record
in its header too, so it can travel alone. A class of the user's own is copied to `code/` beside them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from kdctl import registry, runs
from kdctl.errors import ConfigError, MissingError, Problem
from kdctl.models import structure
from kdctl.models.weights import assign, parse_safetensors
from kdctl.quant import fake
from kdctl.quant.learned import Learned
from kdctl.signals import TokenInput, find_logits

FORMAT = 1


@dataclass
class ModelRecord:
    """What a model is, as plain values.

    kind, arguments: the class and what it is called with. image_shape: (C, H, W) as the data delivers images; empty
    for texts, whose `tokens` then say what their numbers mean (a TokenInput).
    normalize: {"mean": [...], "std": [...]} for channels in [0, 1], or None. input_size: the side in pixels that images
    are resized to first, or None.
    """

    kind: str
    arguments: dict[str, Any]
    num_classes: int
    class_names: list[str]
    image_shape: list[int]
    normalize: dict[str, list[float]] | None = None
    input_size: int | None = None
    class_order: list[int] | None = None
    """For each class of the data the net's own number of it, -1 where it has none; None where they are the same."""
    tokens: TokenInput | None = None
    reads: TokenInput | None = None
    """What the net's own numbers mean, where it reads texts by another tokenizer than that of `tokens`."""
    head: str = "sample"
    """What the model answers for: "sample", or of texts "token", "vocabulary", which token stands at each place, or
    "embedding", a vector of each text; that one has no classes."""
    link: str = "softmax"
    """How its logits become what it says: "softmax" over classes, "sigmoid" of each, "identity": as they are."""
    structure: list[dict[str, Any]] | None = None
    """What compression changed of the net that the class builds (models/structure.py), in order."""

    @property
    def num_logits(self) -> int:
        """How many classes the model answers for."""
        return self.num_classes if self.class_order is None else len(self.class_order)

    @property
    def answers(self) -> list[str | None]:
        """The class that each logit of the model is for, None for one that its net lacks."""
        if self.class_order is None:
            return list(self.class_names)
        return [None if number < 0 else self.class_names[number] for number in self.class_order]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C, H, W) of an image, (L,) of the longest text."""
        return tuple(self.image_shape) if self.tokens is None else (self.tokens.length,)

    def example(self, count: int = 1, image_shape: Sequence[int] | None = None) -> Tensor:
        """Inputs of the right form, always the same: noise in [0, 1], or texts of random tokens of full length.

        image_shape: of images that augmentation gives another (C, H, W).
        """
        generator = torch.Generator().manual_seed(0)
        if self.tokens is None:
            return torch.rand(count, *(image_shape or self.image_shape), generator=generator)
        numbers = torch.randint(self.tokens.vocab_size, (count, self.tokens.length), generator=generator)
        usable = (self.tokens.pad + 1) % self.tokens.vocab_size
        return numbers.masked_fill(numbers == self.tokens.pad, usable)

    @property
    def net_shape(self) -> list[int]:
        """(C, H, W) as the net sees images."""
        channels, height, width = self.image_shape
        return [channels, self.input_size or height, self.input_size or width]

    def to_dict(self) -> dict[str, Any]:
        """The record as a JSON document."""
        document = {"format": FORMAT, **dataclasses.asdict(self)}
        for name in ("structure", "tokens", "reads"):
            if document[name] is None:
                del document[name]
        for name, usual in (("head", "sample"), ("link", "softmax")):
            if document[name] == usual:
                del document[name]
        return document

    @classmethod
    def from_dict(cls, document: Any, file: str | None = None) -> ModelRecord:
        """The record from a JSON document. Raises ConfigError where it is none."""
        if not isinstance(document, dict):
            raise ConfigError(Problem("this is not a model's record", file=file))
        if document.get("format") != FORMAT:
            message = f"the record has format {document.get('format')!r}, this version of kdctl reads {FORMAT}"
            raise ConfigError(Problem(message, file=file))
        names = {f.name for f in dataclasses.fields(cls)}
        try:
            return _RECORDS.validate_json(json.dumps({k: v for k, v in document.items() if k in names}), strict=True)
        except ValidationError as error:
            problems = [
                Problem(f"the record is damaged: {e['msg']}", file, key=".".join(map(str, e["loc"])))
                for e in error.errors()
            ]
            raise ConfigError(*problems) from None


_RECORDS = TypeAdapter(ModelRecord)


class Model(nn.Module):
    """A net with its preprocessing: images or token numbers in, logits out. Taps and shipped weights are those of `net`
    alone.

    A net of texts is called as the transformers library calls its models: input_ids, attention_mask and, where its
    forward pass takes them, token_type_ids.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, net: nn.Module, record: ModelRecord, base: Path | None = None) -> None:
        super().__init__()
        self.net = net
        self.record = record
        self.base = base
        """Where a relative file in the record's kind is read from."""
        reads = record.tokens is not None and getattr(net, "reads_segments", True)
        self._segments = reads and "token_type_ids" in inspect.signature(net.forward).parameters
        for name in ("mean", "std"):
            values = None if record.normalize is None else _channels(record, name)
            self.register_buffer(name, values, persistent=False)

    def forward(self, inputs: Tensor) -> Any:
        """Logits of float images (N, C, H, W) in [0, 1], or of token numbers, int64 (N, L), padded behind."""
        outputs = self._see(inputs) if self.record.tokens is None else self._read(inputs, self.record.tokens)
        return outputs if self.record.class_order is None else _reordered(outputs, self.record.class_order)

    def around(self, net: nn.Module) -> Model:
        """The same model with another net inside, such as one that is faster."""
        return Model(net, self.record, self.base)

    def _read(self, numbers: Tensor, tokens: TokenInput) -> Any:
        given = {"input_ids": numbers, "attention_mask": tokens.is_text(numbers).long()}
        if self._segments:
            given["token_type_ids"] = tokens.segments(numbers)
        return self.net(**given)

    def _see(self, images: Tensor) -> Any:
        size = self.record.input_size
        if size is not None and tuple(images.shape[-2:]) != (size, size):
            antialias = size < max(images.shape[-2:])
            images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=antialias)
        if self.mean is not None and self.std is not None:
            images = (images - self.mean) / self.std
        return self.net(images)


def _reordered(outputs: Any, order: list[int]) -> Tensor:
    """The logits (..., C) in another order of classes; one that the net lacks lies 20 below its lowest logit, where its
    probability is next to nothing and every loss stays finite."""
    logits = find_logits(outputs)
    lacking = torch.tensor([number < 0 for number in order], device=logits.device)
    chosen = logits[..., torch.tensor([max(number, 0) for number in order], device=logits.device)]
    return torch.where(lacking, logits.detach().amin(-1, keepdim=True) - 20, chosen)


def _channels(record: ModelRecord, name: str) -> Tensor:
    """A statistic of normalisation, shaped to meet images (N, C, H, W)."""
    values = (record.normalize or {}).get(name, [])
    channels = record.image_shape[0]
    if len(values) not in (1, channels):
        message = f"{len(values)} numbers for images of {channels} channels"
        raise ConfigError(Problem(message, key=f"normalize.{name}", hint=f"give {channels}, or one for all"))
    if name == "std" and min(values) <= 0:
        raise ConfigError(Problem("a standard deviation must be above 0", key="normalize.std"))
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


# ------------------------------------------------------------------------------------------------- building and loading


def build_model(record: ModelRecord, base: Path | None = None) -> Model:
    """A freshly initialised model of the record's kind; `base` is where a relative `./file.py:Class` is read from.

    The class gets those of num_classes, in_channels and image_shape (C, H, W), of texts vocab_size, max_length, pad and
    head, that its signature names. Raises ConfigError where there is no such kind or it does not take the arguments.
    """
    offered: dict[str, Any] = {"num_classes": record.num_classes}
    if record.tokens is None:
        shape = record.net_shape
        offered |= {"in_channels": shape[0], "image_shape": shape}
    else:
        tokens = record.tokens
        offered |= {"vocab_size": tokens.vocab_size, "max_length": tokens.length, "pad": tokens.pad}
        offered["head"] = record.head
    component = registry.find("models", record.kind, base)
    named = {*registry.signature(component).parameters, *inspect.signature(registry.load(component)).parameters}
    given = {name: value for name, value in offered.items() if name in named}
    net = registry.create("models", record.kind, record.arguments, base, **given)
    structure.apply(net, record.structure or [])
    record = dataclasses.replace(record, arguments={**record.arguments, **getattr(net, "own_arguments", {})})
    return Model(net, record, base)


def load_model(path: Path) -> Model:
    """The saved model at a stem, a .safetensors or .json file, or the student of a run directory; in eval mode.

    A record whose kind is a file of the user's runs that file. Raises MissingError where the model is not there,
    ConfigError where a file is damaged or the two do not belong together.
    """
    stem = _stem(Path(path))
    weights, beside = _with(stem, ".safetensors"), _with(stem, ".json")
    if not weights.is_file():
        unfinished = "is the run finished? `kdctl resume` continues it, `kdctl list runs` shows others"
        hint = unfinished if Path(path).is_dir() else None
        raise MissingError(Problem(f"there is no model {weights}", hint=hint))
    data = weights.read_bytes()
    if beside.is_file():
        document, place = _read_json(beside), str(beside)
        expected = document.get("weights_sha256") if isinstance(document, dict) else None
        if expected is not None and hashlib.sha256(data).hexdigest() != expected:
            hint = "it was damaged or exchanged after it was saved: copy both files again, or train again"
            message = f"these weights are not the ones that {beside.name} describes"
            raise ConfigError(Problem(message, file=str(weights), hint=hint))
    else:
        document, place = _embedded_record(data, weights), str(weights)
    record = ModelRecord.from_dict(document, place)
    model = build_model(record, base=stem.parent)
    assign(model.net, parse_safetensors(data, weights), str(weights))
    return model.eval()


def released(model: Model) -> tuple[Model, dict[str, Learned]]:
    """A model that learnt to be quantised without its fake quantisation, and by layer what it learnt.

    The weights of the plain model lie on the learnt grids; what other compression did to it stays recorded.
    """
    net, learned = fake.release(model.net)
    edits = [edit for edit in model.record.structure or [] if edit["edit"] != "fake_quant"]
    return Model(net, dataclasses.replace(model.record, structure=edits), model.base).eval(), learned


def _stem(path: Path) -> Path:
    if path.suffix in {".safetensors", ".json"}:
        return path.with_suffix("")
    if path.is_dir() and not _with(path, ".safetensors").is_file():
        return path / "student"
    return path


def _with(stem: Path, suffix: str) -> Path:
    return stem.with_name(stem.name + suffix)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MissingError(Problem(f"cannot be read: {error.strerror}", file=str(path))) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(Problem(f"the file is damaged: {error}", file=str(path))) from None


def _embedded_record(data: bytes, path: Path) -> Any:
    parse_safetensors(data, path)
    text = _header(data).get("__metadata__", {}).get("kdctl_record")
    if text is None:
        hint = "foreign weights are loaded with `kind` and `weights` in an experiment file"
        raise MissingError(Problem(f"there is no record beside {path}", hint=hint))
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(Problem(f"the record in the file is damaged: {error}", file=str(path))) from None


# ------------------------------------------------------------------------------------------------------------- saving


def save_model(model: Model, stem: Path) -> None:
    """Writes `stem.safetensors` and then `stem.json`, each aside and renamed; equal models give equal bytes.

    Floating-point tensors are stored as fp32. A user's own class is copied to `code/` beside them, and the record names
    the copy, so the directory can be moved.
    """
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    document = dataclasses.replace(model.record, kind=_ship_code(model, stem.parent)).to_dict()
    tensors = {name: _stored(value) for name, value in model.net.state_dict().items() if isinstance(value, Tensor)}
    text = json.dumps(document, sort_keys=True, allow_nan=False)
    data = _sorted_header(safetensors.torch.save(tensors, {"format": "pt", "kdctl_record": text}))
    with runs.writing(_with(stem, ".safetensors")) as file:
        file.write(data)
    runs.write_json(_with(stem, ".json"), document | {"weights_sha256": hashlib.sha256(data).hexdigest()})


def _stored(value: Tensor) -> Tensor:
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    return value.detach().to("cpu", dtype, copy=True).contiguous()


def _header(data: bytes) -> dict[str, Any]:
    """The header of a safetensors file: eight bytes of length, then JSON."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


def _sorted_header(data: bytes) -> bytes:
    """The same file with its metadata in order: the library writes them as its hash table has them."""
    (length,) = struct.unpack("<Q", data[:8])
    header = _header(data)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _ship_code(model: Model, folder: Path) -> str:
    """Copies the user's file that defines the model's class into `folder`; the kind that names the copy."""
    kind = model.record.kind
    if not registry.is_file_kind(kind):
        return kind
    place, _, name = registry.find("models", kind, model.base).target.rpartition(":")
    source = Path(place)
    content = source.read_bytes()
    copy = folder / "code" / source.name
    if copy.is_file() and copy.read_bytes() != content:
        copy = copy.with_stem(f"{copy.stem}_{hashlib.sha256(content).hexdigest()[:8]}")
    if not copy.is_file():
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, copy)
    return f"./code/{copy.name}:{name}"
