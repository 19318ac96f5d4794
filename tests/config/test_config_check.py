"""The checker: each problem with its place, what was got, what is allowed, and a hint; all of them at once."""

from __future__ import annotations

import pytest

from kdctl.config.expand import load_experiment
from kdctl.errors import ConfigError, MissingError

BASE = "data: {kind: digits}\nstudent: {kind: digits_cnn, width: 4}\n"
TEACHER = "teacher: {kind: digits_cnn, width: 32, train: {epochs: 3}}\n"


@pytest.fixture
def problems(write):
    """All problems of a text, as text."""

    def call(text: str, *overrides: str):
        with pytest.raises(ConfigError) as caught:
            load_experiment(write(text), overrides)
        return caught.value.problems

    return call


@pytest.fixture
def fine(write):
    def call(text: str, *overrides: str):
        return load_experiment(write(text), overrides, require_files=False).experiment

    return call


KEYS = [
    ("data: {kind: digits, batchsize: 3}", "data.batchsize", "unknown argument of 'digits'", "'batch_size'"),
    ("trian: {epochs: 3}", "trian", "unknown key", "'train'"),
    ("epochs: 3", "epochs", "unknown key", "train.epochs"),
    ("train: {epoch: 3}", "train.epoch", "unknown key", "'epochs'"),
    ("train: {batch_size: 3}", "train.batch_size", "unknown key", "data.batch_size"),
    ("teacher: {kind: digits_cnn, train: {epochz: 3}}", "teacher.train.epochz", "unknown key", "'epochs'"),
    ("teacher: [{kind: digits_cnn, train: {epochz: 3}}]", "teacher.0.train.epochz", "unknown key", "'epochs'"),
    ("losses: [{kind: kd, temprature: 3}]", "losses.0.temprature", "unknown argument of 'kd'", "'temperature'"),
    ("optimizer: {kind: sgd, lr: 1, moment: 1}", "optimizer.moment", "unknown argument of 'sgd'", "'momentum'"),
    ("stages: [{kind: train, epochz: 3}]", "stages.0.epochz", "unknown key", "'epochs'"),
    ("stages: [{}, {kind: quantize, dtyp: int8}]", "stages.1.dtyp", "unknown argument of 'quantize'", "'dtype'"),
    ("distill: {alfa: 0.5}", "distill.alfa", "unknown key", "'alpha'"),
    ("losses: [{kind: fitnet, taps: [{student: a, teachr: b}]}]", "losses.0.taps.0.teachr", "unknown key", "'teacher'"),
]


@pytest.mark.parametrize(("text", "key", "words", "hint"), KEYS)
def test_unknown_keys(problems, text, key, words, hint):
    base = "\n".join(line for line in BASE.splitlines() if line.split(":")[0] not in text) + "\n"
    found = {p.key: p for p in problems(base + text + "\n")}
    assert words in found[key].message and "allowed: " in found[key].message and hint in (found[key].hint or "")
    assert found[key].line == base.count("\n") + 1


VALUES = [
    ("train: {epochs: three}", "train.epochs", "got 'three'; allowed: a whole number", None),
    ("train: {epochs: 1e2}", "train.epochs", "got 100.0; allowed: a whole number", "write 100"),
    ("train: {epochs: '3'}", "train.epochs", "got '3'; allowed: a whole number", "remove the quotes"),
    ("train: {epochs: true}", "train.epochs", "got true; allowed: a whole number", None),
    ("train: {epochs: -1}", "train.epochs", "got -1; allowed: a number >= 0", None),
    ("train: {epochs: 0}", "train.epochs", "a student without weights has to be trained", "name its weights"),
    ("train: {epochs: [3]}", "train.epochs", "got a list of 1; allowed: a whole number", None),
    (
        "train: {precision: bf61}",
        "train.precision",
        "allowed: 'auto', 'fp32', 'bf16' or 'fp16'",
        "did you mean 'bf16'?",
    ),
    ("train: {seed: -1}", "train.seed", "got -1; allowed: a number >= 0", None),
    ("train: {ema: 1.0}", "train.ema", "allowed: a number < 1", None),
    ("train: fast", "train", "got 'fast'; allowed: a map of keys", None),
    ("train: null", "train", "got null; allowed: a map of keys", None),
    ("losses: {kind: kd}", "losses", "got a map; allowed: a list", None),
    ("losses: [kd]", "losses.0", "got 'kd'; allowed: a map of keys", "{kind: kd}"),
    ("losses: [{kind: kd, weight: true}]", "losses.0.weight", "got true; allowed: a number or a map", None),
    ("losses: [{kind: kd, weight: {0: a}}]", "losses.0.weight.0", "got 'a'; allowed: a number", None),
    (
        "losses: [{kind: kd, weight: {a: 1}}]",
        "losses.0.weight.a",
        "got the key 'a'; allowed as a key: a whole number",
        None,
    ),
    ("losses: [{kind: kd, weight: {}}]", "losses.0.weight", "got a map", None),
    ("losses: [{kind: kd, temperature: 0}]", "losses.0.temperature", "got 0; allowed: a number > 0", None),
    ("losses: [{kind: kd, temperature: '4'}]", "losses.0.temperature", "allowed: a number", "remove the quotes"),
    ("losses: [{kind: kd, T: hot}]", "losses.0.T", "got 'hot'; allowed: a number", None),
    ("losses: [{kind: kd, standardize: yes}]", "losses.0.standardize", "allowed: true or false", "write true or false"),
    ("losses: [{kind: at, taps: [{student: a}]}]", "losses.0.taps.0.teacher", "'teacher' is missing", "add teacher"),
    ("losses: [{kind: at, taps: [a b]}]", "losses.0.taps.0", "got 'a b'", None),
    ("losses: [{kind: at, taps: layer1}]", "losses.0.taps", "got 'layer1'; allowed: a list", None),
    ("distill: {T: 0}", "distill.T", "allowed: a number > 0", None),
    ("distill: {alpha: 1.5}", "distill.alpha", "allowed: a number <= 1", None),
    ("teacher: 3", "teacher", "got 3; allowed: a map of keys or a list", None),
    ("teacher: {kind: digits_cnn, weights: 3}", "teacher.weights", "got 3; allowed: text", "put it in quotes"),
    ("teacher: {weights: a.pth}", "teacher.kind", "'kind' is missing", "kdctl list"),
    ("optimizer: {lr: 0.1}", "optimizer.kind", "'kind' is missing", "kind: sgd"),
    (
        "optimizer: {kind: adamw, lr: 1, betas: [0.9]}",
        "optimizer.betas",
        "got a list of 1; allowed: tuple[float, float]",
        None,
    ),
    ("optimizer: {kind: adamw, betas: [0.9, a]}", "optimizer.betas.1", "got 'a'; allowed: a number", None),
    ("optimizer: {kind: sgd}", "optimizer.lr", "argument 'lr' of 'sgd' is missing", "add lr"),
    ("optimizer: {kind: Adagrad, lr: fast}", "optimizer.lr", "got 'fast'; allowed: a number", None),
    ("schedule: {kind: multistep}", "schedule.milestones", "is missing", None),
    ("stages: [{kind: train, from: 3}]", "stages.0.from", "got 3; allowed: text", None),
    ("stages: [{kind: train, name: a/b}]", "stages.0.name", "a name of letters", None),
    ("stages: [7]", "stages.0", "got 7; allowed: a map of keys", None),
    ("stages: [{}, {kind: export}]", "stages.1.target", "needs a target; allowed: executorch", None),
    ("name: ../x", "name", "a name of letters", None),
    ("name: ..", "name", "a name of letters", None),
    ("name: groups", "name", "'groups' means something else among runs", "another `name:`"),
    ("train: {device: tpu}", "train.device", "got 'tpu'; allowed: auto, cpu, cuda, cuda:N or mps", None),
    ("1: 2", "1", "a key must be text, got 1", "put it in quotes"),
    ("extend: a.yaml", "extend", "frozen, train, stages, compress, export, extends", "'extends'"),
    ("compress: [{kind: quantize, dtype: int9}]", "compress.0.dtype", "got 'int9'; allowed: 'int8'", "'int8'"),
    ("export: onnx", "export", "got 'onnx'; allowed: a list", None),
]


@pytest.mark.parametrize(("text", "key", "words", "hint"), VALUES)
def test_wrong_values(problems, text, key, words, hint):
    found = {p.key: p for p in problems(BASE + text + "\n")}
    assert words in found[key].message and (hint is None or hint in (found[key].hint or ""))
    assert found[key].line == 3


KINDS = [
    ("data: {kind: cifar11}\nstudent: {kind: resnet8}", "data.kind", "no data source 'cifar11'", "'cifar10'"),
    ("data: {kind: digits}\nstudent: {kind: resnte20}", "student.kind", "no model 'resnte20'", "'resnet20'"),
    (BASE + "losses: [{kind: attention_trans}]", "losses.0.kind", "no loss 'attention_trans'", "'attention_transfer'"),
    (BASE + "optimizer: {kind: adagrad}", "optimizer.kind", "no optimizer 'adagrad'", "'Adagrad'"),
    (BASE + "schedule: {kind: cosin}", "schedule.kind", "no schedule 'cosin'", "'cosine'"),
    (BASE + "task: {kind: clasification}", "task.kind", "no task", "'classification'"),
    (BASE + "method: {kind: distil}", "method.kind", "no method", "'distill'"),
    (BASE + "compress: [{kind: quantise}]", "compress.0.kind", "no compressor", "'quantize'"),
    (BASE + "export: [{kind: onxx}]", "export.0.kind", "no exporter", "'onnx'"),
    (BASE + "losses: [{kind: ./nothing.py:Loss}]", "losses.0.kind", "there is no file", None),
    (BASE + "losses: [{kind: no_such_package.x:Loss}]", "losses.0.kind", "there is no module", None),
    (BASE + "losses: [{kind: kdctl.losses.kd:KDD}]", "losses.0.kind", "has no class 'KDD'", "'KD'"),
]


@pytest.mark.parametrize(("text", "key", "words", "hint"), KINDS)
def test_unknown_kinds(problems, text, key, words, hint):
    found = {p.key: p for p in problems(text + "\n")}
    assert words in found[key].message and (hint is None or hint in (found[key].hint or ""))


CONSISTENCY = [
    ("distill: {}", "distill", "no teacher to distil from"),
    ("losses: [{kind: kd}]", "losses.0", "'kd' needs a teacher"),
    ("losses: []", "losses", "no term to train with"),
    ("losses: [{kind: ce, weight: 0}, {kind: tf_reg, weight: {0: 0, 5: 0}}]", "losses", "every term weighs 0"),
    ("losses: [{kind: ce}, {kind: supervised}]", "losses.0", "2 terms are called 'supervised'"),
    (TEACHER + "distill: {}\nlosses: [{kind: ce}]", "distill", "give one of them"),
    (TEACHER + "losses: [{kind: at}]", "losses.0", "needs taps"),
    (TEACHER + "losses: [{kind: kd, taps: [layer1]}]", "losses.0.taps", "takes no taps"),
    ("teacher: {kind: digits_cnn}", "teacher", "has no weights"),
    ("teacher: [{kind: digits_cnn, train: {}}, {kind: digits_cnn}]", "teacher.1", "has no weights"),
    ("teacher: {kind: digits_cnn, weights: a, train: {}}", "teacher.train", "one place"),
    ("teacher: {kind: digits_cnn, from: x}", "teacher.from", "no earlier stage"),
    (
        "teacher: [{kind: digits_cnn, name: a, train: {}}, {kind: mlp, hidden: [], name: a, train: {}}]",
        "teacher",
        "two stages",
    ),
    ("teacher: {kind: digits_cnn, name: student, train: {}}", None, None),
    ("teacher: {kind: digits_cnn, train: {losses: [{kind: kd}]}}", "teacher.train.losses.0", "needs a teacher"),
    ("train: {early_stop: 3}\ndata: {kind: digits, val_fraction: 0}", "train.early_stop", "needs a validation split"),
    (
        "student: {kind: digits_cnn, normalize: {mean: [0, 0], std: [1]}}",
        "student.normalize",
        "mean has 2 numbers, std 1",
    ),
    ("student: {kind: digits_cnn, from: x}", "student.from", "no earlier stage"),
    ("stages: []", "stages", "no stage trains"),
    ("stages: [{name: a}, {name: a}]", "stages.1.name", "two stages are called 'a'"),
    (
        "stages: [{name: aa}, {name: b, from: ab}]",
        "stages.1.from",
        "no earlier stage 'ab' with a model to take; there are: aa",
    ),
    ("stages: [{name: a, from: b}, {name: b}]", "stages.0.from", "no earlier stage 'b'"),
    ("stages: [{name: a, teacher: {from: b}}]", "stages.0.teacher.kind", "'kind' is missing"),
    ("stages: [{name: a, teacher: {kind: mlp, hidden: [], from: b}}]", "stages.0.teacher.from", "no earlier stage 'b'"),
    ("stages: [{name: a, losses: [{kind: kd}]}]", "stages.0.losses.0", "needs a teacher"),
    ("stages: [{name: a, losses: []}]", "stages.0.losses", "no term"),
    ("stages: [{name: a, role: teacher}]", "stages.0", "needs the model"),
    ("stages: [{name: a}]\ncompress: [{kind: quantize}]", "compress", "`compress` is a stage"),
    ("stages: [{name: a}]\nexport: [{kind: onnx}]", "export", "`export` is a stage"),
    ("stages: [{name: a}]\n" + TEACHER, "teacher.train", "by a stage"),
    ("stages: [{name: a, epochs: 3}]\ntrain: {epochs: 4}", "train.epochs", "every stage has its own epochs"),
    ("stages: [{optimizer: {kind: sgd, lr: 1}}]\noptimizer: {kind: sgd, lr: 2}", "optimizer", "no effect"),
    ("stages: [{losses: [{kind: ce}]}]\nlosses: [{kind: ce}]", "losses", "no effect"),
    ("stages: [{name: a}]\ndistill: {}", "distill", "no teacher"),
]


@pytest.mark.parametrize(("text", "key", "words"), CONSISTENCY)
def test_what_must_hold_between_sections(problems, text, key, words):
    if key is None:
        key, words = "teacher", "two stages would be called 'student'"
        text = "teacher: [{kind: digits_cnn, name: student, train: {}}]"
    sections = {line.split(":")[0] for line in text.splitlines()}
    base = [line for line in BASE.splitlines() if line.split(":")[0] not in sections]
    found = {p.key: p for p in problems("\n".join([*base, text]) + "\n")}
    assert key in found, found
    assert words in found[key].message


def test_all_problems_at_once_in_the_order_of_the_file(problems):
    text = "data: {kind: digits, views: 0}\nstudent: {kind: nothing}\ntrain: {epochs: x}\nnonsense: 1\n"
    text += "distill: {T: 1, alpha: 2}\n"
    found = problems(text, "train.seed=a")
    expected = [(1, "data.views"), (2, "student.kind"), (3, "train.epochs"), (4, "nonsense"), (5, "distill.alpha")]
    assert [(p.line, p.key) for p in found] == [*expected, (None, "train.seed")]
    assert found[-1].file == "override 1"


@pytest.mark.parametrize(
    "text",
    [
        "losses: [{kind: at, taps: [{student: a}]}]",
        "losses: [{kind: ce, weight: {0: a}}]",
        "teacher: {kind: digits_cnn, train: {epochs: a}}",
        "teacher: [{kind: digits_cnn, train: {epochs: a}}]",
        "data: {kind: digits, views: 0}",
        "data: {kind: digits, labels_per_class: some}",
        "losses: [{kind: klx}]",
        "optimizer: {kind: adamw, betas: [0.9]}",
        "student: {kind: digits_cnn, normalize: {mean: [0.5], std: [0]}}",
        "losses: [{kind: ce}]\ntask: {kind: clasification}",
        "teacher: {kind: digits_cnn, train: {}}\ndistill: {}\ntask: {kind: clasification}",
    ],
)
def test_one_mistake_is_one_problem(problems, text):
    base = [line for line in BASE.splitlines() if line.split(":")[0] != text.split(":")[0]]
    assert len(problems("\n".join([*base, text]) + "\n")) == 1


def test_a_large_bound_is_written_whole(problems):
    (problem,) = problems(BASE, "data.batch_size=9999999")
    assert problem.message == "got 9999999; allowed: a number <= 1048576"


def test_a_file_called_like_something_among_runs(write):
    with pytest.raises(ConfigError, match=r"latest\.yaml:1: name: 'latest' means something else among runs"):
        load_experiment(write(BASE, "latest.yaml"))
    assert load_experiment(write("name: a\n" + BASE, "latest.yaml")).experiment.name == "a"


def test_missing_sections_are_named(problems):
    assert {p.key for p in problems("name: x\n")} == {"data", "student"}


def test_both_names_of_one_key(problems):
    found = {
        p.key: p.message
        for p in problems(
            BASE + TEACHER + "distill: {T: 1, temperature: 2}\nlosses: [{kind: kd, T: 1, temperature: 2}]\n"
        )
    }
    assert "another name of 'T'" in found["distill.temperature"]
    assert "another name of 'temperature'" in found["losses.0.T"]


def test_fixed_and_supplied_arguments(problems):
    found = {
        p.key: p.message
        for p in problems("data: {kind: digits}\nstudent: {kind: resnet8, depth: 14, num_classes: 3}\n")
    }
    assert "fixed by kind 'resnet8'" in found["student.depth"] and "set by kdctl" in found["student.num_classes"]


def test_many_problems_are_cut(problems):
    text = BASE + "\n".join(f"key{i}: 1" for i in range(500)) + "\n"
    found = problems(text)
    assert len(found) == 51 and found[-1].message == "... and more"


def test_a_long_kind_gives_a_short_message(problems):
    (problem,) = problems(f"data: {{kind: digits}}\nstudent: {{kind: {'x' * 100_000}}}\n")
    assert len(str(problem)) < 2000


# ------------------------------------------------------------------------------------------------------------ accepted


def test_whole_numbers_serve_as_fractions(fine):
    stage = fine(BASE + TEACHER + "losses: [{kind: kd, temperature: 4, weight: 1}]\n").train_stages[-1]
    assert repr(stage.losses[0].arguments["temperature"]) == "4.0" and repr(stage.losses[0].weight) == "1.0"


@pytest.mark.parametrize(
    "optimizer", ["{kind: Adagrad, lr: 0.1}", "{kind: RMSprop, alpha: 0.9}", "{kind: Adam, betas: [0.8, 0.9]}"]
)
def test_any_class_of_torch_optim(fine, optimizer):
    assert fine(BASE + f"optimizer: {optimizer}\n").train_stages[0].optimizer.arguments["lr"] > 0


def test_zoo_models_take_any_argument(fine):
    spec = fine("data: {kind: digits}\nstudent: {kind: 'torchvision:resnet18', zero_init_residual: true}\n").student
    assert (spec.kind, spec.arguments["zero_init_residual"]) == ("torchvision:resnet18", True)


def test_a_declared_control_needs_no_weights(fine):
    assert fine(BASE + "teacher: {kind: digits_cnn, control: true}\n").train_stages[-1].teachers[0].control


def test_a_model_from_a_stage_may_leave_out_its_kind(fine):
    text = (
        BASE
        + "stages: [{name: t, role: teacher, student: {kind: digits_cnn, width: 32}}, {name: s, teacher: {from: t}}]\n"
    )
    (teacher,) = fine(text).train_stages[1].teachers
    assert (teacher.kind, teacher.stage, teacher.arguments["width"]) == ("digits_cnn", "t", 32)


OWN = '''
from kdctl.config.types import PathStr, Positive
from kdctl.losses.base import Loss

class Mine(Loss):
    """My loss."""
    ALIASES = {"s": "sharpness"}
    needs_teacher = False

    def __init__(self, *, sharpness: Positive, table: PathStr = "t.csv", other: "Unknown | int" = 3):
        raise SystemExit("never run by a check")
'''


def test_a_component_of_the_users(fine, problems, write, tmp_path):
    write(OWN, "code/mine.py")
    (loss,) = fine(BASE + "losses: [{kind: ./code/mine.py:Mine, s: 2}]\n").train_stages[0].losses
    assert loss.kind == f"{tmp_path}/code/mine.py:Mine"
    assert loss.arguments == {"sharpness": 2.0, "table": str(tmp_path / "t.csv"), "other": 3}
    found = {p.key: p for p in problems(BASE + "losses: [{kind: ./code/mine.py:Mine, s: -1, other: x, tabel: a}]\n")}
    assert set(found) == {"losses.0.s", "losses.0.other", "losses.0.tabel"}


def test_an_argument_of_the_users_that_is_named_like_a_key(fine, problems, write):
    """`classes` of a teacher means something else: its default stays in the class, and required it can never come."""
    write("class Net:\n    def __init__(self, classes=10, width=3):\n        pass\n", "mine.py")
    write("class Net:\n    def __init__(self, classes, width=3):\n        pass\n", "strict.py")
    teacher = fine(BASE + "teacher: {kind: ./mine.py:Net, weights: w.pth}\n").train_stages[0].teacher
    assert teacher.classes is None and teacher.arguments == {"width": 3}
    (problem,) = problems(BASE + "teacher: {kind: ./strict.py:Net, train: {epochs: 1}}\n")
    assert problem.key == "teacher.classes" and "has the name of a key of kdctl" in problem.message


def test_a_component_of_the_users_that_is_not_python(problems, write):
    write("class Mine(:\n", "mine.py")
    (problem,) = problems(BASE + "losses: [{kind: ./mine.py:Mine}]\n")
    assert "mine.py:1 is not valid Python" in problem.message and problem.line == 3


# -------------------------------------------------------------------------------------------------------------- missing


def test_missing_weights_and_data_are_told_last(write, tmp_path):
    text = "data: {kind: cifar10, root: sets}\nstudent: {kind: resnet8}\nteacher: {kind: resnet20, weights: w.pth}\n"
    with pytest.raises(MissingError) as caught:
        load_experiment(write(text))
    assert [(p.key, p.line) for p in caught.value.problems] == [("data.root", 1), ("teacher.weights", 3)]
    assert (
        "data.download=true" in (caught.value.problems[0].hint or "")
        and str(tmp_path) in caught.value.problems[1].message
    )
    with pytest.raises(ConfigError) as both:
        load_experiment(write(text + "nonsense: 1\n"))
    assert [p.key for p in both.value.problems] == ["nonsense"]
    load_experiment(write(text), require_files=False)


def test_what_is_there_or_will_be_fetched_is_not_missing(write):
    write("x", "w.safetensors")
    text = "data: {kind: cifar10, root: sets, download: true}\nstudent: {kind: resnet8}\n"
    load_experiment(write(text + "teacher: {kind: resnet20, weights: w}\n"))
