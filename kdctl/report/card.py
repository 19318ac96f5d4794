"""The model card of a run: README.md beside the weights: what they are, how to load them, what is known of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from kdctl import runs
from kdctl.report import numbers as n
from kdctl.report.claims import Side, about, label, sides
from kdctl.report.facts import STUDENT, Document, Facts, collect
from kdctl.report.numbers import unit_of
from kdctl.report.origin import command_text, not_shown
from kdctl.runs import Run

FILE = "README.md"
_LISTED_CLASSES = 20
_MADE = {
    "token-classification": "A tagger of the words",
    "sentence-similarity": "An encoder",
    "text-regression": "A regression",
    "image-regression": "A regression",
}


def write_card(run: Run) -> str:
    """Writes the card of a run that has a measured student, and returns where. It reads the run's files alone."""
    path = run / FILE
    runs.write_text(path, card(collect([run], keep=True)))
    return str(path)


def card(facts: Facts) -> str:
    """The card as Markdown."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kdctl", "report"), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    lead = facts.lead
    record: Document = lead.read("student.json") or {}
    data = (lead.provenance.get("data") or {}).get("kind") or _data_kind(lead.config_text)
    text = environment.get_template("card.md.j2").render(
        name=escaped(lead.info.get("name") or lead.run.path.name),
        what=_what(facts, record),
        claim=_claim(facts),
        numbers=_table(facts),
        shape=", ".join(str(size) for size in record.get("image_shape") or [_length(record)]),
        texts=bool(record.get("tokens")),
        pad=(record.get("tokens") or {}).get("pad"),
        kinds=_kind_of_input(record),
        task=_task(record),
        answers=_answers(record),
        choice=_choice(record),
        classes=_classes(record.get("class_names") or []),
        data=f"`{data}`",
        limits=[str(line) for line in not_shown(facts)],
        origin=_origin(facts),
        taught=lead.taught,
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def _kind_of_input(record: Document) -> str:
    return "text" if record.get("tokens") else "image"


def _task(record: Document) -> str:
    """The task as model hubs tag it."""
    if record.get("head") == "token":
        return "token-classification"
    if record.get("head") == "embedding":
        return "sentence-similarity"
    kind = _kind_of_input(record)
    return f"{kind}-{'regression' if record.get('link') == 'identity' else 'classification'}"


def _answers(record: Document) -> tuple[str, str]:
    """The name of what the model's logits become in Python, and what makes it of them."""
    if record.get("head") in ("token", "vocabulary"):
        return "probabilities", ".softmax(dim=2)"
    if record.get("head") == "embedding":
        return "embeddings", ""
    made = {"sigmoid": ("probabilities", ".sigmoid()"), "identity": ("numbers", "[:, 0]")}
    return made.get(str(record.get("link")), ("probabilities", ".softmax(dim=1)"))


def _choice(record: Document) -> str:
    """What the model does with an input that is unlike those it has seen."""
    if record.get("head") == "embedding":
        return "it gives a vector, also for what is unlike all that it has seen"
    if record.get("link") == "identity":
        return "it gives a number, also for what its question makes no sense of"
    if record.get("link") == "sigmoid":
        return "it says of each of its classes whether it is there, and knows no others"
    what = "a class for each word" if record.get("head") == "token" else "one of its classes"
    return f"it always chooses {what}, also for one of none of them"


def _length(record: Document) -> int:
    """Of an example's text."""
    return min(8, (record.get("tokens") or {}).get("length", 8))


def escaped(text: object) -> str:
    """Text in which Markdown and HTML see no signs of their own, on one line."""
    one_line = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", one_line)


def _data_kind(config: str) -> str:
    found = re.search(r"^data:\n(?:  .*\n)*?  kind: (.+)$", config, re.MULTILINE)
    return found.group(1) if found else "unknown"


def _what(facts: Facts, record: Document) -> str:
    lead = facts.lead
    student, teacher = lead.summary.get("student") or {}, lead.summary.get("teacher") or {}
    kind = record.get("kind") or student.get("kind") or "model"
    text = f"{_MADE.get(_task(record), 'A classifier')} of {_kind_of_input(record)}s, `{kind}`"
    if n.is_number(student.get("parameters")):
        text += f" with {student['parameters']:,} parameters"
    if teacher:
        text += f", distilled with kdctl from `{teacher.get('kind')}`"
        text += f" with {teacher['parameters']:,} parameters." if n.is_number(teacher.get("parameters")) else "."
    elif lead.taught:
        text += ", distilled with kdctl; its last stage had no teacher."
    else:
        text += ", trained with kdctl without a teacher."
    if lead.name != STUDENT:
        text += f" It is a control of an experiment, {label(lead.name)}: made to be compared with, not to be used."
    return text


def _claim(facts: Facts) -> str:
    """What the group shows; of a run alone, that it shows nothing about its teacher."""
    texts: Sequence[str] = facts.result.get("statements") or list(filter(None, [facts.result.get("verdict")]))
    if texts:
        lines = "\n".join(f"- {escaped(text)}" for text in [about(facts) + texts[0], *texts[1:]])
        return f"What the runs of its group show:\n\n{lines}"
    if facts.unfinished:
        return "Its group of runs is not finished: nothing is shown yet."
    if not facts.lead.taught:
        return "One run: what another seed would give is not known."
    return "One run, no control: nothing is shown about the teacher's help. `--with-baseline --seeds 5` shows it."


def _table(facts: Facts) -> str:
    """Student, control, teacher and artefacts, each metric with its interval over seeds where there is one."""
    models = sides(facts)
    if not models:
        return "Nothing is measured yet."
    metrics = list(models[0].metrics)
    head = ["model", *map(unit_of, metrics), "parameters", "bytes"]
    rows = [
        [escaped(label(side.name)), *(_number(side, metric) for metric in metrics),
         _plain(side.cost.get("parameters"), n.count_text), _plain(side.cost.get("bytes"), n.count_text)]
        for side in models
    ]  # fmt: skip
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    seeds = max((i.get("n", 1) for side in models for i in side.intervals.values()), default=1)
    words = f"On the {facts.lead.split} split"
    if facts.lead.evaluation.get("samples"):
        words += f" ({facts.lead.evaluation['samples']:,} samples)"
    words += f"; mean of {seeds} seeds with its 95 % interval, artefacts and teacher of one seed" if seeds > 1 else ""
    return words + ":\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(side: Side, metric: str) -> str:
    known, text = side.intervals.get(metric), n.text_of(metric)
    if known is None:
        return _plain(side.metrics.get(metric), text)
    ends = known.get("ci95")
    return text(known["mean"]) + (f" [{text(ends[0])}, {text(ends[1])}]" if ends else "")


def _plain(value: Any, text: Any) -> str:
    return text(value) if n.is_number(value) else "-"


def _classes(names: Sequence[str]) -> str:
    listed = ", ".join(escaped(name) for name in names[:_LISTED_CLASSES])
    more = len(names) - _LISTED_CLASSES
    return f" They are: {listed}{f' and {more} more' if more > 0 else ''}." if names else ""


def _origin(facts: Facts) -> str:
    lead = facts.lead
    packages = lead.environment.get("packages") or {}
    versions = [f"kdctl {lead.environment.get('kdctl', '-')}", f"Python {lead.environment.get('python', '-')}"]
    versions += [f"{name} {packages[name]}" for name in ("torch", "torchvision") if name in packages]
    command = command_text(lead.provenance.get("command") or lead.info.get("command"))
    lines = [
        f"- Command: {code(command)}" if command else "",
        f"- Seed: {lead.seed}; begun {str(lead.info['created'])[:10]}; {', '.join(versions)}",
    ]
    fingerprint = (lead.provenance.get("data") or {}).get("fingerprint")
    lines.append(f"- Data, fingerprint: `{fingerprint}`" if fingerprint else "")
    for teacher in lead.provenance.get("teachers") or []:
        lines.append(f"- Teacher: `{teacher.get('kind')}`, SHA-256 `{teacher.get('sha256') or 'unknown'}`")
    student = lead.provenance.get("student") or {}
    lines.append(f"- Weights, SHA-256: `{student['sha256']}`" if student.get("sha256") else "")
    return "\n".join(filter(None, lines))


def code(text: str) -> str:
    """Text as inline code, whatever backticks it holds."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"
