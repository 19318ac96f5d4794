"""Makes the tables of text: SST-2, Tiny Shakespeare and GoEmotions, each method against the student alone, three seeds.

    python scripts/results_text.py sst2 data.root=FOLDER data.tokenizer=MINILM teacher.weights=RUN
    python scripts/results_text.py shakespeare data.root=FOLDER teacher.weights=RUN
    python scripts/results_text.py goemotions data.root=FOLDER data.tokenizer=MINILM teacher.weights=RUN

Works in the current directory, an hour or so each on one CPU core, and goes on where it stopped: a group whose result
is there is not trained again. RUN is that of the teacher, trained with the file beside the student's. Each finished
group goes into docs/results/text.json at once; `--table` prints what is there. `--only NAME,NAME` trains these alone.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from _results import RESULTS, ROOT, group_of, read, write

from kdctl.stats import interval, paired

OUT = RESULTS / "text.json"
SEEDS = 3


@dataclass(frozen=True)
class Method:
    """A row: the file, what is changed of it, and whether the student alone is trained beside it."""

    name: str
    config: str
    changes: tuple[str, ...] = ()
    with_baseline: bool = False


def _divergence(kind: str) -> tuple[str, ...]:
    return (f"losses=[{{kind: ce, weight: 0.5}}, {{kind: {kind}, weight: 0.5}}]",)


_ALONE = (
    "teacher=null", "teacher_cache=null", "losses=null", "student.pooling=mean", "optimizer.lr=1e-3", "train.epochs=6",
)  # fmt: skip
"""The student without a teacher in the settings of sst2_best.yaml, which are not those of sst2_student.yaml."""

FAMILIES: dict[str, list[Method]] = {
    "sst2": [
        Method("logits", "sst2_student", with_baseline=True),
        Method("best", "sst2_best"),
        Method("alone as best", "sst2_student", _ALONE),
        Method("tinybert", "sst2_tinybert"),
        Method("minilmv2", "sst2_minilmv2"),
    ],
    "shakespeare": [
        Method("forward_kl", "shakespeare_student", with_baseline=True),
        Method("reverse_kl", "shakespeare_student", _divergence("reverse_kl")),
        Method("jsd", "shakespeare_student", _divergence("jsd")),
        Method("on_policy", "shakespeare_gkd"),
    ],
    "goemotions": [
        Method("binary_kd", "goemotions_student", with_baseline=True),
        Method(
            "softmax kd, forced",
            "goemotions_student",
            ("losses=[{kind: supervised, weight: 0.5}, {kind: kd, weight: 0.5, temperature: 2, force: true}]",),
        ),
    ],
}
METRICS = {
    "sst2": ["top1"],
    "shakespeare": ["perplexity", "top1"],
    "goemotions": ["map", "macro_f1", "micro_f1"],
}


def trained(family: str, method: Method, overrides: list[str]) -> dict[str, Any]:
    """The finished group of a method."""
    name = f"{family}-{method.name}".replace(" ", "-").replace(",", "")
    alone = ["--with-baseline"] if method.with_baseline else []
    config = ROOT / "configs" / "text" / f"{method.config}.yaml"
    return group_of(name, config, *method.changes, *overrides, "--seeds", str(SEEDS), *alone)


def kept(family: str, group: dict[str, Any]) -> dict[str, Any]:
    """What of a group goes into the file, of the shipped weights, which are those of the last epoch."""

    def of(member: dict[str, Any]) -> dict[str, float]:
        return {name: member["test"][name] for name in METRICS[family]}

    seeds = [
        {"seed": row["seed"], "student": of(row["student"])}
        | ({"baseline": of(row["baseline"])} if row["baseline"] else {})
        | {"agreement": row["student"].get("agreement")}
        for row in group["seeds"]
    ]
    return {"seeds": seeds, "teacher": group["teacher"], "precision": group["precision"]}


def table(family: str, groups: dict[str, Any]) -> str:
    """A row a method: mean and interval over seeds of each metric, and the gain over the student alone, by seed."""
    first = next(iter(groups.values()))
    teacher, alone = first["teacher"]["test"], [row["baseline"] for row in first["seeds"] if "baseline" in row]
    metrics = METRICS[family]
    head = ["", *(f"{name} | against the student alone" for name in metrics)]
    lines = ["| " + " | ".join(head) + " |", "|---" * (1 + 2 * len(metrics)) + "|"]
    lines.append(f"| teacher | {' | '.join(f'{teacher[name]:.2f} | ' for name in metrics)} |")
    rows = {"student alone": alone} | {n: [row["student"] for row in g["seeds"]] for n, g in groups.items()}
    for name, found in rows.items():
        cells = []
        for metric in metrics:
            values = [row[metric] for row in found]
            gain = (
                "" if name == "student alone" or not alone else _shown(paired(values, [r[metric] for r in alone]), "+")
            )
            cells.append(f"{_shown(interval(values))} | {gain}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(value: Any, sign: str = "") -> str:
    low, high = value.ci95 or (float("nan"),) * 2
    return f"{value.mean:{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--only", default="")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_intermixed_args()
    everything: dict[str, Any] = read(OUT, {})
    only = given.only.split(",") if given.only else [method.name for method in FAMILIES[given.family]]
    for method in FAMILIES[given.family] if not given.table else ():
        if method.name in only:
            done = kept(given.family, trained(given.family, method, given.overrides))
            everything = read(OUT, {})
            everything.setdefault(given.family, {})[method.name] = done
            write(OUT, everything)
    print(table(given.family, everything[given.family]))


if __name__ == "__main__":
    main()
