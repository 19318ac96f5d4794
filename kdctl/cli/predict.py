"""`kdctl predict`: labels and probabilities for image files, arrays and texts, by a run's student or an artefact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from kdctl import runs
from kdctl.cli import console
from kdctl.cli.verb import Argument, Option, Options, Reply, check_device, check_no_device
from kdctl.errors import KdctlError, MissingError, Problem, UsageError

_SHOWN = 200
"""So many rows are shown to people; -o and --json have all."""
_NUMBERS = 6
"""So many numbers of an embedding."""


def predict(
    options: Options,
    what: Annotated[
        list[str] | None, Argument(metavar="RUN", help="a run or an artefact, else latest; then further files")
    ] = None,
    files: Annotated[
        list[str] | None,
        Option("--input", metavar="FILE", help="images, .npy or .npz arrays, folders of them; texts, one a line"),
    ] = None,
    top: Annotated[int, Option("--top", min=1, help="how many classes are told of each")] = 3,
    output: Annotated[str | None, Option("-o", "--output", metavar="FILE", help="Write all as JSONL here.")] = None,
    device: Annotated[str | None, Option("--device", help="Where a run's student computes; cpu when left out.")] = None,
) -> Reply:
    """Labels and probabilities for images, arrays and texts, by a run's student or an artefact in its own runtime.

    Needs neither the data nor the teacher. Files may follow --input, as in `kdctl predict RUN --input photos/*.png`.
    Arrays are uint8, or floating point in [0, 1]: (N, H, W), (N, H, W, C) or (N, C, H, W). A model of texts takes
    text files, one text a line, two of a pair with a tab between. What cannot be read is told at the end, with exit
    code 1; the others are predicted all the same.
    """
    if device is not None:
        check_device(device)
    place, more = _sorted_words(what or [])
    places = [*(files or []), *more]
    if not places:
        raise UsageError("no file to predict", hint="name some after --input: images, arrays, folders, text files")
    artefact = Path(place) if place and (Path(place) / "manifest.json").is_file() else None
    if artefact:
        check_no_device(device)
    run = None if artefact else runs.find(place)
    console.say("loading torch ...")
    from kdctl import predict as predicting

    if artefact is not None:
        predictor = predicting.open_artefact(artefact)
    else:
        assert run is not None
        predictor = predicting.open_student(run, _device(device))
    console.detail(f"{artefact or run} takes {tuple(predictor.image_shape)} in {predictor.runtime}")
    home = run if artefact is None else _run_of(artefact)
    folder = artefact if run is None else run.path
    head = {"run": home and str(home), "artefact": artefact and str(artefact), "runtime": predictor.runtime}
    document = head | predicting.predict_files(predictor, places, top, console.bar, folder) | {"written": output}
    if output is not None:
        lines = [*document["predictions"], *document["failed"]]
        runs.write_text(Path(output), "".join(json.dumps(line) + "\n" for line in lines))
    problems = [Problem(f["message"], file=f["input"], hint=f["hint"]) for f in document["failed"]]
    return Reply(document, show, KdctlError(*problems) if problems else None)


def _sorted_words(words: list[str]) -> tuple[str | None, list[str]]:
    """The run or artefact among the words, and the files: a shell puts all that `--input *.png` stands for there."""
    places: list[str] = []
    files: list[str] = []
    for word in words:
        path = Path(word)
        a_file = path.is_file() or ((path.is_dir() or path.suffix) and not _is_source(word))
        (files if a_file else places).append(word)
    if len(places) > 1:
        raise UsageError(f"'{places[1]}' is no file, and one run is enough: '{places[0]}'")
    return (places[0] if places else None), files


def _is_source(word: str) -> bool:
    """Whether a folder is a run, the runs of a name, or an artefact."""
    if (Path(word) / "manifest.json").is_file():
        return True
    try:
        return bool(runs.find(word))
    except MissingError:
        return False


def _run_of(artefact: Path) -> runs.Run | None:
    home = artefact.resolve().parent.parent
    return runs.Run(home) if runs.is_run(home) else None


def _device(name: str | None) -> str:
    if name is None:
        return "cpu"
    from kdctl.device import choose_device

    return str(choose_device(name))


def show(document: dict[str, Any]) -> None:
    """A row an input: the class, its probability in percent, and the next ones; or what else the model says of it."""
    said = document["predictions"][:_SHOWN]
    head, rows = _table(said)
    if rows:
        console.print_table(head, rows)
    left = document["samples"] - len(rows)
    if left:
        console.out(f"and {left:,} more, which -o FILE or --json has")
    if document["written"]:
        console.out(f"wrote {document['written']}")


def _table(said: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows for predictions of one kind."""
    if said and "value" in said[0]:
        return ["input", "value"], [[row["input"], f"{row['value']:.4f}"] for row in said]
    if said and "embedding" in said[0]:
        rows = [[row["input"], str(len(row["embedding"])), _begun(row["embedding"])] for row in said]
        return ["input", "numbers", "the first ones"], rows
    if said and "words" in said[0]:
        texts = [" ".join(f"{word['word']}/{word['label'] or '-'}" for word in row["words"]) for row in said]
        return ["input", "words"], [[row["input"], text] for row, text in zip(said, texts, strict=True)]
    if said and "labels" in said[0]:
        rest = [[one for one in row["top"] if one not in row["labels"]] for row in said]
        rows = [[row["input"], _told(row["labels"]) or "-", _told(more)] for row, more in zip(said, rest, strict=True)]
        return ["input", "labels, %", "below one half"], rows
    rows = [
        [row["input"], row["label"], f"{100 * row['probability']:.2f}", _told(row["top"][1:])] for row in said
    ]  # fmt: skip
    columns = 3 + any(row[3] for row in rows)
    return ["input", "label", "%", "then"][:columns], [row[:columns] for row in rows]


def _begun(embedding: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in embedding[:_NUMBERS]) + (" ..." if len(embedding) > _NUMBERS else "")


def _told(classes: list[dict[str, Any]]) -> str:
    return ", ".join(f"{one['label']} {100 * one['probability']:.2f}" for one in classes)
