"""init, list, schema, check, show, and what eval refuses, called as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from own_code import OWN

from kdctl import registry
from kdctl.cli import templates
from kdctl.config.dump import dump_yaml
from kdctl.config.expand import load_experiment

SMALL = """\
data: {kind: digits, batch_size: 64}
student: {kind: digits_cnn, width: 4}
train: {epochs: 2}
"""


pytestmark = pytest.mark.usefixtures("here")


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


# --------------------------------------------------------------------------------------------------------------- eval


def test_eval_has_checkpoints_of_runs_alone(run, here):
    (here / "small").mkdir()
    (here / "small/manifest.json").write_text("{}")
    (here / "a.yaml").write_text(SMALL)
    for what in ("small", "a.yaml"):
        code, _, err = run("eval", what, "--checkpoint", "last")
        assert code == 2 and "--checkpoint is for a run" in err and "leave --checkpoint out" in err
