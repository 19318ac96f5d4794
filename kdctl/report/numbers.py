"""Numbers as the report shows them: rounded for people, whole for machines, and never without where they stem from.

Every number of a page is an HTML element `<data value="97.86666666666667">97.87</data>`, whose value is the number in
the run directory. One that is worked out from two or more of those says how, in `data-from`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

from markupsafe import Markup

Number = int | float

NONE = Markup('<span class="none" title="no number">–</span>')
"""What stands where there is no number."""

FRACTIONS = {"nll", "bce", "brier", "kl", "js", "temperature", "loss", "mse", "perplexity"}
"""Metrics that are no percentages: they are written with four places."""

UNITS = {
    "top1": "top-1, %", "top5": "top-5, %", "ece": "ECE, %", "nll": "NLL, nats", "map": "mAP, %",
    "macro_f1": "macro F1, %", "micro_f1": "micro F1, %", "bce": "BCE, nats", "spearman": "Spearman, %",
    "pearson": "Pearson, %", "nearest": "nearest of its class, %", "mse": "MSE",
}  # fmt: skip
"""How metrics are called on the page; one that is not listed by its own name."""


def said(text: object) -> Markup:
    """Text that stands in a file of the run, word for word."""
    return Markup('<span class="said">{}</span>').format(text)


def shown(value: Number | None, text: Callable[[Any], str], source: str | None = None) -> Markup:
    """A number with the text that people read; source is how it was worked out, where it is in no file itself."""
    if not is_number(value):
        return NONE
    origin = Markup(' data-from="{0}" title="{0}"').format(source) if source else ""
    return Markup('<data value="{}"{}>{}</data>').format(repr(value), origin, text(value))


def is_number(value: object) -> TypeGuard[Number]:
    """Whether a value of a JSON document is a number that can be shown."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def name(value: Number | None) -> Markup:
    """A number that is a name, such as a seed: without marks between its digits."""
    return shown(value, str)


# ----------------------------------------------------------------------------------------------------- texts of numbers


def two_places(value: Number) -> str:
    return f"{value:,.2f}"


def four_places(value: Number) -> str:
    return f"{value:,.4f}"


def signed_text(value: Number) -> str:
    return f"{value:+,.2f}"


def signed_fraction_text(value: Number) -> str:
    return f"{value:+,.4f}"


def count_text(value: Number) -> str:
    return f"{value:,.0f}"


def bytes_text(value: Number) -> str:
    return _scaled(value, [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")], "bytes")


def large_text(value: Number) -> str:
    return _scaled(value, [(1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")], "")


def millis_text(value: Number) -> str:
    return f"{value:,.3f} ms" if abs(value) < 10 else f"{value:,.1f} ms"


def seconds_text(value: Number) -> str:
    return _scaled(value, [(86400, "d"), (3600, "h"), (120, "min")], "s", {"min": 60})


def p_text(value: Number) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def text_of(metric: str) -> Callable[[Number], str]:
    """How a metric is written: fractions with four places, percentages with two."""
    return four_places if metric.split("_")[0] in FRACTIONS else two_places


def unit_of(metric: str) -> str:
    return UNITS.get(metric, metric)


def agreement_text(value: Number, metrics: Iterable[str]) -> str:
    """How far two models agree, as the task that has these metrics measures it (tasks.base.Task.agreement)."""
    return f"{value:.2f} %" if "spearman" not in metrics else f"{value:.2f} (Spearman's correlation x 100)"


def _scaled(value: Number, steps: list[tuple[float, str]], unit: str, divisors: dict[str, float] | None = None) -> str:
    """The value in the largest unit that it reaches. divisors: of units that are used only from a larger size on."""
    for least, name in steps:
        if abs(value) >= least:
            return f"{value / (divisors or {}).get(name, least):,.1f} {name}"
    places = ",.0f" if isinstance(value, int) or float(value).is_integer() else ",.1f"
    return f"{value:{places}} {unit}".strip()


# ------------------------------------------------------------------------------------------------------ whole elements


def metric(name: str, value: Number | None) -> Markup:
    return shown(value, text_of(name))


def percent(value: Number | None) -> Markup:
    return shown(value, two_places)


def count(value: Number | None) -> Markup:
    return shown(value, count_text)


def difference(name: str, a: Number | None, b: Number | None) -> Markup:
    """a - b, both of which are in files, with its sign."""
    if not (is_number(a) and is_number(b)):
        return NONE
    text = signed_fraction_text if text_of(name) is four_places else signed_text
    return shown(a - b, text, f"{a!r} - {b!r}")


def ratio(a: Number | None, b: Number | None) -> Markup:
    """a / b as "x 3.2", both of which are in files."""
    if not (is_number(a) and is_number(b) and b):
        return NONE
    return shown(a / b, lambda v: f"{v:,.1f} x" if v < 10 else f"{v:,.0f} x", f"{a!r} / {b!r}")


def total(values: Iterable[Number], text: Callable[[Number], str], what: str) -> Markup:
    """A sum over lines of a file, which `what` names (see the test that adds them up again)."""
    return shown(math.fsum(values), text, f"sum of {what}")


def interval(name: str, value: dict[str, Any] | None, signed: bool = False) -> Markup:
    """Mean and 95 % interval of a document's {"mean", "ci95"}: 97.87 [96.72, 99.01]."""
    if not value:
        return NONE
    text = text_of(name)
    if signed:
        text = signed_fraction_text if text is four_places else signed_text
    mean = shown(value.get("mean"), text)
    ends = value.get("ci95")
    if not ends:
        return mean
    bounds = Markup("{}, {}").format(shown(ends[0], text), shown(ends[1], text))
    return Markup('{} <span class="ci">[{}]</span>').format(mean, bounds)
