"""Makes the table of controls of the README: digits, and CIFAR-10 from ResNet-56 to ResNet-8, five seeds, all controls.

    python scripts/results_proof.py --data-root FOLDER --teacher-weights resnet56-4bfd9763.th

Works in the current directory, takes about an hour on two CPU cores, and goes on where it stopped: a group whose result
is there is not trained again. Writes docs/results/proof.json and prints the table in Markdown; `--table` prints that of
the file. `kdctl report runs/NAME/groups/001.json` shows the whole of each group.
"""

from __future__ import annotations

import argparse
from typing import Any

from _results import RESULTS, ROOT, group_of, read, write

OUT = RESULTS / "proof.json"
REPEATED = ["--seeds", "5", "--controls", "equal_time,label_smoothing,random_teacher,shuffled_labels,self"]
CIFAR = ["data.limit=10000", "teacher_cache={store: logits}", "train.threads=1"]


def kept(group: dict[str, Any]) -> dict[str, Any]:
    """What of a group goes into the file: no path of this machine."""
    metric = group["summary"]["metric"]
    measured = {"student": lambda row: row["student"], "baseline": lambda row: row["baseline"]}
    measured |= {name: lambda row, name=name: row["controls"][name] for name in group["summary"]["controls"]}
    return {
        "statements": group["statements"],
        "summary": group["summary"],
        "teacher": group["teacher"],
        "precision": group["precision"],
        "seeds": [
            {"seed": row["seed"]}
            | {
                name: {"value": of(row)["test"][metric], "epochs": of(row)["epochs"], "agreement": of(row)["agreement"]}
                for name, of in measured.items()
            }
            for row in group["seeds"]
        ],
    }


def interval(value: dict[str, Any], sign: str = "") -> str:
    low, high = value["ci95"]
    return f"{value['mean']:{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"


def table(groups: dict[str, Any]) -> str:
    """A row a control, a pair of columns a group: its value, and how far the student is above it."""
    head = [f"{name} | student above it" for name in groups]
    lines = [f"| | {' | '.join(head)} |", "|---" * (1 + 2 * len(groups)) + "|"]
    for name in ("student", "baseline", *next(iter(groups.values()))["summary"]["controls"]):
        cells = []
        for group in groups.values():
            summary = group["summary"]
            if name in ("student", "baseline"):
                cells += [interval(summary[name]), interval(summary["gain"], "+") if name == "baseline" else ""]
            else:
                cells += [
                    interval(summary["controls"][name]["values"]),
                    interval(summary["controls"][name]["gain"], "+"),
                ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root")
    parser.add_argument("--teacher-weights")
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        print(table(read(OUT, {})))
        return
    if not given.data_root or not given.teacher_weights:
        parser.error("--data-root and --teacher-weights are needed to train")
    groups = {"digits": kept(group_of("digits-proof", ROOT / "configs" / "quickstart.yaml", *REPEATED))}
    own = [f"data.root={given.data_root}", f"teacher.weights={given.teacher_weights}", *CIFAR]
    config = ROOT / "configs" / "cifar10" / "resnet56_to_resnet8.yaml"
    groups["CIFAR-10"] = kept(group_of("cifar10-proof", config, *own, *REPEATED))
    write(OUT, groups)
    print(table(groups))


if __name__ == "__main__":
    main()
