"""init, list, explain, schema, check and show, called as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdctl import registry
from kdctl.cli import app, templates
from kdctl.config.dump import dump_yaml
from kdctl.config.expand import load_experiment
from kdctl.config.schema import ExperimentFile

SMALL = """\
data: {kind: digits, batch_size: 64}
student: {kind: digits_cnn, width: 4}
train: {epochs: 2}
"""
SCHEDULED = "number > 0 or a map of epoch (or `500 steps`) to number > 0"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        code = app.run(arguments)
        seen = capsys.readouterr()
        return code, seen.out, seen.err

    return call


@pytest.fixture
def document(run):
    """The JSON document of a command that must succeed."""

    def call(*arguments: str) -> dict:
        code, out, err = run(*arguments, "--json")
        assert code == 0, out + err
        return json.loads(out)

    return call


# --------------------------------------------------------------------------------------------------------------- init


def test_init_writes_a_template_once(run, here):
    code, out, err = run("init")
    assert (code, out) == (0, "wrote quickstart.yaml\n") and "kdctl train quickstart.yaml" in err
    assert (here / "quickstart.yaml").read_text() == templates.find("quickstart").read_text()
    (here / "quickstart.yaml").write_text("mine")
    code, _, err = run("init")
    assert code == 2 and "not overwritten" in err
    assert (here / "quickstart.yaml").read_text() == "mine"
    assert [p.name for p in here.iterdir()] == ["quickstart.yaml"]


def test_init_into_a_directory_or_a_file(document, here):
    (here / "d").mkdir()
    assert document("init", "-o", "d")["path"] == str(Path("d/quickstart.yaml"))
    assert document("init", "quickstart.yaml", "-o", "new/a.yaml")["path"] == "new/a.yaml"
    assert (here / "new/a.yaml").is_file()


def test_init_never_replaces_even_a_broken_link(run, here):
    (here / "quickstart.yaml").symlink_to("nowhere")
    assert run("init")[0] == 2
    assert (here / "quickstart.yaml").is_symlink()


def test_init_loses_a_race_politely(run, here, monkeypatch):
    monkeypatch.setattr("kdctl.cli.init.os.path.lexists", lambda path: False)
    (here / "quickstart.yaml").write_text("of the other process")
    assert run("init")[0] == 2
    assert (here / "quickstart.yaml").read_text() == "of the other process"
    assert len(list(here.iterdir())) == 1


def test_init_merges_what_a_template_extends(run, here):
    """A small twin comes as one file: headed by its own comments, and the same experiment."""
    source = templates.find("methods/small/multi_teacher")
    assert run("init", "methods/small/multi_teacher", "-o", "deep/er/est/copy.yaml")[0] == 0
    copy = here / "deep/er/est/copy.yaml"
    text = copy.read_text()
    assert text.splitlines()[0] == source.read_text().splitlines()[0] and "extends:" not in text
    assert "milestones" not in text  # an argument of the schedule that the twin replaced
    assert "#   kdctl train deep/er/est/copy.yaml\n" in text
    assert "../" not in text and "root: data\n" in text and "weights/cifar100_resnet20.pth" in text

    def resolved(path, base):
        shown = dump_yaml(load_experiment(path, require_files=False).experiment)
        return shown.replace(str(base), "BASE")

    assert resolved(copy, copy.parent) == resolved(source, templates.directory().parent)


def test_init_writes_paths_and_commands_for_the_place_of_the_copy(run, here):
    assert run("init", "cifar10/resnet56_to_resnet20")[0] == 0
    text = (here / "resnet56_to_resnet20.yaml").read_text()
    assert "#   kdctl train resnet56_to_resnet20.yaml " in text and "configs/" not in text
    assert "\n  root: data\n" in text and "\n  weights: weights/resnet56-4bfd9763.th\n" in text


def test_init_says_of_a_broken_template_what_is_wrong(run, here, monkeypatch):
    (here / "configs").mkdir()
    (here / "configs/a.yaml").write_text("# What it is.\nextends: nowhere.yaml\n")
    monkeypatch.setattr(templates, "directory", lambda: here / "configs")
    code, _, err = run("init", "a")
    assert code == 4 and "nowhere.yaml" in err and not (here / "a.yaml").exists()


def test_init_of_an_unknown_template(run):
    code, _, err = run("init", "quikstart")
    assert code == 2 and "did you mean 'quickstart'?" in err


def test_a_template_is_found_by_the_last_part_of_its_name(monkeypatch, here):
    for name in ("a/x.yaml", "a/y.yaml", "b/y.yaml"):
        (here / "configs" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "configs" / name).write_text("\n# yaml-language-server: z\n# What it is.\n# more\n")
    monkeypatch.setattr(templates, "directory", lambda: here / "configs")
    assert templates.find("x") == templates.find("a/x") == here / "configs/a/x.yaml"
    assert templates.summary(templates.find("x")) == "What it is."
    with pytest.raises(templates.UsageError, match="a/y, b/y"):
        templates.find("y")


@pytest.mark.parametrize("name", sorted(templates.templates()))
def test_every_template_is_described_and_valid(name, run, here):
    assert templates.summary(templates.find(name))
    assert run("init", name, "-o", "copy.yaml")[0] == 0
    code, _, err = run("check", "copy.yaml")
    assert code in (0, 4), err  # 4: data or weights that are not at hand here
    assert "Traceback" not in err


# --------------------------------------------------------------------------------------------------------------- list


@pytest.mark.parametrize("group", sorted(registry.GROUPS))
def test_list_shows_the_whole_table(document, group):
    items = document("list", group)["items"]
    assert [item["name"] for item in items] == list(registry.catalogue(group))
    assert all(item["summary"] and item["source"] for item in items)


def test_list_by_glob_part_and_alias(document):
    def names(pattern):
        return [item["name"] for item in document("list", "losses", pattern)["items"]]

    assert names("attention*") == ["attention_transfer", "attention_mse", "attention_kl"]
    assert names("ATTENTION") == ["attention_transfer", "attention_mse", "attention_kl"]
    assert names("hint") == ["fitnet"]  # an alias
    assert names("at?ention_transfer") == ["attention_transfer"]
    assert "attention_transfer" not in names("transfer*")


def test_list_ensembles(document, run):
    items = {item["name"]: item for item in document("list", "ensembles")["items"]}
    assert {"mean_logits", "mean", "weighted", "ebkd", "ca_mkd", "aekd", "best", "class_groups"} <= set(items)
    assert "ICASSP 2022" in items["ca_mkd"]["summary"]
    assert "ca_mkd" in run("list", "ensembles", "ca*")[1] and "ebkd" not in run("list", "ensembles", "ca*")[1]


def test_list_without_a_match(run):
    assert run("list", "models", "zzz*") == (0, "", "no models like 'zzz*'\n")


def test_list_of_something_else(run):
    code, _, err = run("list", "loses")
    assert code == 2 and "did you mean 'losses'?" in err and "optimizers" in err


def test_list_runs(document, run, here):
    assert run("list", "runs") == (0, "", "no runs\n")
    for number, status in (("001", "done"), ("002", "interrupted")):
        path = here / "runs/mine" / number
        path.mkdir(parents=True)
        info = {"name": "mine", "number": int(number), "status": status, "role": "main", "seed": 3}
        (path / "run.json").write_text(json.dumps({**info, "created": f"2030-01-01T00:00:{number[-2:]}+00:00"}))
        (path / "config.yaml").write_text("")
    items = document("list", "runs")["items"]
    assert [item["name"] for item in items] == ["runs/mine/001", "runs/mine/002"]
    assert items[1]["status"] == "interrupted"
    assert "interrupted, main, seed 3, 2030-01-01 00:00 UTC" in run("list", "runs", "*002")[1]


# ------------------------------------------------------------------------------------------------------------ explain


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


OWN = '''
from torch import nn

from kdctl.losses.adapters import FeatureLoss


class Net(nn.Module):
    """A net of mine."""

    def __init__(self, *, num_classes: int, width: int = 4) -> None: ...


class Mine(FeatureLoss):
    """A loss of mine."""

    def __init__(self, *, sharpness: float = 2.0) -> None: ...


class Odd: ...
'''


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


# ------------------------------------------------------------------------------------------------------------- schema


def test_schema_to_stdout_and_to_a_file(run, document, here):
    schema = json.loads(run("schema")[1])
    assert "student" in schema["properties"] and "schema_version" not in schema
    assert document("schema", "-o", "experiment.schema.json")["path"] == "experiment.schema.json"
    assert json.loads((here / "experiment.schema.json").read_text()) == schema


# -------------------------------------------------------------------------------------------------------------- check


def test_check_prints_the_plan(run, document, here):
    (here / "a.yaml").write_text(SMALL + "compress: [{kind: quantize}]\n")
    plan = document("check", "a.yaml", "train.epochs=2")["plan"]
    assert plan["student"]["kind"] == "digits_cnn" and plan["teacher"] == []
    assert [stage["kind"] for stage in plan["stages"]] == ["train", "quantize"]
    text = run("check", "a.yaml")[1]
    assert "digits_cnn (width 4)" in text and "2 epochs, supervised" in text and "lr 0.05" in text


def test_check_names_a_users_file_without_its_folder(run, here):
    (here / "own.py").write_text(OWN)
    models = "student: {kind: ./own.py:Net}\nteacher: {kind: digits_cnn, train: {epochs: 1}}\n"
    loss = "losses: [{kind: ./own.py:Mine, taps: [a], weight: 2}]\n"
    (here / "own.yaml").write_text("data: {kind: digits}\n" + models + loss)
    code, out, _ = run("check", "own.yaml")
    assert code == 0 and "student  own.py:Net (width 4)" in out and "epochs, 2 x own.py:Mine (sharpness 2.0)" in out
    assert str(here) not in out


def test_check_says_how_the_step_is_made(run, here):
    teachers = "teacher: [{kind: digits_cnn, width: 8, control: true}, {kind: mlp, hidden: [4], control: true}]\n"
    (here / "a.yaml").write_text(SMALL + teachers + "ensemble: {kind: ebkd}\nmethod: {kind: dot}\nbalance: gradient\n")
    text = run("check", "a.yaml", "data.strong_augment=[{kind: horizontal_flip}]")[1]
    assert "no augmentation; beside it horizontal_flip\n" in text
    assert "dot (difference 0.075): 0.1 x supervised" in text
    assert "teachers by ebkd (variant normalized), balanced, sgd" in text


def test_check_of_a_teacher_without_weights(run, here):
    (here / "a.yaml").write_text(SMALL + "teacher: {kind: digits_cnn, width: 8, train: {epochs: 5}}\n")
    text = run("check", "a.yaml", "losses=[{kind: ce}, {kind: kd, weight: {0: 0, 5: 0.9}}]")[1]
    assert "digits_cnn (width 8) from stage teacher" in text
    assert "{0: 0, 5: 0.9} x kd (temperature 4.0)" in text


def test_check_lists_every_problem(run, here):
    (here / "a.yaml").write_text("data: {kind: digits, batch_sise: 8}\nstudent: {kind: resnet21}\nnonsense: 1\n")
    code, out, err = run("check", "a.yaml", "train.sed=3")
    assert (code, out) == (3, "")
    assert err.startswith("a.yaml: 4 problems\n") and err.count("did you mean") >= 3
    code, out, _ = run("check", "a.yaml", "train.sed=3", "--json")
    errors = json.loads(out)["errors"]
    assert code == 3 and len(errors) == 4
    assert {error["line"] for error in errors} >= {1, 2, 3}


def test_check_of_a_file_that_is_not_there(run):
    code, _, err = run("check", "none.yaml")
    assert code == 4 and err.count("none.yaml") >= 1


def test_check_writes_nothing(run, here):
    (here / "a.yaml").write_text(SMALL)
    run("check", "a.yaml")
    assert [p.name for p in here.iterdir()] == ["a.yaml"]


# --------------------------------------------------------------------------------------------------------------- show


def test_what_show_prints_is_a_file_that_shows_the_same(run, document, here):
    (here / "a.yaml").write_text(SMALL)
    resolved = run("show", "a.yaml", "train.seed=5")[1]
    (here / "b.yaml").write_text(resolved)
    assert document("show", "b.yaml")["experiment"] == document("show", "a.yaml", "train.seed=5")["experiment"]
    assert run("show", "b.yaml")[1] == resolved


def test_show_origin(run, document, here):
    (here / "a.yaml").write_text(SMALL)
    rows = {row["key"]: row for row in document("show", "a.yaml", "--origin", "train.seed=5")["origin"]}
    assert rows["train.seed"]["value"] == 5 and "override" in rows["train.seed"]["from"]
    assert rows["data.batch_size"]["from"].endswith("a.yaml:1")
    assert rows["data.val_fraction"]["from"] == "default"
    assert "\ndata.batch_size" in run("show", "a.yaml", "--origin")[1]


def test_show_device_is_an_override(document, here):
    (here / "a.yaml").write_text(SMALL)
    assert document("show", "a.yaml", "--device", "cuda:1")["experiment"]["train"]["device"] == "cuda:1"


def test_show_diff(run, document, here):
    (here / "a.yaml").write_text(SMALL)
    found = document("show", "a.yaml", "--diff", "a.yaml", "train.seed=5", "data.augment=[{kind: cutout}]")["diff"]
    rows = {row["key"]: row for row in found}
    assert (rows["train.seed"]["this"], rows["train.seed"]["other"]) == (5, 0)
    assert "data.augment.cutout.kind" in rows and "data.batch_size" not in rows
    assert run("show", "a.yaml", "--diff", "a.yaml") == (0, "", "nothing differs\n")


def test_show_a_run(document, run, here):
    path = here / "runs/mine/001"
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"created": "2030", "role": "main", "status": "done"}))
    (path / "config.yaml").write_text(SMALL)
    for name in ("latest", "runs/mine/001", "mine"):
        assert document("show", name)["experiment"]["student"]["kind"] == "digits_cnn"
    code, _, err = run("show", "yours")
    assert code == 4 and "there is no run at 'yours'" in err


# ------------------------------------------------------------------------------------------- what people get wrong


@pytest.fixture
def a_run(here):
    """A finished run's folder with an artefact, as far as it is found without torch."""
    (here / "digits.yaml").write_text(SMALL)
    home = here / "runs" / "mine" / "001"
    (home / "artefacts" / "int8").mkdir(parents=True)
    (home / "artefacts" / "int8" / "manifest.json").write_text("{}")
    (home / "run.json").write_text(json.dumps({"created": "2030", "role": "main", "status": "done", "stages": {}}))
    (home / "student.safetensors").touch()
    (home / "config.yaml").write_text(dump_yaml(load_experiment(here / "digits.yaml").experiment))
    return home


@pytest.mark.parametrize(
    ("line", "code", "said", "hint"),
    [
        ("eval nofile.yaml", 4, "nofile.yaml: this file does not exist", "kdctl init"),
        ("train digit.yaml", 4, "digit.yaml: this file does not exist", "did you mean 'digits.yaml'"),
        ("train runs/mine/001", 3, "runs/mine/001: this is a folder", "`kdctl resume runs/mine/001`"),
        ("eval --split tst", 4, "the data have no split 'tst'; there can be: train, val, test", "did you mean 'test'"),
        ("eval --checkpoint first", 2, "--checkpoint: got 'first'; allowed: best, last", None),
        ("eval mine --against yours", 4, "there is no run at 'yours'", "kdctl list runs"),
        ("eval runs/mine/001/artefacts/int4", 4, "there is no run", "did you mean 'runs/mine/001/artefacts/int8'"),
        ("train digits.yaml --device gpu", 2, "--device: got 'gpu'; allowed: auto, cpu, cuda, cuda:N, mps", "cuda is"),
        ("predict mine --device tpu --input digits.yaml", 2, "--device: got 'tpu'", None),
        ("eval runs/mine/001/artefacts/int8 --device cpu", 2, "--device is for a run", "leave --device out"),
        ("compress mine --quantize int9", 3, "command line: stages.1.dtype: got 'int9'", "did you mean 'int8'"),
    ],
)
def test_what_people_get_wrong(run, a_run, line, code, said, hint):
    got, out, err = run(*line.split())
    assert (got, out) == (code, "") and err.startswith(said), err
    assert hint is None or hint in err.partition("hint: ")[2], err


def test_losses_of_a_file_with_stages(run, here):
    (here / "staged.yaml").write_text(SMALL + "stages: [{name: a, losses: [{kind: ce}]}]\n")
    code, _, err = run("check", "staged.yaml", "losses.ce.weight=2")
    assert code == 3 and "stages.NAME.losses.ce.weight" in err
    assert run("check", "staged.yaml", "stages.a.losses.ce.weight=2")[0] == 0
