"""The content key of a store: all that its numbers depend on, as plain values that a person can read.

Equal keys share a store, whatever runs use it. A store that was made under another key is never read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kdctl import registry
from kdctl.runs import cache_home, read_json

FORMAT = 1
"""Raised when the files change, or when models or augmentations of kdctl's own give other numbers than before."""
KEY_FILE = "key.json"
Key = dict[str, Any]

_WHOLE = {
    "teacher.weights": "the teacher's weights changed",
    "teacher.code": "the code of the teacher's class changed",
    "teacher.class_names": "the teacher's class names changed",
    "teacher.class_order": "the order of the teacher's classes changed",
    "data": "the data changed (images, labels, or how they are split)",
}
"""Parts whose values tell a reader nothing."""
_NAMES = {
    "format": "the store's format",
    "enumerated": "data.views: all",
    "augment_seed": "data.augment_seed",
    "precision": "train.precision",
    "stored.logits": "teacher_cache.store holds logits:",
    "stored.top_k": "teacher_cache.top_k",
    "stored.dtype": "teacher_cache.dtype",
    "stored.taps": "the taps",
}


def store_key(
    *, record: Mapping[str, Any], code: str | None, weights: str, data: str, augment: Sequence[Mapping[str, Any]],
    enumerated: bool, augment_seed: int, stored: Mapping[str, Any], precision: str,
) -> Key:  # fmt: skip
    """The key of the outputs of a model on some data.

    record: the model's, as its to_dict. code: the hash of a user's own class. weights: hash of the state. data:
    fingerprint of all splits. augment: the transform, one map an operation. enumerated: whether a turn's number is one
    of all views of a finite set. stored: Contents.to_dict. precision: of the teacher's arithmetic.
    """
    # A key without an order of classes is what it was before there were any.
    left_out = {"format"} if record.get("class_order") is not None else {"format", "class_order"}
    teacher = {name: value for name, value in record.items() if name not in left_out}
    return {
        "format": FORMAT,
        "teacher": teacher | ({"code": code} if code else {}) | {"weights": weights},
        "data": data,
        "augment": [dict(item) for item in augment],
        "enumerated": enumerated,
        "augment_seed": augment_seed,
        "stored": dict(stored),
        "precision": precision,
    }


def key_hash(key: Key) -> str:
    """SHA-256 of the key's canonical JSON."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def weights_hash(net: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of a net's state, whatever its layout, order and device."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        if isinstance(value, torch.Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(np.ascontiguousarray(flat.view(torch.uint8).numpy()).data)
    return digest.hexdigest()


def class_code(group: str, kind: str, base: Path | None = None) -> tuple[str, str | None]:
    """A kind as a key names it, and what tells other code of the same name: the hash of the file that defines it where
    that is not kdctl's own, the version of the library whose model it is.

    Wherever a file lies, and in whichever run's copy, equal code has the equal name.
    """
    place, _, name = registry.find(group, kind, base).target.rpartition(":")
    if registry.is_file_kind(kind):
        source = Path(place)
        return f"{source.name}:{name}", hashlib.sha256(source.read_bytes()).hexdigest()
    named, (library, _, zoo_name) = registry.canonical(group, kind), kind.partition(":")
    if library == "huggingface":
        named, library = f"{library}:{Path(zoo_name).name}", "transformers"
    if library in ("torchvision", "timm", "transformers"):
        with suppress(PackageNotFoundError):
            return named, f"{library} {version(library)}"
    found = None if place.startswith("kdctl.") else find_spec(place)
    if found is None or found.origin is None or not Path(found.origin).is_file():
        return named, None
    return named, hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------------------- folders


def base_folder() -> Path:
    """Where stores lie that nobody named."""
    return cache_home() / "teachers"


def default_folder(key: Key) -> Path:
    """The folder of a key: the teacher's kind, and the beginning of the hash."""
    kind = re.sub(r"[^A-Za-z0-9_]+", "_", key["teacher"]["kind"]).strip("_")
    return base_folder() / f"{kind}-{key_hash(key)[:16]}"


def nearest(key: Key) -> tuple[Path, list[str]] | None:
    """The store with the same teacher or the same data whose key differs least, and what differs; None without one."""
    found = []
    for path in sorted(base_folder().glob(f"*/{KEY_FILE}")):
        try:
            other = read_json(path)
            alike = other["data"] == key["data"] or other["teacher"]["weights"] == key["teacher"]["weights"]
        except Exception:  # a damaged one is no neighbour; it is refused by name where it is used
            continue
        changed = differences(other, key)
        if alike and changed:
            found.append((len(changed), path.parent, changed))
    return min(found)[1:] if found else None


def differences(old: Key, new: Key) -> list[str]:
    """What changed from one key to another, in words."""
    before, after = dict(_flat(old)), dict(_flat(new))
    names = [*before, *(name for name in after if name not in before)]
    changed = [name for name in names if before.get(name) != after.get(name)]
    if "augment" in changed:  # other operations: their arguments say no more
        changed = [name for name in changed if not name.startswith("augment.")]
    return [_said(name, before.get(name), after.get(name)) for name in changed]


def _said(name: str, before: Any, after: Any) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    if name.startswith("augment.") and name.endswith(".code"):
        return f"the code of {name.removesuffix('.code')} changed"
    return f"{_NAMES.get(name, name)} was {_text(before)}, now {_text(after)}"


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return f"[{', '.join(map(_text, value))}]" if isinstance(value, list) else str(value)


def _flat(key: Key) -> Iterator[tuple[str, Any]]:
    """Every value of a key by its dotted name; operations by their kind."""
    for name, value in key.items():
        if name == "augment":
            kinds = [item["kind"] for item in value]
            yield "augment", kinds
            repeated = Counter(kinds)
            for number, item in enumerate(value):
                label = item["kind"] if repeated[item["kind"]] == 1 else f"{item['kind']} ({number + 1})"
                yield from ((f"augment.{label}.{k}", v) for k, v in item.items() if k != "kind")
        elif isinstance(value, dict):
            yield from ((f"{name}.{k}", v) for k, v in _flat(value))
        else:
            yield name, value
