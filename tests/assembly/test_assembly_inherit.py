"""A student that begins with weights of its teacher: the same tensors, chosen layers, and widths cut to size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from kdctl.assembly.inherit import inherit, projection
from kdctl.config.inheritance import evenly
from kdctl.config.schema import Inherit
from kdctl.data.tokens import TokenSplit
from kdctl.errors import ConfigError, MissingError
from kdctl.models.record import Model, ModelRecord, build_model, save_model
from kdctl.signals import TokenInput

WORDS = "bert.embeddings.word_embeddings.weight"
QUERY = "bert.encoder.layer.{}.attention.self.query.weight"
HIDDEN = "bert.encoder.layer.{}.intermediate.dense.weight"


def tokens(tokenizer: str = "t", vocab_size: int = 40) -> TokenInput:
    return TokenInput(vocab_size, 12, pad=0, first=1, separator=2, tokenizer=tokenizer)


def bert(classes: int = 2, words: TokenInput | None = None, seed: int = 0, **sizes: Any) -> Model:
    torch.manual_seed(seed)
    arguments = {"depth": 4, "width": 24, "heads": 4, "dropout": 0.0} | sizes
    names = [f"class {number}" for number in range(classes)]
    return build_model(ModelRecord("bert", arguments, classes, names, [], tokens=words or tokens())).eval()


def image_net(kind: str, classes: int = 3, **arguments: Any) -> Model:
    names = [f"class {number}" for number in range(classes)]
    return build_model(ModelRecord(kind, arguments, classes, names, [3, 32, 32]))


@pytest.fixture
def train() -> TokenSplit:
    """Texts in which the first tokens of the vocabulary are the most frequent."""
    draw = np.random.default_rng(0)
    texts = [np.minimum(draw.geometric(0.2, size=8), 39).astype(np.int32) for _ in range(50)]
    return TokenSplit.of(texts, torch.zeros(50, dtype=torch.int64), tokens())


@pytest.fixture
def teacher() -> Model:
    return bert(seed=1)


def state(model: Model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.net.state_dict().items()}


# ------------------------------------------------------------------------------------------------------------- layers


def test_of_the_same_size_it_is_the_teacher(teacher: Model, train: TokenSplit) -> None:
    student, texts = bert(), teacher.record.example(5)
    with torch.no_grad():
        assert not torch.allclose(student(texts), teacher(texts))
        said = inherit(student, Inherit(), [teacher], train)
        assert torch.equal(student(texts), teacher(texts))
    assert f"{len(state(student))} of its {len(state(student))} tensors from the teacher" in said


def test_layers_are_those_that_are_named_or_evenly_spaced(teacher: Model, train: TokenSplit) -> None:
    theirs = state(teacher)
    for depth, layers, wanted in ((2, None, [0, 3]), (3, [3, 0, 0], [3, 0, 0]), (1, None, [0])):
        student = bert(depth=depth)
        said = inherit(student, Inherit(layers=layers), [teacher], train)
        assert [state(student)[QUERY.format(i)].equal(theirs[QUERY.format(n)]) for i, n in enumerate(wanted)] == (
            [True] * depth
        )
        assert f"bert.encoder.layer {', '.join(map(str, wanted))}" in said


def test_evenly_as_distilbert() -> None:
    assert evenly(6, 12) == [0, 2, 4, 7, 9, 11] and evenly(2, 6) == [0, 5] and evenly(5, 5) == [0, 1, 2, 3, 4]


def test_a_shallower_student_computes_what_the_teacher_does_without_the_other_layers(
    teacher: Model, train: TokenSplit
) -> None:
    student, texts = bert(depth=2), teacher.record.example(5)
    inherit(student, Inherit(layers=[1, 2]), [teacher], train)
    teacher.net.bert.encoder.layer = teacher.net.bert.encoder.layer[1:3]
    with torch.no_grad():
        assert torch.equal(student(texts), teacher(texts))


# ------------------------------------------------------------------------------------------------------------- widths


def test_the_projection_loses_least_of_the_embeddings_in_the_texts(teacher: Model, train: TokenSplit) -> None:
    """What it keeps is that of numpy's singular vectors, and more than the plain ones or other directions keep."""
    embeddings, counts = state(teacher)[WORDS], torch.bincount(train.ids.long(), minlength=40)
    basis, kept = projection(embeddings, counts, 6)
    rows = embeddings.double().numpy() * np.sqrt(counts.numpy() + 1.0)[:, None]
    values = np.linalg.svd(rows, compute_uv=False)
    assert kept == pytest.approx((values[:6] ** 2).sum() / (values**2).sum())
    np.testing.assert_allclose(basis.T @ basis, np.eye(6), atol=1e-12)
    held = ((rows @ basis.numpy()) ** 2).sum()
    plain = np.linalg.svd(embeddings.double().numpy())[2][:6].T
    assert held == pytest.approx((values[:6] ** 2).sum()) and held > 1.01 * ((rows @ plain) ** 2).sum()
    assert torch.equal(projection(embeddings, counts, 24)[0], torch.eye(24, dtype=torch.float64))


def test_svd_projects_what_lies_along_the_hidden_state(teacher: Model, train: TokenSplit) -> None:
    student, theirs = bert(depth=1, width=12, heads=2), state(teacher)
    said = inherit(student, Inherit(layers=[2]), [teacher], train)
    own = state(student)
    counts = torch.bincount(train.ids.long(), minlength=40)
    basis, kept = projection(theirs[WORDS], counts, 12)
    p = basis.float()
    torch.testing.assert_close(own[WORDS], theirs[WORDS] @ p)
    torch.testing.assert_close(own[QUERY.format(0)], theirs[QUERY.format(2)][:12] @ p)
    layer = "bert.encoder.layer.{}.attention.output.dense.{}"
    torch.testing.assert_close(own[layer.format(0, "weight")], p.T @ theirs[layer.format(2, "weight")][:, :12])
    for name in (WORDS.replace("word", "position"), WORDS.replace("word", "token_type")):
        torch.testing.assert_close(own[name], theirs[name] @ p)
    assert f"{kept:.1%}" in said and f"{len(own)} of its {len(own)}" in said


def test_gains_of_a_normalisation_are_weighted_means_and_offsets_projected(teacher: Model, train: TokenSplit) -> None:
    norm = teacher.net.bert.embeddings.LayerNorm
    with torch.no_grad():
        norm.weight.copy_(torch.full((24,), 3.0))
        norm.bias.normal_()
    student = bert(depth=1, width=12, heads=2)
    inherit(student, Inherit(parts="embeddings"), [teacher], train)
    counts = torch.bincount(train.ids.long(), minlength=40)
    basis = projection(state(teacher)[WORDS], counts, 12)[0].float()
    own = student.net.bert.embeddings.LayerNorm
    torch.testing.assert_close(own.weight.data, torch.full((12,), 3.0))
    torch.testing.assert_close(own.bias.data, norm.bias.data @ basis)


def test_the_largest_units_of_a_perceptron_stay(teacher: Model, train: TokenSplit) -> None:
    """Of an equal width: the units whose weights in and out are zero are those that are lost."""
    with torch.no_grad():
        layer = teacher.net.bert.encoder.layer[0]
        dead = torch.arange(96) % 2 == 0
        layer.intermediate.dense.weight[dead] = 0
        layer.intermediate.dense.bias[dead] = 0
    texts = teacher.record.example(4)
    student = bert(depth=1, hidden=48)
    inherit(student, Inherit(layers=[0]), [teacher], train)
    teacher.net.bert.encoder.layer = teacher.net.bert.encoder.layer[:1]
    with torch.no_grad():
        torch.testing.assert_close(student(texts), teacher(texts))
    assert state(student)[HIDDEN.format(0)].equal(state(teacher)[HIDDEN.format(0)][~dead])


def test_truncate_takes_the_first_units(teacher: Model, train: TokenSplit) -> None:
    student, theirs = bert(depth=4, width=12, heads=2), state(teacher)
    said = inherit(student, Inherit(widths="truncate"), [teacher], train)
    for name, value in state(student).items():
        assert value.equal(theirs[name][tuple(slice(size) for size in value.shape)]), name
    assert said.endswith("truncated")


def test_embeddings_alone(teacher: Model, train: TokenSplit) -> None:
    student = bert(depth=2, width=12, heads=2)
    before = state(student)
    inherit(student, Inherit(parts="embeddings"), [teacher], train)
    changed = {name for name, value in state(student).items() if not value.equal(before[name])}
    assert WORDS in changed and all(".embeddings." in name for name in changed)


def test_a_student_of_images_is_truncated_stage_by_stage() -> None:
    teacher, student = image_net("resnet20"), image_net("resnet8")
    inherit(student, Inherit(), [teacher], TokenSplit.of([[1]], torch.zeros(1, dtype=torch.int64), tokens()))
    assert torch.equal(student.net.layer2[0].conv1.weight, teacher.net.layer2[0].conv1.weight)
    wide, narrow = image_net("digits_cnn", width=8), image_net("digits_cnn", width=4)
    inherit(narrow, Inherit(widths="truncate"), [wide], None)  # type: ignore[arg-type]
    name = next(n for n, v in state(narrow).items() if v.ndim == 4 and v.shape[1] == 4)
    assert state(narrow)[name].equal(state(wide)[name][: len(state(narrow)[name]), :4])


# ------------------------------------------------------------------------------------------------------------ sources


def test_a_classifier_of_other_classes_stays_fresh(teacher: Model, train: TokenSplit) -> None:
    student = bert(classes=5)
    before = state(student)
    inherit(student, Inherit(), [teacher], train)
    changed = {name for name, value in state(student).items() if not value.equal(before[name])}
    assert "bert.pooler.dense.weight" in changed and not any(name.startswith("classifier.") for name in changed)


def test_a_saved_model_or_a_published_encoder_is_a_source(teacher: Model, train: TokenSplit, tmp_path: Path) -> None:
    save_model(teacher, tmp_path / "run" / "student")
    encoder = {n.removeprefix("bert."): v for n, v in state(teacher).items() if n.startswith("bert.")}
    (tmp_path / "folder").mkdir()
    safetensors.torch.save_file(encoder, tmp_path / "folder" / "model.safetensors")
    for name in ("run", "folder"):
        student = bert()
        inherit(student, Inherit(source=str(tmp_path / name)), [], train)
        own = state(student)
        assert all(own[f"bert.{n}"].equal(value) for n, value in encoder.items())
        assert own["classifier.weight"].equal(state(teacher)["classifier.weight"]) == (name == "run")
    with pytest.raises(MissingError) as caught:
        inherit(bert(), Inherit(source=str(tmp_path / "nothing")), [], train)
    assert caught.value.problems[0].key == "student.inherit.source"


def test_refused(teacher: Model, train: TokenSplit) -> None:
    """Each with its key, what was got and what is allowed."""
    other = tokens("another")
    cases = [
        (bert(width=32), Inherit(), [teacher], "student.inherit", "is wider than the teacher"),
        (bert(depth=5), Inherit(), [teacher], "student.inherit.layers", "a student of 5 layers inherits from 4"),
        (bert(depth=2), Inherit(layers=[0, 4]), [teacher], "student.inherit.layers", "got layer 4; allowed: 0 to 3"),
        (bert(depth=2), Inherit(layers=[0]), [teacher], "student.inherit.layers", "got 1 layer for a student of 2"),
        (bert(), Inherit(), [], "student.inherit.source", "no teacher"),
        (bert(words=other), Inherit(), [teacher], "student.inherit.source", "by another tokenizer"),
        (bert(embedding=8), Inherit(), [teacher], "student.inherit.widths", "the student's token embeddings are fact"),
        (bert(width=12), Inherit(), [bert(embedding=16)], "student.inherit.widths", "the source's token embeddings"),
        (image_net("resnet8"), Inherit(), [teacher], "student.inherit", "no weights of the names"),
        (image_net("resnet8"), Inherit(parts="embeddings"), [image_net("resnet8")], "student.inherit", "no embeddings"),
        (image_net("digits_cnn", width=4), Inherit(), [image_net("digits_cnn")], "student.inherit.widths", "truncate"),
        (image_net("resnet8"), Inherit(layers=[0]), [image_net("resnet8")], "student.inherit.layers", "3 lists"),
    ]
    for student, wish, teachers, key, words in cases:
        before = state(student)
        with pytest.raises(ConfigError) as caught:
            inherit(student, wish, teachers, train)
        (problem,) = caught.value.problems
        assert problem.key == key and words in f"{problem.message} {problem.hint}" and problem.hint, problem
        assert all(value.equal(before[name]) for name, value in state(student).items())
