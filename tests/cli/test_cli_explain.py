"""explain, called as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from own_code import OWN

from kdctl import registry
from kdctl.cli import templates
from kdctl.config.schema import ExperimentFile

SMALL = """\
data: {kind: digits, batch_size: 64}
student: {kind: digits_cnn, width: 4}
train: {epochs: 2}
"""
SCHEDULED = "number > 0 or a map of epoch (or `500 steps`) to number > 0"


pytestmark = pytest.mark.usefixtures("here")


def test_explain_a_loss(document, run):
    found = document("explain", "kd")
    assert (found["group"], found["name"]) == ("losses", "kd")
    temperature = next(a for a in found["arguments"] if a["name"] == "temperature")
    assert temperature["type"] == SCHEDULED and temperature["default"] == 4.0 and "T" in temperature["aliases"]
    text = run("explain", "kd")[1]
    assert "Hinton" in text and "temperature / T" in text


def test_explain_a_preset(document, run):
    found = document("explain", "resnet20")
    assert found["preset"]["depth"] == 20
    assert "depth" not in [a["name"] for a in found["arguments"]]
    assert "depth = 20" in run("explain", "resnet20")[1]


def test_explain_by_alias_and_by_group(document):
    assert document("explain", "ce")["name"] == "supervised"
    assert document("explain", "losses.ce") == document("explain", "losses.supervised")


@pytest.mark.parametrize("group", sorted(registry.GROUPS))
def test_every_component_can_be_explained(document, run, group):
    for name in registry.catalogue(group):
        found = document("explain", f"{group}.{name}")
        assert found["doc"], f"{group}.{name} has no docstring"
        assert run("explain", f"{group}.{name}")[0] == 0


def test_explain_a_class_of_the_users_own(document, run, here):
    (here / "own.py").write_text(OWN)
    net, loss = document("explain", "./own.py:Net"), document("explain", "own.py:Mine")
    assert (net["group"], net["summary"], [a["name"] for a in net["arguments"]]) == (
        "models", "A net of mine.", ["width"]
    )  # fmt: skip
    assert (loss["group"], loss["declares"]["taps"], loss["arguments"][0]["default"]) == ("losses", "required", 2.0)
    assert run("explain", "./own.py:Net")[1].count("A net of mine.") == 1
    assert document("explain", "torchvision:resnet18")["preset"] == {"name": "resnet18"}
    code, _, err = run("explain", "./own.py:Odd")
    assert code == 2 and "`kdctl explain models../own.py:Odd`" in err
    assert document("explain", "models../own.py:Odd")["group"] == "models"
    code, _, err = run("explain", "./own.py:Nett")
    assert code == 3 and "did you mean 'Net'" in err


def test_explain_names_the_taps_of_a_model(document, run):
    """They stand in the docstring of the file, for each of its kinds where they differ."""
    taps = document("explain", "digits_cnn")["taps"]
    assert "layer1, layer2, layer3" in taps and "lenet5" not in taps and taps in run("explain", "digits_cnn")[1]
    assert document("explain", "lenet5")["taps"].startswith("Taps of lenet5:\n    layer1, layer2  ")
    assert "pre-activation" in document("explain", "resnet20")["taps"]
    assert document("explain", "kd")["taps"] == ""


def test_explain_a_word_that_is_a_key_in_several_places(run):
    for word, place in (("weights", "student.weights, teacher.weights"), ("temperature", "losses.kd.temperature")):
        code, _, err = run("explain", word)
        assert code == 2 and f"it is {place}" in err.replace("losses.tf_reg.temperature, losses.byot.temperature, ", "")


def test_explain_a_method_that_is_a_key_as_well(run):
    text = run("explain", "distill")[1]
    assert "methods: distill" in text and "the key distill" in text and "alpha is the teacher's share" in text


def test_what_is_missing_says_what_it_may_be(run):
    assert "hint: models, losses, " in run("list")[2]
    assert "runs, artefacts, or files" in run("compare")[2]


def test_list_says_what_no_list_can_hold(run):
    assert "also: torchvision:NAME" in run("list", "models", "resnet20")[2]
    assert run("list", "models", "resnet20", "-q")[2] == ""


def test_explain_an_argument_that_is_misspelt(document, run):
    assert document("explain", "kd.temperature")["default"] == 4.0
    code, _, err = run("explain", "losses.kd.temprature")
    assert code == 2 and "did you mean 'losses.kd.temperature'?" in err


def test_explain_an_ensemble(document, run):
    found = document("explain", "ensembles.ca_mkd")
    assert (found["group"], found["name"], found["costs"]) == ("ensembles", "ca_mkd", None)
    assert "w_k = (1 - softmax" in found["doc"]
    code, _, err = run("explain", "ca_mkd")  # a loss on features is called so too
    assert code == 2 and "losses.ca_mkd, ensembles.ca_mkd" in err
    assert document("explain", "aekd")["group"] == "ensembles"
    assert document("explain", "ensemble")["kinds_from"] == "ensembles"


@pytest.mark.parametrize(
    ("kind", "needs"),
    [
        ("kd", "a teacher"),
        ("supervised", "labels"),
        ("dkd", "a teacher, labels"),
        ("crd", "a teacher, taps, the whole batch (no micro-batches)"),
        ("cwd", "a teacher, taps (may be left out)"),
        ("uskd", "labels, taps, the whole batch (no micro-batches)"),
    ],
)
def test_explain_says_what_a_loss_needs(run, kind, needs):
    lines = run("explain", f"losses.{kind}")[1].splitlines()
    assert [line.split(maxsplit=1)[1] for line in lines if line.startswith("needs")] == [needs]


@pytest.mark.parametrize("group", ["losses", "methods"])
def test_what_is_declared_is_what_the_class_says(document, group):
    """Read from source, it agrees with the class itself, inherited attributes included."""
    for name in registry.catalogue(group):
        declared = document("explain", f"{group}.{name}")["declares"]
        real = registry.load(registry.find(group, name))
        if group == "methods":
            assert declared == {"teacher": not real.provides_teacher, "several_processes": real.parallel}, name
        else:
            taps = "optional" if real.needs_taps is None else "required" if real.needs_taps else "none"
            assert (declared["teacher"], declared["labels"]) == (real.needs_teacher, real.needs_targets), name
            assert (declared["taps"], declared["whole_batch"]) == (taps, real.batchwise), name
            assert declared["logits_of"] == list(real.links), name


def test_explain_says_what_a_loss_costs(document, run, monkeypatch):
    measured = document("explain", "crd")["costs"]
    assert measured["time_vs_kd"] > 100 and measured["saved_bytes"] > 2**30  # its negatives are gathered
    assert document("explain", "kd")["costs"]["time_vs_kd"] == 1
    (line,) = [line for line in run("explain", "crd")[1].splitlines() if line.startswith("costs")]
    assert "x the time of kd" in line and "% of a training step of ResNet-20" in line
    assert "MiB kept for backward" in line
    assert document("explain", "mutual")["costs"] is None
    monkeypatch.setattr("kdctl.cli.explain._costs", dict)  # a loss that is new has not been measured
    assert document("explain", "crd")["costs"] is None
    assert not [line for line in run("explain", "crd")[1].splitlines() if line.startswith("costs")]


def test_the_costs_are_of_losses_that_there_are():
    path = Path(templates.__file__).parents[1] / "losses" / "costs.json"
    found = json.loads(path.read_text())
    assert set(found["costs"]) <= set(registry.catalogue("losses"))
    assert {"time_vs_kd", "step_overhead_percent", "saved_bytes"} == set(found["costs"]["kd"])
    assert {"cpu", "torch", "date"} <= set(found["meta"])


def test_explain_what_is_several_things(run, monkeypatch):
    real = registry.catalogue
    twin = {"kd": registry.Component("tasks", "kd", "kdctl.losses.kd:KD")}
    monkeypatch.setattr(registry, "catalogue", lambda group: real(group) | (twin if group == "tasks" else {}))
    code, _, err = run("explain", "kd")
    assert code == 2 and "losses.kd, tasks.kd" in err


@pytest.mark.parametrize(
    ("key", "type_", "default"),
    [
        ("data.views", "one of fresh, all or integer > 0", "fresh"),
        ("data.val_fraction", "number >= 0 and < 1", 0.1),
        ("train.precision", "one of auto, fp32, bf16, fp16", "auto"),
        ("distill.alpha", "number >= 0 and <= 1", 0.9),
        ("teacher.train.epochs", "integer > 0 or null", None),
        ("losses.weight", "number or a map of epoch (or `500 steps`) to number", 1.0),
        ("losses.0.weight", "number or a map of epoch (or `500 steps`) to number", 1.0),
        ("distill.T", "number > 0", 4.0),
        ("losses.kd.temperature", SCHEDULED, 4.0),
        ("losses.kd.T", SCHEDULED, 4.0),
        ("optimizer.sgd.nesterov", "bool", None),
    ],
)
def test_explain_a_key(document, key, type_, default):
    found = document("explain", key)
    assert (found["name"], found["type"]) == (key, type_)
    if default is not None:
        assert found["default"] == default


def test_explain_a_section(document, run):
    found = document("explain", "data")
    assert found["required"] and "views" in found["keys"] and found["kinds_from"] == "data"
    assert "kdctl list data" in run("explain", "data")[1]


def test_every_key_of_the_schema_can_be_explained(document):
    for name in ExperimentFile.model_fields:
        assert document("explain", name)["name"] == name


@pytest.mark.parametrize(
    ("word", "meant"), [("data.vews", "data.views"), ("resnte20", "resnet20"), ("losess", "losses")]
)
def test_explain_something_unknown(run, word, meant):
    code, _, err = run("explain", word)
    assert code == 2 and f"did you mean '{meant}'?" in err
