"""`extends:` and `a.b=c`: what merges, what replaces, where each value came from, and what is refused."""

from __future__ import annotations

import os

import pytest

from kdctl.config.check import check
from kdctl.config.expand import load_experiment
from kdctl.config.overrides import load_document
from kdctl.errors import ConfigError, MissingError


def test_maps_merge_lists_and_values_replace(write):
    write("a: 1\nm: {x: 1, y: {p: 1, q: 2}}\nlist: [1, 2, 3]\nkeep: yes\n", "base.yaml")
    path = write("extends: base.yaml\na: 2\nm:\n  y: {q: 3}\n  z: 4\nlist: [9]\n")
    document = load_document(path)
    assert document.data == {"a": 2, "m": {"x": 1, "y": {"p": 1, "q": 3}, "z": 4}, "list": [9], "keep": "yes"}
    origins = document.origins
    assert str(origins["m", "y", "q"]) == f"{path}:4" and origins["m", "y", "q"].layer == "file"
    assert str(origins["m", "x"]).endswith("base.yaml:2") and origins["m", "x"].layer == "extends"
    assert ("list", 2) not in origins and ("extends",) not in origins


def test_a_map_replaces_a_value_and_a_value_a_map(write):
    write("a: 1\nb: {x: 1}\n", "base.yaml")
    document = load_document(write("extends: base.yaml\na: {y: 2}\nb: 3\n"))
    assert document.data == {"a": {"y": 2}, "b": 3} and ("b", "x") not in document.origins


def test_chains_are_read_against_their_own_files(write):
    write("a: 1\nb: 1\nc: 1\n", "deep/er/root.yaml")
    write("extends: er/root.yaml\nb: 2\nc: 2\n", "deep/middle.yaml")
    assert load_document(write("extends: deep/middle.yaml\nc: 3\n")).data == {"a": 1, "b": 2, "c": 3}


def test_a_circle_is_refused_with_its_place(write):
    write("extends: exp.yaml\n", "other.yaml")
    path = write("a: 1\nextends: other.yaml\n")
    with pytest.raises(ConfigError, match=r"exp\.yaml -> other\.yaml -> exp\.yaml") as caught:
        load_document(path)
    assert caught.value.problems[0].line == 1
    with pytest.raises(ConfigError, match="circle"):
        load_document(write("extends: ./exp.yaml\n"))


def test_extending_a_missing_file_says_where_it_is_asked_for(write):
    path = write("a: 1\nextends: non.yaml\n")
    write("a: 1\n", "none.yaml")
    with pytest.raises(MissingError) as caught:
        load_document(path)
    problem = caught.value.problems[0]
    assert (problem.file, problem.line, problem.key) == (str(path), 2, "extends") and "none.yaml" in (
        problem.hint or ""
    )


@pytest.mark.parametrize("value", ["3", "[a.yaml, b.yaml]", "{a: 1}", "''", "null"])
def test_extends_takes_one_path(write, value):
    with pytest.raises(ConfigError, match="path of one file"):
        load_document(write(f"extends: {value}\n"))


def test_an_error_in_an_extended_file_names_that_file(write):
    base = write("a: 1\na: 2\n", "base.yaml")
    with pytest.raises(ConfigError) as caught:
        load_document(write("extends: base.yaml\n"))
    assert (caught.value.problems[0].file, caught.value.problems[0].line) == (str(base), 2)


# ------------------------------------------------------------------------------------------------------------ overrides

LOSSES = "losses:\n  - {kind: ce, weight: 0.1}\n  - {kind: kd, weight: 0.9}\nt: {a: {b: 1}}\n"


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("t.a.b=2", ("t", "a", "b"), 2),
        ("t.a.b=1e-3", ("t", "a", "b"), 1e-3),
        ("t.a.b=yes", ("t", "a", "b"), "yes"),
        ("t.a.b=x=y=z", ("t", "a", "b"), "x=y=z"),
        ("t.a.b=", ("t", "a", "b"), None),
        ("t.a.b='1'", ("t", "a", "b"), "1"),
        ("t.a.b=C:/ü, x", ("t", "a", "b"), "C:/ü, x"),
        ("t.a={c: [1, 2]}", ("t", "a"), {"c": [1, 2]}),
        ("t.a.5=x", ("t", "a", 5), "x"),
        ("t.new.deep=1", ("t", "new", "deep"), 1),
        ("u.v=1", ("u", "v"), 1),
        ("losses.1.weight=2", ("losses", 1, "weight"), 2),
        ("losses.kd.weight=2", ("losses", 1, "weight"), 2),
        ("losses.supervised.weight=2", ("losses", 0, "weight"), 2),
        ("losses.ce.weight=2", ("losses", 0, "weight"), 2),
        ("losses.kd.weight={0: 0, 5: 1}", ("losses", 1, "weight"), {0: 0, 5: 1}),
        ("losses.kd={kind: at}", ("losses", 1), {"kind": "at"}),
    ],
)
def test_an_override_sets_one_value(write, override, path, value):
    document = load_document(write(LOSSES), [override])
    got = document.data
    for part in path:
        got = got[part]
    assert got == value and str(document.origins[path]) == "override 1" and document.origins[path].layer == "override"


def test_an_alias_finds_the_name_that_it_stands_for(write):
    document = load_document(write("losses: [{kind: supervised}, {kind: kd}]\n"), ["losses.ce.weight=2"])
    assert document.data["losses"][0]["weight"] == 2


def test_later_overrides_win_and_reach_into_earlier_ones(write):
    document = load_document(write("a: 1\n"), ["a={b: 1}", "a.b=2", "l=[{kind: x}]", "l.x.y=3"])
    assert document.data == {"a": {"b": 2}, "l": [{"kind": "x", "y": 3}]}
    assert str(document.origins["a", "b"]) == "override 2"


def test_a_named_item_is_found_by_its_name(write):
    document = load_document(
        write("losses: [{kind: kd, name: one}, {kind: kd, name: two}, {kind: ce}]\n"), ["losses.two.T=3"]
    )
    assert [item.get("T") for item in document.data["losses"]] == [None, 3, None]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("losses.at.weight=1", "no item named 'at'; there are: ce, supervised, kd"),
        ("losses.kdd.weight=1", "did you mean 'kd'?"),
        ("losses.2.weight=1", "has 2 items"),
        ("losses.99999999999999999999.weight=1", "has 2 items"),
        ("t.a.b.c=1", "`t.a.b` is 1"),
        ("nonsense", "takes the form a.b=c"),
        ("=1", "takes the form a.b=c"),
        ("a..b=1", "takes the form a.b=c"),
        ("t.a=[1,", "not valid YAML"),
        ("t.a=!!python/none x", "not allowed"),
        ("t.a={x: 1, x: 2}", "twice"),
        ("t.a=.nan", "finite"),
        ("t.a=\udcff", "UTF-8"),
    ],
)
def test_a_bad_override_is_refused_by_its_number(write, override, words):
    with pytest.raises(ConfigError) as caught:
        load_document(write(LOSSES), ["t.a.b=1", override])
    (problem,) = caught.value.problems
    assert problem.file == "override 2" and problem.line is None and words in str(problem)


def test_two_items_of_one_kind_are_refused(write):
    with pytest.raises(ConfigError, match="2 items named 'kd'") as caught:
        load_document(write("losses: [{kind: kd}, {kind: kd}]\n"), ["losses.kd.weight=1"])
    assert caught.value.problems[0].hint == "say which: losses.0 or losses.1"


def test_all_bad_overrides_at_once(write):
    with pytest.raises(ConfigError) as caught:
        load_document(write(LOSSES), ["x", "losses.9.a=1", "t.a=1"])
    assert [p.file for p in caught.value.problems] == ["override 1", "override 2"]


# --------------------------------------------------------------------------------------------- kinds and paths by layer


def test_arguments_of_a_kind_that_a_later_layer_changes_fall_away(write, valid):
    write(valid + "optimizer: {kind: sgd, lr: 0.3, momentum: 0.8}\n", "base.yaml")
    loaded = load_experiment(write("extends: base.yaml\noptimizer: {kind: adamw}\n"))
    arguments = loaded.experiment.train_stages[-1].optimizer.arguments
    assert arguments["lr"] == 0.3 and "momentum" not in arguments and arguments["betas"] == [0.9, 0.999]
    by_override = load_experiment(
        write(valid + "optimizer: {kind: sgd, lr: 0.3, momentum: 0.8}\n"), ["optimizer.kind=adamw"]
    )
    assert by_override.experiment.train_stages[-1].optimizer.arguments == arguments


@pytest.mark.parametrize(
    ("base", "text", "overrides"),
    [
        ("optimizer: {kind: sgd, momentun: 0.8, lr: 1}", "optimizer: {kind: adamw}", []),  # not the old kind's either
        ("optimizer: {kind: sgd, momentum: 0.8, lr: 1}", "optimizer: {kind: adamw, nesterov: true}", []),
        ("", "optimizer: {kind: adamw, momentum: 0.8}", []),
        ("optimizer: {kind: adamw, momentum: 0.8}", "", ["optimizer.kind=adamw"]),  # not changed
        ("optimizer: {kind: sgd, lr: 1}", "", ["optimizer.kind=adamw", "optimizer.momentum=0.8"]),  # together
        ("optimizer: {kind: sgd, lr: 1}", "", ["optimizer.momentum=0.8", "optimizer.kind=adamw"]),
        ("optimizer: {kind: sgd, lr: 1}", "optimizer: {kind: adamw}", ["optimizer.momentum=0.8"]),  # after it
    ],
)
def test_other_unknown_arguments_stay_errors(write, valid, base, text, overrides):
    write(f"{valid}{base}\n", "base.yaml")
    with pytest.raises(ConfigError, match="unknown argument of 'adamw'"):
        load_experiment(write(f"extends: base.yaml\n{text}\n"), overrides)


def test_arguments_fall_away_over_several_files(write, valid):
    write(valid + "optimizer: {kind: sgd, lr: 0.3, momentum: 0.8}\n", "root.yaml")
    write("extends: root.yaml\noptimizer: {kind: adamw, betas: [0.8, 0.9]}\n", "middle.yaml")
    optimizer = load_experiment(write("extends: middle.yaml\noptimizer: {kind: Adagrad}\n")).experiment.train_stages[-1]
    assert optimizer.optimizer.arguments["lr"] == 0.3 and not {"momentum", "betas"} & set(optimizer.optimizer.arguments)
    write("extends: root.yaml\noptimizer: {kind: adamw}\n", "middle.yaml")
    with pytest.raises(ConfigError, match="unknown argument of 'adamw'"):
        load_experiment(write("extends: middle.yaml\noptimizer: {momentum: 0.8}\n"))


@pytest.mark.parametrize(
    ("base", "text", "overrides"),
    [
        ("distill: {T: 4, alpha: 0.5}", "", ["distill.temperature=3"]),
        ("distill: {temperature: 4, alpha: 0.5}", "distill: {T: 3}", []),
        ("losses: [{kind: kd, temperature: 4}]", "", ["losses.kd.T=3"]),
        ("losses: [{kind: dist, tau: 4}]", "", ["losses.dist.T=3"]),
    ],
)
def test_the_last_layer_wins_by_whatever_name(write, valid, base, text, overrides):
    write(f"{valid}{base}\n", "base.yaml")
    loaded = load_experiment(write(f"extends: base.yaml\n{text}\n"), overrides)
    assert loaded.experiment.train_stages[-1].losses[-1].arguments["temperature"] == 3
    names = {path[-1]: origin.layer for path, origin in loaded.document.origins.items() if path}
    assert {names.get(name) for name in ("T", "temperature")} <= {"override" if overrides else "file", None}


def test_two_names_in_one_layer_stay_an_error(write, valid):
    for text, overrides in [
        ("distill: {T: 4}", ["distill.T=2", "distill.temperature=3"]),
        ("losses: [{kind: dist, tau: 4, T: 3}]", []),
    ]:
        with pytest.raises(ConfigError, match=r"is another name of '(T|temperature)', which is given too"):
            load_experiment(write(f"{valid}{text}\n"), overrides)


def test_paths_are_read_against_their_layer(write, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write("data: {kind: cifar10, root: ./sets}\nstudent: {kind: resnet8, weights: w.pth}\n", "base/base.yaml")
    path = write("extends: base/base.yaml\nteacher: {kind: resnet20, weights: t.pth}\n")

    def paths(*overrides):
        experiment = load_experiment(path, overrides, require_files=False).experiment
        (teacher,) = experiment.train_stages[-1].teachers
        return [
            os.path.relpath(p, tmp_path)
            for p in (experiment.data.arguments["root"], experiment.student.weights, teacher.weights)
        ]

    assert paths() == ["base/sets", "base/w.pth", "t.pth"]
    assert paths("data.root=sets", "teacher.weights=~/t.pth") == ["elsewhere/sets", "base/w.pth", "home/t.pth"]


def test_the_default_of_a_path_is_read_against_the_file(write, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    file = check(load_document(write("data: {kind: cifar10}\nstudent: {kind: resnet8}\n")), require_files=False)
    assert file.data.arguments["root"] == str(tmp_path / "data")


def test_pretrained_is_no_path(write):
    experiment = load_experiment(
        write("data: {kind: digits}\nstudent: {kind: resnet8, weights: pretrained}\n")
    ).experiment
    assert experiment.student.weights == "pretrained"


def test_a_term_of_the_shorthand_is_addressed_by_the_shorthand(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text("data: {kind: digits}\nstudent: {kind: digits_cnn}\ndistill: {T: 4}\n")
    with pytest.raises(ConfigError, match=r"losses\.kd\.temperature: the file says `distill:`.*distill\.temperature"):
        load_document(path, ["losses.kd.temperature=2"])
    assert load_document(path, ["distill.T=2"]).data["distill"]["T"] == 2
