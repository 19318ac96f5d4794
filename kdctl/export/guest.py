"""The other side of elsewhere.py: what runs in a runtime's own environment.

python -m kdctl.export.guest convert FOLDER     request, model and images lie there; so will the reply
python -m kdctl.export.guest inspect FOLDER
python -m kdctl.export.guest serve TARGET FILE [THREADS]     batches from stdin, logits to stdout, until stdin ends
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np

from kdctl import __version__
from kdctl.errors import KdctlError, MissingError
from kdctl.export import EXPORTERS, elsewhere
from kdctl.export.base import Learned, Quantization
from kdctl.export.elsewhere import REPLY, SHAPE


def _module(target: str, converting: bool = False) -> Any:
    lacking = ", ".join(elsewhere.lacking(target, converting))
    if lacking:  # going on, this environment would ask itself
        raise MissingError(f"{sys.executable} lacks {lacking}", hint=f"pip install 'kdctl[{target}]' there")
    return importlib.import_module(f"kdctl.export.{target}")


def convert(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Writes the file that is asked for."""
    from kdctl.models.record import load_model

    module, name = _module(request["target"], converting=True), EXPORTERS[request["target"]][0].partition(":")[2]
    exporter = getattr(module, name)(**request["arguments"])
    images = folder / "images.npy"
    found = np.load(images, allow_pickle=False) if images.is_file() else None
    document = request["quantization"]
    quantization = None if document is None else from_document(document, found)
    channels, height, width = request["image_shape"]
    model = load_model(folder / "model")
    exporter.convert(model, (channels, height, width), Path(request["out"]), request["metadata"], quantization)
    return {}


def inspect(folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """What the file holds."""
    return dict(vars(_module(request["target"]).inspect(Path(request["path"]))))


def from_document(document: dict[str, Any], images: Any) -> Quantization:
    """The other way of elsewhere.to_document."""
    learned = {}
    for path, found in document["learned"].items():
        scale = np.asarray(found["weight_scale"], np.float32)
        bounds = found["input_range"]
        taken = None if bounds is None else (float(bounds[0]), float(bounds[1]))
        learned[path] = Learned(scale, found["weight_bits"], taken, found["input_bits"])
    return Quantization(**document | {"images": images, "keep": frozenset(document["keep"]), "learned": learned})


def reply(document: dict[str, Any]) -> dict[str, Any]:
    return {"kdctl_version": __version__, "document": document}


def failure(error: BaseException) -> dict[str, Any]:
    """An error as a reply; one that is not ours goes to stderr in full and is named here."""
    if isinstance(error, KdctlError):
        return {"error": error.as_dict()["errors"], "code": error.code}
    import traceback

    traceback.print_exception(error)
    return {"error": [{"message": f"{type(error).__name__}: {error}"}], "code": 1}


def serve(target: str, path: Path, threads: int | None, batches: IO[bytes], answers: IO[bytes]) -> None:
    """Answers batches until there are no more."""

    def tell(kind: int, document: dict[str, Any]) -> None:
        data = json.dumps(document).encode()
        answers.write(REPLY.pack(kind, 0, len(data)) + data)
        answers.flush()

    try:
        predictor = _module(target).open_predictor(path, threads)
    except Exception as error:
        tell(1, failure(error))
        return
    names = ("runtime", "image_shape", "num_classes", "class_names", "metadata", "input", "output", "fixed_batch")
    tell(2, reply({name: getattr(predictor, name) for name in names}))
    while len(header := batches.read(SHAPE.size)) == SHAPE.size:
        shape = SHAPE.unpack(header)
        size = 4 * int(np.prod(shape, dtype=np.int64))
        data = batches.read(size)
        if len(data) < size:
            return
        try:
            logits = predictor(np.frombuffer(data, "<f4").reshape(shape))
        except Exception as error:
            tell(1, failure(error))
            continue
        answers.write(REPLY.pack(0, *logits.shape))
        answers.write(np.ascontiguousarray(logits, "<f4").data)
        answers.flush()


def main(arguments: list[str]) -> None:
    action, *rest = arguments
    if action == "serve":
        target, path, threads = rest
        # Libraries print: what they write to stdout goes to stderr, and only answers go to the pipe.
        answers = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        serve(target, Path(path), int(threads) if threads else None, sys.stdin.buffer, answers)
        return
    folder = Path(rest[0])
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    try:
        answer = reply({"convert": convert, "inspect": inspect}[action](folder, request))
    except Exception as error:
        answer = failure(error)
    (folder / "reply.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
