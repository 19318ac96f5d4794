"""The questions of `kdctl init -i`, each checked as it is answered, and the experiment file that the answers make."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import typer

from kdctl import registry, runs
from kdctl.errors import ConfigError, KdctlError, UsageError, did_you_mean

_DISTILL = "distill"
_PRETRAINED = "pretrained"
_MODELS = {
    "digits": ("digits_cnn", "digits_cnn"),
    "mnist": ("lenet5", "lenet5"),
    "fashion_mnist": ("lenet5", "lenet5"),
    "cifar10": ("resnet56", "resnet20"),
    "cifar100": ("resnet56", "resnet20"),
    "image_folder": ("torchvision:resnet50", "torchvision:mobilenet_v3_small"),
    "npz": ("resnet56", "resnet20"),
}
"""By the kind of data a teacher and a student to suggest."""
_WIDTHS = {"digits_cnn": (32, 8), "lenet5": (2, 1)}
"""Of kinds suggested as both: the argument `width` of teacher and student."""
_PLACES = ("root", "path", "weights")
_PLAIN = re.compile(r"[A-Za-z_./][\w./-]*")
_WORDS = {"true", "false", "null", "yes", "no", "on", "off", "none"}
_BATCH_SIZE = 128
Answer = Callable[[str], Any]
"""The value of an answer; raises KdctlError where it is none."""


def interview(target: Path) -> str:
    """Asks on the terminal and returns the text of an experiment file that `kdctl check` accepts.

    target: where the file is to stand, for relative paths are read against it. Raises UsageError where there is no
    terminal, typer.Abort where the answers end.
    """
    if not sys.stdin.isatty():
        hint = "without -i `kdctl init TEMPLATE` copies a template; `kdctl list templates` shows them"
        raise UsageError("-i asks questions, and the standard input is no terminal", hint=hint)
    with redirect_stdout(sys.stderr):
        _tell("An experiment file in a few questions; Enter takes what stands in brackets, Ctrl-C leaves.")
        answers = _questions(target.resolve().parent)
    return render(answers, target.name)


def _questions(home: Path) -> dict[str, Any]:
    data, folder = _data(home)
    suggested = _MODELS.get(data["kind"], ("resnet56", "resnet20"))
    teacher = _teacher(suggested[0], home)
    student = _model("student", suggested[1])
    for spec, width in zip((teacher, student), _WIDTHS.get(student["kind"], ()), strict=False):
        if spec is not None and spec["kind"] == student["kind"] and "weights" not in spec and "width" not in spec:
            spec["width"] = width
    answers: dict[str, Any] = {"data": data, "teacher": teacher, "student": student, "folder": folder}
    answers |= _method() if teacher is not None else {}
    answers["epochs"] = _ask("epochs of the student", "30", _whole)
    answers["int8"] = _ask("quantize the student to int8 as well, yes or no", "no", _yes)
    while True:
        problems = _problems(answers, home)
        if not problems:
            return answers
        for problem in problems:
            _tell(f"  {problem}")
        if teacher is None:
            raise ConfigError(*problems)  # nothing that was asked can mend it
        _tell("  choose another method")
        answers |= _method()


def _problems(answers: dict[str, Any], home: Path) -> list[str]:
    """What `kdctl check` says to the answers; files that are named have been looked for already."""
    from kdctl.config.expand import load_experiment

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "experiment.yaml")
        file.write_text(render(_absolute(answers, home), file.name), encoding="utf-8")
        try:
            load_experiment(file, require_files=False)
        except KdctlError as error:
            return [f"{p.key}: {p.message}" if p.key else p.message for p in error.problems]
    return []


def _absolute(value: Any, home: Path) -> Any:
    if isinstance(value, dict):
        return {
            key: str(home / item) if key in _PLACES and item != _PRETRAINED else _absolute(item, home)
            for key, item in value.items()
        }
    return value


# ----------------------------------------------------------------------------------------------------------- questions


def _data(home: Path) -> tuple[dict[str, Any], str | None]:
    """The `data:` section, and which of its keys is the place."""
    kind = _ask("data", "digits", lambda text: _component("data", text), "`kdctl list data` shows all")
    arguments = registry.signature(registry.find("data", kind)).arguments
    place = next((name for name in ("root", "path") if name in arguments), None)
    data: dict[str, Any] = {"kind": kind}
    if place is not None:
        default = arguments[place].default if arguments[place].has_default else None
        data[place] = _ask(f"{place} of the data", default, lambda text: _data_place(text, home))
    return data | _required("data", kind, data), place


def _data_place(text: str, home: Path) -> str:
    path = Path(text).expanduser()
    if not path.exists() and not _ask(f"{path} is not there yet; keep it, yes or no", "no", _yes):
        raise UsageError(f"there is nothing at {path}")
    return _relative(path, home)


def _teacher(suggested: str, home: Path) -> dict[str, Any] | None:
    """The teacher: weights that are there, one to be trained first, or none."""
    said = (
        "teacher: a weights file, a run, `pretrained` (of torchvision or timm), `train` to train one first, or `none`"
    )
    place = _ask(said, "train", lambda text: text if text in ("train", "none") else _weights(text, home))
    if place == "none":
        return None
    if place == "train":
        epochs = ("epochs of the teacher", "30", _whole)
        return _model("teacher", suggested) | {"train": {"epochs": _ask(*epochs)}}
    kind = _recorded_kind(home / place)
    spec = {"kind": kind} if kind else _model("teacher", suggested)
    return spec | {"weights": place}


def _weights(text: str, home: Path) -> str:
    if text == _PRETRAINED:
        return text
    path = Path(text).expanduser()
    if not path.exists() and not path.with_name(path.name + ".safetensors").exists():
        hint = did_you_mean(text, ["train", "none"])
        raise UsageError(f"there is no weights file and no run at {path}", hint=hint)
    return _relative(path, home)


def _recorded_kind(path: Path) -> str | None:
    """The kind of weights that kdctl wrote, from the record beside them; None of foreign ones."""
    record = path / "student.json" if path.is_dir() else path.with_suffix(".json")
    try:
        kind = runs.read_json(record).get("kind")
    except (KdctlError, AttributeError, OSError):
        return None
    return None if not isinstance(kind, str) or registry.is_file_kind(kind) else kind


def _model(who: str, suggested: str) -> dict[str, Any]:
    hint = "`kdctl list models` shows all"
    kind = _ask(f"{who} model", suggested, lambda text: _component("models", text), hint)
    return {"kind": kind} | _required("models", kind, {})


def _method() -> dict[str, Any]:
    """`distill:` with its temperature and share, or a loss of the catalogue beside cross entropy."""
    said = f"method: `{_DISTILL}`, or a loss as attention_transfer"
    kind = _ask(said, _DISTILL, _loss, "`kdctl list losses` shows all, `kdctl explain LOSS` one")
    if kind == _DISTILL:
        heat = _ask("temperature T", "4", lambda text: _number(text, 0.0, None))
        alpha = _ask("alpha, the teacher's share in the loss, 0 to 1", "0.9", lambda text: _number(text, 0.0, 1.0))
        return {"distill": {"T": heat, "alpha": alpha}, "loss": None}
    attributes = registry.signature(registry.find("losses", kind)).attributes
    loss: dict[str, Any] = {"kind": kind, "weight": _ask("weight of the loss", "1", lambda t: _number(t, 0.0, None))}
    if attributes.get("needs_taps"):
        said = "taps: module paths that both models have, with commas"
        loss["taps"] = _ask(said, "layer1, layer2, layer3", _paths, "`kdctl check --deep FILE` shows what there is")
    return {"distill": None, "loss": loss | _required("losses", kind, loss)}


def _tell(text: str) -> None:
    """A line for the person who answers; also under --quiet."""
    print(text, file=sys.stderr)


def _required(group: str, kind: str, given: dict[str, Any]) -> dict[str, Any]:
    """Answers for the arguments of a component that have no default."""
    from kdctl.config.arguments import check_arguments
    from kdctl.config.yaml_io import read_value

    component = registry.find(group, kind)
    found: dict[str, Any] = {}
    for name, parameter in registry.signature(component).arguments.items():
        if not parameter.required or name in given:
            continue

        def value(text: str, name: str = name) -> Any:
            checked = check_arguments(component, {name: read_value(text, name)[0]})
            wrong = [message for place, message, _ in checked.problems if place[:1] == (name,)]
            if wrong:
                raise UsageError(wrong[0])
            return checked.values[name]

        found[name] = _ask(f"{name} of {kind} ({parameter.annotation})", None, value)
    return found


def _ask(question: str, default: str | None, answer: Answer, help_text: str | None = None) -> Any:
    """Asks until the answer is one; `?` tells more."""
    suffix = f" [{default}]" if default is not None else ""
    while True:
        try:
            text = input(f"{question}{suffix}: ").strip()
        except EOFError:
            _tell("")
            raise typer.Abort from None
        if text == "?" and help_text:
            _tell(f"  {help_text}")
            continue
        if not text and default is None:
            _tell("  an answer is needed")
            continue
        try:
            return answer(text or str(default))
        except KdctlError as error:
            for problem in error.problems:
                _tell(f"  {problem.message}" + (f" ({problem.hint})" if problem.hint else ""))


# ------------------------------------------------------------------------------------------------------------- answers


def _component(group: str, text: str) -> str:
    if registry.is_file_kind(text):
        raise UsageError("a class of your own is named in the file afterwards", hint="take a built-in one for now")
    return registry.canonical(group, registry.find(group, text).name)


def _loss(text: str) -> str:
    if text == _DISTILL:
        return text
    kind = _component("losses", text)
    if registry.signature(registry.find("losses", kind)).attributes.get("needs_teacher") is False:
        raise UsageError(f"'{kind}' needs no teacher, and cross entropy is there already", hint="choose another")
    return kind


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"a whole number of 1 or more is needed, not '{text}'")
    return int(text)


def _number(text: str, low: float, high: float | None) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if high is None and not (low < value < float("inf")):
        raise UsageError(f"a number above {low:g} is needed, not '{text}'")
    if high is not None and not (low <= value <= high):
        raise UsageError(f"a number from {low:g} to {high:g} is needed, not '{text}'")
    return value


def _yes(text: str) -> bool:
    if text.lower() not in ("y", "yes", "n", "no"):
        raise UsageError(f"yes or no is needed, not '{text}'")
    return text.lower().startswith("y")


def _paths(text: str) -> list[str]:
    paths = [part.strip() for part in text.split(",") if part.strip()]
    if not paths or any(" " in path for path in paths):
        raise UsageError(f"module paths with commas between them are needed, not '{text}'")
    return paths


def _relative(path: Path, home: Path) -> str:
    """A path as the file is to say it: relative ones are read against the file."""
    return str(path) if path.is_absolute() else Path(os.path.relpath(path, home)).as_posix()


# ------------------------------------------------------------------------------------------------------------ the file


def render(answers: dict[str, Any], name: str) -> str:
    """The experiment file of the answers, with comments."""
    data, teacher, student = answers["data"], answers["teacher"], answers["student"]
    told = f"{teacher['kind']} teaches {student['kind']}" if teacher else f"{student['kind']} learns alone"
    control = " --with-baseline" if teacher else ""
    lines = [
        f"# {told} on {data['kind']}.",
        "#",
        f"#   kdctl check {name}",
        f"#   kdctl train {name}{control} --seeds 3",
        "#",
        "# Written by `kdctl init -i`. `kdctl explain KEY` tells of one, `kdctl list losses` what may stand in it.",
        "",
        "data:",
        *_section(data),
        f"  batch_size: {_BATCH_SIZE}",
        "  val_fraction: 0.1             # the best checkpoint is picked here, never on the test split",
        "  # augment: [{kind: random_crop, padding: 4}, {kind: horizontal_flip}]",
    ]
    if teacher is not None:
        untold = "  # trained first, once for all seeds" if "train" in teacher else ""
        lines += [f"teacher:{untold}", *_section(teacher)]
    lines += ["student:", *_section(student), *_terms(answers)]
    lines += [
        "# optimizer: {kind: sgd, lr: 0.05, momentum: 0.9, weight_decay: 5e-4, nesterov: true}   # the default",
        f"train: {{epochs: {answers['epochs']}, seed: 0}}",
    ]
    if answers["int8"]:
        lines.append("compress: [{kind: quantize, dtype: int8}]   # a file of ONNX Runtime under artefacts/int8")
    return "\n".join(lines) + "\n"


def _terms(answers: dict[str, Any]) -> list[str]:
    if answers.get("distill"):
        share = answers["distill"]
        why = "ce x (1 - alpha) + kd x alpha: alpha is the teacher's share"
        return [f"distill: {{T: {share['T']:g}, alpha: {share['alpha']:g}}}   # {why}"]
    if answers.get("loss"):
        return ["losses:", "  - {kind: ce, weight: 1.0}", f"  - {_flow(answers['loss'])}"]
    return []


def _section(values: dict[str, Any]) -> list[str]:
    return [f"  {key}: {_flow(value)}" for key, value in values.items()]


def _flow(value: Any) -> str:
    """A value on one line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)
