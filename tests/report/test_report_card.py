"""The model card: what it says stands in the run, and its lines load the student."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
from made_runs import make_run, write

from kdctl.models.record import ModelRecord, build_model, save_model
from kdctl.report.card import write_card
from kdctl.runs import Run


def test_the_lines_of_the_card_load_the_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "runs")
    document = {
        "format": 1, "kind": "digits_cnn", "arguments": {"width": 4}, "num_classes": 10, "image_shape": [1, 8, 8],
        "class_names": [str(i) for i in range(10)], "normalize": {"mean": [0.3], "std": [0.4]},
    }  # fmt: skip
    model = build_model(ModelRecord.from_dict(document))
    save_model(model, run / "student")
    text = Path(write_card(run)).read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in lines.splitlines() if line.strip()]) <= 5
    monkeypatch.chdir(run.path)
    Path("use.py").write_text(lines)
    made = runpy.run_path("use.py")
    assert made["probabilities"].shape == (1, 10) and made["probabilities"].sum().item() == pytest.approx(1)
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(made["model"](images), model.eval()(images))
    assert "They are: 0, 1, 2, 3" in text


def test_numbers_of_a_group_have_intervals(group: tuple[list[Run], Path]) -> None:
    run = group[0][0]
    text = Path(write_card(run)).read_text()
    summary = run.path.parent / "groups/001.json"
    result = json.loads(summary.read_text())["result"]
    mean = result["summary"]["student"]
    low, high = mean["ci95"]
    assert f"| student | {mean['mean']:.2f} [{low:.2f}, {high:.2f}] |" in text
    assert "mean of 5 seeds" in text and "control (no teacher)" in text and "| int8 |" in text
    assert (
        "- Student against control (no teacher), top-1, %: a gain: " in text
        and "Command: `kdctl train x.yaml`" in text
        and "`" + "ef" * 32 + "`" in text
    )
    assert text.startswith("---\n") and "license: unknown" in text and "and of the teacher" in text


def test_the_card_of_a_control_is_its_own(group: tuple[list[Run], Path]) -> None:
    runs, _ = group
    for run, name in ((runs[1], "control (no teacher)"), (runs[4], "random teacher")):
        value = json.loads((run / "summary.json").read_text())["student"]["best"]["test"]["top1"]
        text = Path(write_card(run)).read_text()
        assert f"It is a control of an experiment, {name}: " in text and "| student |" not in text
        assert text.count(f"| {name} |") == 1 and (f"{value:.2f}" in text or name.startswith("control"))
        assert "Seed: 0" in text


def test_a_run_alone_claims_nothing_and_its_names_are_no_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", name="a_b*c", whole=False)
    write(run / "student.json", {"kind": "digits_cnn", "class_names": ["<b>", "a|b"], "image_shape": [1, 8, 8]})
    text = Path(write_card(run)).read_text()
    assert "nothing is shown about the teacher's help" in text
    assert r"# a\_b\*c" in text and r"\<b\>, a\|b" in text and "<b>" not in text
    assert "digits" in text and not re.search(r"\bNone\b|\bnan\b", text)
    assert sorted(p.name for p in run.path.iterdir() if "README" in p.name) == ["README.md"]
