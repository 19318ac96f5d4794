"""A teacher whose classes stand in another order, are more, or fewer than those of the data."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdctl import build, runs
from kdctl.config.expand import load_experiment
from kdctl.config.schema import Experiment
from kdctl.device import settle_by_rule
from kdctl.errors import ConfigError
from kdctl.evaluate import evaluate_run
from kdctl.experiment import Plan, load_run, train
from kdctl.models.record import Model, ModelRecord, build_model, load_model, save_model
from kdctl.teachers.key import differences, store_key
from kdctl.watch import Reporter

DIGITS = [str(digit) for digit in range(10)]
ORDER = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
FILE = """
name: classes
data: {kind: digits, limit: 300, batch_size: 64}
student: {kind: digits_cnn, width: 4}
distill: {T: 2, alpha: 0.5}
train: {epochs: 1, device: cpu, threads: 1}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def load(folder: Path) -> Callable[..., Experiment]:
    def go(*overrides: str) -> Experiment:
        (folder / "classes.yaml").write_text(FILE)
        found = load_experiment(folder / "classes.yaml", overrides).experiment
        return found.model_copy(update={"train": settle_by_rule(found.train)})

    return go


@pytest.fixture
def teacher(load: Callable[..., Experiment]) -> Model:
    """A net with logits that tell the digits apart, in the data's order."""
    torch.manual_seed(7)
    record = ModelRecord("mlp", {"hidden": [12]}, 10, DIGITS, [1, 8, 8])
    model = build_model(record).eval()
    rows = build.build_data(load("distill=null")).train
    images = rows.fetch(torch.arange(len(rows))).float() / 255
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), rows.targets).backward()
        optimizer.step()
    return model.requires_grad_(False)


def with_classes(model: Model, names: list[str]) -> Model:
    """The same net whose head answers for these classes in this order; for unknown ones with the bias of class 0."""
    chosen = [DIGITS.index(name) if name in DIGITS else 0 for name in names]
    record = replace(model.record, num_classes=len(names), class_names=names)
    other = build_model(record).eval()
    state = model.net.state_dict()
    head = [name for name, value in state.items() if value.shape[:1] == (10,)]
    assert len(head) == 2
    other.net.load_state_dict({n: value[chosen] if n in head else value for n, value in state.items()})
    return other


def taught(load: Callable[..., Experiment], *overrides: str) -> Model:
    experiment = load("teacher={kind: mlp, hidden: [12], weights: teacher.safetensors}", *overrides)
    data = build.build_data(experiment)
    (model,) = build.build_teachers(experiment.student_stage, data, 0, Path)
    return model


def images() -> torch.Tensor:
    return torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))


PERMUTED = [DIGITS[number] for number in ORDER]


@pytest.mark.parametrize("classes", ["by_name", "[" + ", ".join(f"'{name}'" for name in PERMUTED) + "]"])
def test_a_permuted_teacher_says_exactly_what_it_said(
    load: Callable[..., Experiment], folder: Path, teacher: Model, classes: str
) -> None:
    permuted = with_classes(teacher, PERMUTED)
    assert not torch.equal(permuted(images()), teacher(images()))
    if classes != "by_name":  # its record tells nothing of use
        permuted.record = replace(permuted.record, class_names=[f"class {n}" for n in range(10)])
    save_model(permuted, folder / "teacher")
    assert torch.equal(taught(load, f"teacher.classes={classes}")(images()), teacher(images()))
    with pytest.raises(ConfigError, match="class 0 of the model is"):
        taught(load)


def test_a_list_of_names_without_a_record(load: Callable[..., Experiment], folder: Path, teacher: Model) -> None:
    torch.save(with_classes(teacher, PERMUTED).net.state_dict(), folder / "bare.pt")
    text = "[" + ", ".join(f"'{name}'" for name in PERMUTED) + "]"
    model = taught(load, "teacher.weights=bare.pt", f"teacher.classes={text}", "teacher.normalize=none")
    assert torch.equal(model(images()), teacher(images()))
    with pytest.raises(ConfigError, match="no record of their class names") as caught:
        taught(load, "teacher.weights=bare.pt", "teacher.classes=by_name")
    assert caught.value.problems[0].key == "teacher.classes"


def test_the_datas_own_order_changes_nothing(load: Callable[..., Experiment], folder: Path, teacher: Model) -> None:
    save_model(teacher, folder / "teacher")
    assert taught(load, "teacher.classes=by_name").record == taught(load).record


def test_a_teacher_that_knows_more(load: Callable[..., Experiment], folder: Path, teacher: Model) -> None:
    save_model(with_classes(teacher, ["ten", *PERMUTED, "eleven"]), folder / "teacher")
    model = taught(load, "teacher.classes=by_name")
    assert torch.equal(model(images()), teacher(images())) and model.record.num_logits == 10
    with pytest.raises(ConfigError, match="12 classes, the data 10"):
        taught(load)


def test_a_teacher_that_lacks_classes(load: Callable[..., Experiment], folder: Path, teacher: Model) -> None:
    save_model(with_classes(teacher, ["8", "3", "0"]), folder / "teacher")
    found = taught(load, "teacher.classes=by_name")(images()).detach()
    known = teacher(images())[:, [0, 3, 8]]
    assert torch.equal(found[:, [0, 3, 8]], known)
    others = found[:, [1, 2, 4, 5, 6, 7, 9]]
    assert torch.equal(others, (known.amin(1, keepdim=True) - 20).expand(-1, 7))
    assert float(found.softmax(1)[:, [0, 3, 8]].sum(1).min()) > 1 - 1e-6


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ("[a, b]", "2 names for the 10 classes of the teacher"),
        ("[a, b, c, d, e, f, g, h, i, j]", "no class of the teacher"),
        ("['1', '2', '3', '4', '5', '6', '7', '8', '9', '1']", "two classes of the teacher are called '1'"),
    ],
)
def test_names_that_cannot_be_right(
    load: Callable[..., Experiment], folder: Path, teacher: Model, classes: str, words: str
) -> None:
    save_model(teacher, folder / "teacher")
    with pytest.raises(ConfigError, match=words) as caught:
        taught(load, f"teacher.classes={classes}")
    assert caught.value.problems[0].key == "teacher.classes"


def test_what_the_file_says_of_the_teacher_still_has_to_agree(
    load: Callable[..., Experiment], folder: Path, teacher: Model
) -> None:
    save_model(with_classes(teacher, PERMUTED), folder / "teacher")
    with pytest.raises(ConfigError, match=r"got \[13\], but .* holds \[12\]"):
        taught(load, "teacher.classes=by_name", "teacher.hidden=[13]")


def test_a_saved_order_is_kept_and_compared(load: Callable[..., Experiment], folder: Path, teacher: Model) -> None:
    """What a run ships as its teacher answers as it did, and passes for these data, but for no others."""
    save_model(with_classes(teacher, ["ten", *PERMUTED, "eleven"]), folder / "teacher")
    save_model(taught(load, "teacher.classes=by_name"), folder / "again")
    assert torch.equal(load_model(folder / "again")(images()), teacher(images()))
    assert torch.equal(taught(load, "teacher.weights=again.safetensors")(images()), teacher(images()))
    document = json.loads((folder / "again.json").read_text())
    document["class_order"] = document["class_order"][::-1]
    (folder / "again.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="class 0 of the model is '9', of the data '0'"):
        taught(load, "teacher.weights=again.safetensors")


@pytest.mark.parametrize("cache", ["null", "{store: logits, dtype: fp32, dir: store}"])
def test_a_run_measures_and_stores_it_in_the_datas_order(
    load: Callable[..., Experiment], folder: Path, teacher: Model, cache: str
) -> None:
    save_model(teacher, folder / "straight")
    save_model(with_classes(teacher, PERMUTED), folder / "teacher")
    found: list[dict[str, Any]] = []
    for weights, more in (("straight", ()), ("teacher", ("teacher.classes=by_name",))):
        given = f"teacher={{kind: mlp, hidden: [12], weights: {weights}.safetensors}}"
        dir_ = cache.replace("store}", f"store-{weights}}}")
        document = train(Plan(load(given, f"teacher_cache={dir_}", *more), ""), Reporter())
        run = runs.Run(Path(document["run"]))
        evaluated = evaluate_run(run, load_run(run))
        assert evaluated["teacher"] == document["teacher"]["test"]
        with np.load(run / "eval" / "test.teacher.npz") as saved:
            logits = saved["logits"]
        found.append({
            "teacher": document["teacher"], "agreement": document["agreement"], "logits": logits.tolist(),
            "student": (run / "student.safetensors").read_bytes()[-400:],
        })  # fmt: skip
    assert found[0]["teacher"]["test"]["top1"] > 60
    assert found[0]["logits"] == found[1]["logits"]
    assert found[0] == found[1]


def test_the_order_is_part_of_a_stores_key_and_without_one_keys_stay_what_they_were(teacher: Model) -> None:
    def key(record: ModelRecord, **left_out: Any) -> dict[str, Any]:
        document = {k: v for k, v in record.to_dict().items() if k not in left_out}
        return store_key(
            record=document, code=None, weights="w", data="d", augment=[], enumerated=False, augment_seed=0,
            stored={}, precision="fp32",
        )  # fmt: skip

    ordered = replace(teacher.record, class_order=ORDER)
    assert differences(key(teacher.record), key(ordered)) == ["the order of the teacher's classes changed"]
    assert key(teacher.record) == key(teacher.record, class_order=None)  # as records were without one


@pytest.mark.parametrize("loss", ["{kind: wkd_logit}", "{kind: cat_kd, taps: [layer3]}"])
def test_a_term_on_the_rows_of_the_classifier_refuses_another_order(
    load: Callable[..., Experiment], folder: Path, loss: str
) -> None:
    record = ModelRecord("digits_cnn", {"width": 4}, 10, PERMUTED, [1, 8, 8])
    save_model(build_model(record), folder / "teacher")
    teacher = "teacher={kind: digits_cnn, width: 4, weights: teacher.safetensors, classes: by_name, control: true}"
    with pytest.raises(ConfigError, match="classes stand in another order"):
        train(Plan(load(teacher, "distill=null", f"losses=[{{kind: ce}}, {loss}]"), ""), Reporter())


def test_of_each_token_too_the_classes_are_reordered() -> None:
    record = ModelRecord("mlp", {"hidden": [4]}, 3, ["a", "b", "c"], [1, 8, 8], class_order=[2, -1, 0])
    said = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 6.0, 5.0], [9.0, 8.0, 7.0]]])  # (N, L, C) with L = C
    model = Model(torch.nn.Identity(), record)
    assert model(said).tolist() == [[[3.0, -19.0, 1.0], [5.0, -16.0, 4.0], [7.0, -13.0, 9.0]]]
