"""Published models of texts: that the data's tokens are those which their weights were trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdctl.config.schema import ModelSpec, TeacherSpec
from kdctl.data.prepare import Data
from kdctl.errors import ConfigError, Problem

_TOKENIZER = "tokenizer.json"
_OF_USE = ("version", "truncation", "padding")
"""What a tokenizer's file says of how it was used last, or is written."""
_HUB = "huggingface:"
WITH_ANOTHER = "or teacher.tokenizer, where it teaches by its answers about whole texts"
_POOLING = Path("1_Pooling", "config.json")
_WAYS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}


def check_tokenizer(spec: ModelSpec, data: Data) -> None:
    """Refuses weights of a folder whose tokenizer makes other numbers of texts than that of the data.

    Folders without a tokenizer.json are believed. Raises ConfigError.
    """
    folder = _folder(spec)
    if data.tokenizer is None or folder is None or not (folder / _TOKENIZER).is_file():
        return
    path = folder / _TOKENIZER
    try:
        same = _meaning(path.read_text(encoding="utf-8")) == _meaning(data.tokenizer)
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(f"this is no tokenizer: {error}", file=str(path))) from None
    if not same:
        message = f"the data's texts are made into numbers by another tokenizer than {path}"
        hint = f"data.tokenizer: {folder}"
        if isinstance(spec, TeacherSpec):
            hint += f", by which the student reads too; {WITH_ANOTHER}"
        raise ConfigError(Problem(message, key="weights", hint=hint))


def check_pooling(spec: ModelSpec, data: Data) -> None:
    """Refuses embeddings pooled in another way than the folder of their weights says, as sentence-transformers has it.

    Folders without 1_Pooling are believed. Raises ConfigError.
    """
    folder = _folder(spec) if data.head == "embedding" and spec.kind == "bert" else None
    if folder is None or not (folder / _POOLING).is_file():
        return
    try:
        told = json.loads((folder / _POOLING).read_text(encoding="utf-8"))
        ways = [way for key, way in _WAYS.items() if told.get(key)]
        other = [key for key, value in told.items() if key.startswith("pooling_mode_") and value and key not in _WAYS]
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            Problem(f"this does not say how texts are pooled: {error}", file=str(folder / _POOLING))
        ) from None
    own = spec.arguments.get("pooling") or "mean"
    if other or (ways and ways != [own]):
        message = f"these weights were trained with the pooling {', '.join([*ways, *other])}, and the model has {own}"
        hint = f"pooling: {ways[0]}" if ways and not other else "weights with the pooling mean or first"
        raise ConfigError(Problem(message, key="weights", hint=hint))


def _folder(spec: ModelSpec) -> Path | None:
    """Where the weights that a spec names were published, with the tokenizer beside them."""
    if spec.weights is None:
        return None
    if spec.weights == "pretrained":
        if not spec.kind.startswith(_HUB):
            return None
        from kdctl.models.huggingface import find_folder

        return find_folder(spec.kind.removeprefix(_HUB), [_TOKENIZER])
    path = Path(spec.weights)
    return path if path.is_dir() else path.parent


def _meaning(text: str) -> Any:
    """A tokenizer's file without what does not change the numbers; merges are written in two ways."""
    document = json.loads(text)
    if not isinstance(document, dict):
        raise ValueError("it holds no object")
    kept = {key: value for key, value in document.items() if key not in _OF_USE}
    model = kept.get("model")
    if isinstance(model, dict) and isinstance(model.get("merges"), list):
        merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
        kept["model"] = {**model, "merges": merges}
    return kept
