"""Progress of training, always on stderr: one live line on a terminal, one plain line an epoch elsewhere.

The live line is drawn by hand: it is what fits the terminal, part by part, and costs no import.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from kdctl.cli import console
from kdctl.watch import Epoch, Reading, Reporter

_PAUSE_S = 0.1
"""Least seconds between two drawings of the live line."""
_BAR = (8, 30)
"""Least and most characters of the bar."""
_GAP = "  "
_BESIDE = ("top1", "nll", "bce", "mse")
"""Metrics that an epoch shows beside the task's first one."""
_LAYOUTS = [
    ("epoch", "done", "loss", "terms", "lr", "rate", "left"),
    ("epoch", "done", "terms", "lr", "rate", "left"),
    ("epoch", "done", "terms", "rate", "left"),
    ("epoch", "done", "terms", "left"),
    ("epoch", "done", "loss", "lr", "rate", "left"),
    ("epoch", "done", "loss", "rate", "left"),
    ("epoch", "done", "loss", "left"),
    ("epoch", "done", "left"),
    ("epoch", "done"),
]
"""What the live line shows, from the widest terminal to the narrowest; `left`: for the epoch, and for the stage."""
Part = tuple[int, str]
"""How much a part of a line is wanted, 0 most, and its text."""


class TextReporter(Reporter):
    """Says what happens, in lines that fit logs; on a terminal a live line shows the running epoch.

    The live line has the losses of every term, learning rate, samples a second, and the time left for the epoch and for
    the stage; what a narrow terminal has no room for is left out. It is drawn at most ten times a second, and reads
    what the device has summed no oftener than that.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.live = not quiet and console.is_live(sys.stderr)
        self._epoch: Epoch | None = None
        self._reading: Reading | None = None
        self._read_at = self._drawn_at = self._began = 0.0
        self._steps_before = self._steps = 0
        self._spent: dict[str, list[float]] = {}

    def say(self, text: str) -> None:
        if not self.quiet:
            console.say(text)

    def begin(self, epoch: Epoch) -> None:
        self._epoch, self._reading = epoch, None
        self._began = time.monotonic()
        self._steps_before = self._steps = 0

    def step(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
        if not self.live or self._epoch is None:
            return
        if not self._steps:
            self._steps_before = step - 1
        self._steps = step
        now = time.monotonic()
        if now - self._drawn_at >= _PAUSE_S or step == steps:
            self._draw(now)

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        console.clear()
        spent = self._spent.setdefault(line["stage"], [])
        spent.append(line["seconds"] + line["eval_seconds"])
        if self.quiet:
            return
        left = (epochs - line["epoch"]) * sum(spent) / len(spent)
        parts = _epoch_parts(line, epochs, left)
        text = _fitted(parts, console.width(sys.stderr) - 1) if self.live else _GAP.join(text for _, text in parts)
        print(text, file=sys.stderr, flush=True)

    # -------------------------------------------------------------------------------------------------- the live line

    def _draw(self, now: float) -> None:
        """Replaces the live line by one of this moment."""
        assert self._epoch is not None
        if self._reading is None or now - self._read_at >= max(_PAUSE_S, self._epoch.pause):
            self._reading = self._epoch.read()
            self._read_at = now = time.monotonic()
        text = live_line(
            self._epoch, self._steps, self._reading, *self._left(now),
            width=console.width(sys.stderr) - 1, unicode=console.is_utf8(sys.stderr),
        )  # fmt: skip
        console.draw(text)
        self._drawn_at = now

    def _left(self, now: float) -> tuple[float, float]:
        """Seconds left for the epoch's steps, and for the stage with its evaluations."""
        epoch = self._epoch
        assert epoch is not None
        a_step = (now - self._began) / max(self._steps - self._steps_before, 1)
        rest = (epoch.steps - self._steps) * a_step
        spent = self._spent.get(epoch.stage)
        whole = sum(spent) / len(spent) if spent else epoch.steps * a_step
        return rest, rest + (epoch.epochs - epoch.epoch - 1) * whole


def live_line(
    epoch: Epoch, steps: int, reading: Reading, epoch_left: float, stage_left: float, width: int, unicode: bool = True
) -> str:
    """One line of at most `width` columns: the first layout that fits, with a bar where there is room for one."""
    done = steps / max(epoch.steps, 1)
    texts = {
        "epoch": f"{epoch.stage} {epoch.epoch + 1}/{epoch.epochs}",
        "done": f"{100 * done:.0f} %",
        "loss": f"loss {reading.loss:.4f}",
        "terms": _GAP.join(f"{name} {value:.4f}" for name, value in reading.terms.items()),
        "lr": f"lr {reading.lr:.2g}",
        "rate": f"{reading.samples_per_second:,.0f}/s",
        "left": f"left {duration(epoch_left)} / {duration(stage_left)}",
    }
    for layout in _LAYOUTS:
        parts = [texts[name] for name in layout if texts[name]]
        room = width - console.columns(_GAP.join(parts))
        if room >= 0:
            if room >= _BAR[0] + len(_GAP):
                parts.insert(1, _bar(done, min(room - len(_GAP), _BAR[1]), unicode))
            return _GAP.join(parts)
    return console.cut(texts["epoch"], width)


def _bar(done: float, size: int, unicode: bool) -> str:
    full = round(min(max(done, 0.0), 1.0) * size)
    return ("█" * full + "░" * (size - full)) if unicode else ("#" * full + "." * (size - full))


def _epoch_parts(line: Mapping[str, Any], epochs: int, left: float) -> list[Part]:
    """The line of a finished epoch: the same on a terminal and in a log, but for what has no room."""
    shares = line["gradient_shares"]
    terms = []
    for name, value in line["terms"].items():
        share = f" [{100 * shares[name]:.0f} %]" if name in shares else ""
        terms.append(f"{name} {value:.4f}{share}")
    first = next(iter(line["val"]), None)
    val = " ".join(f"{name} {value:.2f}" for name, value in line["val"].items() if name in (first, *_BESIDE))
    parts = [
        (0, f"{line['stage']} {line['epoch']:>3}/{epochs}"),
        (1, f"loss {line['loss']:.4f}"),
        (4, f"({' '.join(terms)})"),
        (6, f"lr {line['lr']:.5f}"),
        (2, f"val {val}{' *' if line['best'] else ''}" if val else ""),
        (5, f"{line['samples_per_second']:.0f}/s"),
        (3, f"left {duration(left)}" if line["epoch"] < epochs else ""),
    ]
    return [part for part in parts if part[1]]


def _fitted(parts: Sequence[Part], width: int) -> str:
    """The parts that there is room for, in their order: the most wanted first, cut where even that is too long."""
    kept: list[Part] = []
    for part in sorted(parts):
        if not kept or console.columns(_GAP.join(text for _, text in (*kept, part))) <= width:
            kept.append(part)
    return console.cut(_GAP.join(text for wanted, text in parts if (wanted, text) in kept), width)


def duration(seconds: float) -> str:
    """A time for people: 0:07, 12:30, 3:05:00, 2 d 4 h."""
    whole = max(0, round(seconds))
    if whole >= 86_400:
        return f"{whole // 86_400} d {whole % 86_400 // 3600} h"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
