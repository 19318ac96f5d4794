"""`kdctl cache`, called as a user calls it."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest

from kdctl.cli import app, console
from kdctl.models.record import ModelRecord, build_model, save_model

FILE = """
data: {kind: digits, limit: 100, augment: [{kind: random_crop, padding: 1}], views: 2, val_fraction: 0.1}
teacher: {kind: digits_cnn, width: 8, control: true}
student: {kind: digits_cnn, width: 4}
train: {epochs: 3, device: cpu, threads: 1, precision: fp32, layout: contiguous}
teacher_cache: {store: logits}
"""
ROWS = 100 * 2 + 130
"""Two views of the training samples and the clean validation samples."""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDCTL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.yaml").write_text(FILE)
    return tmp_path


@pytest.fixture
def run(capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        code = app.run(["cache", *arguments])
        seen = capsys.readouterr()
        return code, seen.out, seen.err

    return call


@pytest.fixture
def document(run):
    def call(*arguments: str, code: int = 0) -> dict:
        got, out, err = run(*arguments, "--json")
        assert got == code, out + err
        return json.loads(out)

    return call


def stored(here):
    return sorted((here / "cache/teachers").glob("*/*"))


def test_show_says_what_it_will_cost_and_writes_nothing(document, here, run):
    (store,) = document("show", "a.yaml")["stores"]
    assert (store["rows"], store["expected"], store["bytes"], store["nearest"]) == (0, ROWS, 0, None)
    assert store["bytes_complete"] == ROWS * 10 * 2
    assert store["pays_off_after_epochs"] > 0 and store["seconds_to_build"] > 0
    assert [(p["split"], p["turn"], p["expected"]) for p in store["parts"]] == [
        ("val", None, 130), ("train", 0, 100), ("train", 1, 100),
    ]  # fmt: skip
    assert stored(here) == []
    code, out, _ = run("show", "a.yaml")
    assert code == 0 and "pays off after" in out and f"held 0 of {ROWS} samples" in out


@pytest.mark.parametrize(
    ("override", "turns"), [("data.views=fresh", 3), ("data.views=7", 3), ("data.views=all", 3), ("train.epochs=1", 1)]
)
def test_the_turns_that_training_will_ask_for(document, override, turns):
    (store,) = document("show", "a.yaml", override)["stores"]
    assert [p["turn"] for p in store["parts"]] == [None, *range(turns)]


def test_build_goes_on_where_it_was(document, here, run):
    code, out, err = run("build", "a.yaml", "train.epochs=1")
    assert code == 0 and "stored 230 samples" in out
    assert "pay off after" in err.splitlines()[1] and "stored train, view 0" in err, "the cost is said before"
    built = document("build", "a.yaml")
    assert built["filled"] == 100 and built["stores"][0]["rows"] == ROWS
    assert document("build", "a.yaml")["filled"] == 0
    (store,) = document("show", "a.yaml")["stores"]
    assert store["rows"] == ROWS and store["seconds_to_build"] == 0
    assert store["bytes"] == sum(path.stat().st_size for path in stored(here))


def test_a_changed_experiment_names_its_nearest_store(document, run):
    document("build", "a.yaml")
    (store,) = document("show", "a.yaml", "data.augment.random_crop.padding=2")["stores"]
    assert store["nearest"]["differs"] == ["augment.random_crop.padding was 1, now 2"]
    assert "augment.random_crop.padding was 1, now 2" in run("show", "a.yaml", "data.augment.random_crop.padding=2")[1]


def test_verify_names_damaged_files(document, here):
    assert document("verify", "a.yaml")["stores"] == []
    document("build", "a.yaml")
    (store,) = document("verify", "a.yaml")["stores"]
    assert store["files"] == 3
    for path in stored(here):
        if path.name != "key.json":
            path.write_bytes(path.read_bytes()[:-1])
    errors = document("verify", "a.yaml", code=4)["errors"]
    names = [error["file"].rpartition("/")[2] for error in errors]
    assert [name.rpartition(".0.")[0] for name in names] == ["train.0", "train.1", "val.clean"]
    assert "truncated" in errors[0]["message"] and "cache clear" in errors[0]["hint"]
    assert len(document("clear", "a.yaml")["stores"]) == 1 and stored(here) == []
    assert document("build", "a.yaml")["filled"] == ROWS


def test_a_named_folder_is_refused_when_it_is_stale_and_can_be_cleared(document, here):
    named = "teacher_cache.dir=named"
    assert document("build", "a.yaml", named)["stores"][0]["folder"] == str(here / "named")
    (error,) = document("build", "a.yaml", named, "data.augment_seed=3", code=3)["errors"]
    assert "data.augment_seed was 0, now 3" in error["message"] and error["key"] == "teacher_cache.dir"
    (here / "named/mine.txt").write_text("")
    (cleared,) = document("clear", "a.yaml", named, "data.augment_seed=3")["stores"]
    assert cleared["files"] == 4 and cleared["kept"]
    assert [p.name for p in (here / "named").iterdir()] == ["mine.txt"]
    assert document("clear", "a.yaml", named)["stores"] == []


def test_several_teachers_have_a_folder_each(document, here):
    teachers = "teacher=[{kind: digits_cnn, width: 8, control: true}, {kind: digits_cnn, width: 6, control: true}]"
    stores = document("build", "a.yaml", teachers, "teacher_cache.dir=named")["stores"]
    assert [s["folder"] for s in stores] == [str(here / "named/1"), str(here / "named/2")]


def test_a_teacher_that_is_still_to_be_trained(document):
    trained = "teacher={kind: digits_cnn, width: 8, train: {epochs: 1}}"
    shown = document("show", "a.yaml", trained)
    assert shown["stores"] == [] and "trained in the run" in shown["notes"][0]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["show", "a.yaml", "teacher_cache=null"], 3, "stores no teacher outputs"),
        (["show", "a.yaml", "teacher=null"], 3, "no teacher whose outputs could be stored"),
        (["show", "a.yaml", "teacher_cache.store=both"], 3, "no term has taps"),
        (["show", "a.yaml", "teacher_cache.fil=lazy"], 3, "did you mean 'fill'?"),
        (["shwo", "a.yaml"], 2, "did you mean 'show'?"),
        (["show"], 2, "CONFIG"),
    ],
)
def test_mistakes(run, arguments, code, said):
    got, _, err = run(*arguments)
    assert got == code and said in err


def test_check_says_that_there_is_a_store(capsys):
    assert app.run(["check", "a.yaml"]) == 0
    out = capsys.readouterr().out
    assert "store    logits of the teacher in fp16, views 2, filled while training" in out


def test_a_mistake_is_shown_with_its_place(here, document):
    document("build", "a.yaml", "teacher_cache.dir=named")
    (here / "a.yaml").write_text(
        FILE.replace("store: logits", "store: logits, dir: named").replace("padding: 1", "padding: 2")
    )
    (error,) = document("show", "a.yaml", code=3)["errors"]
    assert (error["file"], error["line"]) == ("a.yaml", 6) and "padding was 1, now 2" in error["message"]


def test_a_bar_counts_what_is_asked(run, monkeypatch):
    counted = []

    @contextmanager
    def bar(what, total):
        counted.append(total)
        yield lambda number: counted.append(-number)

    monkeypatch.setattr(console, "bar", bar)
    assert run("build", "a.yaml", "data.eval_batch_size=64")[0] == 0
    assert counted[0] == ROWS and sum(counted) == 0 and len(counted) > 5


@pytest.mark.parametrize("val", ["0", "0.1"])
def test_a_student_that_is_not_trained_needs_no_store(document, here, val):
    given = ["train.epochs=0", "student={kind: digits_cnn, width: 4, weights: w.safetensors}"]
    save_model(build_model(ModelRecord("digits_cnn", {"width": 4}, 10, list("0123456789"), [1, 8, 8])), here / "w")
    assert document("show", "a.yaml", *given, f"data.val_fraction={val}")["stores"] == []
