"""Progress of training: a live bar on a terminal, one plain line an epoch elsewhere. Always on stderr."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from kdctl.watch import Reporter


class TextReporter(Reporter):
    """Says what happens, in lines that fit logs; on a terminal a bar shows the steps of the running epoch."""

    def __init__(self, quiet: bool = False) -> None:
        self.live = sys.stderr.isatty() and not quiet
        self.quiet = quiet
        self._bar: tqdm[Any] | None = None

    def say(self, text: str) -> None:
        self._close()
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def step(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
        if not self.live:
            return
        if self._bar is None:
            label = f"{stage} {epoch + 1}/{epochs}"
            self._bar = tqdm(total=steps, initial=step - 1, desc=label, file=sys.stderr, leave=False, unit="step")
        self._bar.update(1)

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        self._close()
        if self.quiet:
            return
        shares = {name: f" [{100 * share:.0f} %]" for name, share in line["gradient_shares"].items()}
        terms = " ".join(f"{name} {value:.4f}{shares.get(name, '')}" for name, value in line["terms"].items())
        val = " ".join(f"{name} {value:.2f}" for name, value in line["val"].items() if name in ("top1", "nll"))
        mark = " *" if line["best"] else ""
        print(
            f"{line['stage']} {line['epoch']:>3}/{epochs}  loss {line['loss']:.4f} ({terms})  lr {line['lr']:.5f}  "
            f"val {val}{mark}  {line['samples_per_second']:.0f}/s",
            file=sys.stderr,
            flush=True,
        )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
