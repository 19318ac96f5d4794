"""Models of texts as ONNX files: any number of texts of any length; quantised, compressed, asked about plain texts."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch

from kdctl.analysis.cka import layer_similarity
from kdctl.compress.base import Workbench
from kdctl.compress.drop_layers import DropLayers
from kdctl.compress.low_rank import LowRank
from kdctl.compress.prune import Prune
from kdctl.compress.quantize import Quantize, take
from kdctl.data.tokens import TokenSplit
from kdctl.errors import ConfigError, KdctlError, MissingError
from kdctl.evaluate import TorchPredictor
from kdctl.export import files, manifest
from kdctl.export import onnx as exporting
from kdctl.export.onnx import OnnxPredictor, record_metadata
from kdctl.models.record import ModelRecord, build_model, load_model, save_model
from kdctl.predict import predict_files
from kdctl.signals import TokenInput
from kdctl.tasks.classification import Classification

LENGTHS = (12, 1, 7, 5, 12, 3, 9, 2)
BERT = {"depth": 2, "width": 32, "heads": 2}


def model_of(tokens, structure=None, **arguments):
    torch.manual_seed(0)
    names = ["no", "yes", "maybe"]
    record = ModelRecord("bert", BERT | arguments, 3, names, image_shape=[], tokens=tokens, structure=structure)
    model = build_model(record).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # as initialised, every text has nearly the same logits
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens_of(**others):
    return TokenInput(vocab_size=50, length=12, pad=0, first=1, separator=2, **others)


def some_texts(pairs=False):
    """Texts (8, 12) of several lengths, padded behind."""
    generator = np.random.default_rng(0)
    rows = np.zeros((len(LENGTHS), 12), np.int64)
    for row, length in zip(rows, LENGTHS, strict=True):
        row[:length] = generator.integers(3, 50, length)
        if pairs:
            row[length // 2] = row[length - 1] = 2
    return rows


def furthest(a, b, rows):
    """The largest difference between what two predictors say of the same texts."""
    return np.abs(a(rows) - b(rows)).max()


def write(model, path, quantize=None):
    metadata = record_metadata(model.record.to_dict())
    if quantize is None:
        files.write("onnx", model, path, metadata)
        return {}
    return quantize.convert(model, bench(), model.record.input_shape, path, metadata)


def bench():
    texts = some_texts()
    return Workbench(Classification(), lambda: iter([texts[:3, :7], texts]), lambda: iter([]), lambda p: 0.0, lambda: 0)


@pytest.fixture(scope="module")
def model():
    return model_of(tokens_of())


@pytest.fixture(scope="module", autouse=True)
def graphs_made_once():
    """One export to ONNX for each model of this file, which takes seconds."""
    made, to_graph = {}, exporting.to_graph

    def once(model, shape, opset, fixed):
        key = (model.record.tokens, str(model.record.structure), opset)
        if key not in made:
            made[key] = to_graph(model, shape, opset, fixed)
        return copy.deepcopy(made[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "to_graph", once)
        yield


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "model.onnx"
    write(model, path)
    return path


def test_logits_of_texts_of_any_number_and_length(model, exported):
    predictor, texts = OnnxPredictor(exported, 1), some_texts()
    for count, width in ((8, 12), (1, 12), (3, 7), (2, 1)):
        assert furthest(predictor, TorchPredictor(model), texts[:count, :width]) < 1e-4
    own = np.concatenate([predictor(row[None, :n]) for row, n in zip(texts, LENGTHS, strict=True)])
    np.testing.assert_allclose(predictor(texts), own, atol=1e-4)
    assert np.ptp(own, axis=0).min() > 0.1


def test_second_text_of_a_pair_is_told_apart(tmp_path):
    """Of a net without its first layer, as drop_layers leaves it."""
    skipped = [{"edit": "skip", "path": "bert.encoder.layer.0"}]
    model, texts = model_of(tokens_of(pairs=True), skipped), some_texts(pairs=True)
    write(model, tmp_path / "model.onnx")
    predictor = OnnxPredictor(tmp_path / "model.onnx", 1)
    assert furthest(predictor, TorchPredictor(model), texts) < 1e-4
    assert predictor.tokens.pairs
    assert furthest(predictor, TorchPredictor(model_of(tokens_of(), skipped)), texts) > 1e-2


def test_file_states_what_it_takes(model, exported):
    predictor = OnnxPredictor(exported, 1)
    assert (predictor.input, predictor.image_shape, predictor.num_classes) == ("tokens", (12,), 3)
    assert (predictor.tokens.vocab_size, predictor.tokens.length, predictor.tokens.pad) == (50, 12, 0)
    assert predictor.metadata["record"]["tokens"]["separator"] == 2
    described = manifest.describe(
        predictor, target="onnx", variant="onnx", model=exported.name, source="train", folder=exported.parent
    )
    wanted = {"name": "tokens", "shape": ["batch", "length"], "dtype": "int64", "layout": "NL"}
    assert described["inputs"] == [wanted]
    assert described["preprocessing"]["tokens"]["vocab_size"] == 50
    for wrong in (np.zeros((2, 13), np.int64), np.zeros((2, 12), np.float32), np.zeros((2, 3, 4, 4), np.float32)):
        with pytest.raises(KdctlError, match="token numbers, int64"):
            predictor(wrong)


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_int8(model, exported, tmp_path, mode):
    path = tmp_path / "model.onnx"
    how = "auto" if mode == "dynamic" else mode
    assert write(model, path, Quantize(mode=how))["mode"] == mode
    apart = furthest(OnnxPredictor(path, 1), OnnxPredictor(exported, 1), some_texts())
    spread = np.ptp(OnnxPredictor(exported, 1)(some_texts()))
    assert 0 < apart < 0.1 * spread
    stored = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    tables = [t for t in stored.values() if tuple(t.dims) == (50, 32)]
    assert [t.data_type for t in tables] == [onnx.TensorProto.INT8]
    kept = tmp_path / "kept.onnx"
    write(model, kept, Quantize(mode=how, keep=["bert.embeddings.word_embeddings"]))
    tables = [t for t in onnx.load(kept).graph.initializer if tuple(t.dims) == (50, 32)]
    assert [t.data_type for t in tables] == [onnx.TensorProto.FLOAT]


def test_half_precision(model, exported, tmp_path):
    write(model, tmp_path / "model.onnx", Quantize(dtype="fp16"))
    apart = furthest(OnnxPredictor(tmp_path / "model.onnx", 1), OnnxPredictor(exported, 1), some_texts())
    assert 0 < apart < 0.02
    tables = [t for t in onnx.load(tmp_path / "model.onnx").graph.initializer if tuple(t.dims) == (50, 32)]
    assert [t.data_type for t in tables] == [onnx.TensorProto.FLOAT16]


def test_what_is_not_there_yet_is_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="cannot be int8-static yet"):
        write(model, tmp_path / "model.onnx", Quantize(mode="static"))
    with pytest.raises(ConfigError, match="torchscript files are of models of images so far"):
        files.write("torchscript", model, tmp_path / "model.pt", {})
    with pytest.raises(ConfigError, match="prune is for models of images so far"):
        Prune().reshape(model, bench())
    assert not list(tmp_path.iterdir())


def test_layers_are_dropped(model, tmp_path):
    made = DropLayers(blocks=1, choose="output").reshape(model, bench())
    assert made.details["blocks"] == [f"bert.encoder.layer.{i}" for i in range(2)]
    harm = made.details["effect"][0]
    assert made.details["dropped"] == [min(harm, key=harm.get)]
    save_model(made.model, tmp_path / "model")
    shallow = load_model(tmp_path / "model")
    assert made.details["macs"][1] < 0.7 * made.details["macs"][0]
    reference = model_of(tokens_of(), depth=1)
    assert sum(p.numel() for p in shallow.parameters()) == sum(p.numel() for p in reference.parameters())
    texts = torch.from_numpy(some_texts())
    assert torch.equal(shallow(texts), made.model(texts)) and not torch.equal(shallow(texts), model(texts))


def test_linears_of_low_rank(model):
    made = LowRank(keep_ratio=0.5, round_to=1).reshape(model, bench())
    assert made.details["macs"]["after"] < 0.7 * made.details["macs"]["before"]
    assert all(layer["path"].startswith("bert.encoder.layer.") for layer in made.details["layers"])
    assert made.model(torch.from_numpy(some_texts())).isfinite().all()


def test_calibration_texts_have_one_length():
    texts = some_texts()
    taken = take(iter([texts[:3, :7], texts]), 5, (12,), 0)
    np.testing.assert_array_equal(taken[:3], np.pad(texts[:3, :7], ((0, 0), (0, 5))))
    np.testing.assert_array_equal(taken[3:], texts[:2])


def test_layers_of_texts_are_compared_without_their_padding(model):
    generator = np.random.default_rng(1)
    rows = [generator.integers(3, 50, n) for n in generator.integers(2, 13, 150)]
    split = TokenSplit.of(rows, torch.zeros(150, dtype=torch.int64), model.record.tokens)
    mine, other, matrix, count = layer_similarity(model, model, split)
    assert count == 150 and mine == other and "bert.encoder.layer.1" in mine
    np.testing.assert_allclose(np.diag(matrix), 1, atol=1e-3)


def test_plain_texts_are_predicted(tmp_path):
    from kdctl.data.tokenizer import FILE, Tokenizer

    pytest.importorskip("tokenizers")
    tokenizer = Tokenizer.trained(["a fine film", "a dull film", "fine and dull"] * 4, 60)
    model = model_of(tokenizer.tokens(12))
    predictor = TorchPredictor(model)
    (tmp_path / "in.txt").write_text("a fine film\n\na dull film and a fine film\nfilm", encoding="utf-8")
    place = str(tmp_path / "in.txt")
    with pytest.raises(MissingError, match="there is no tokenizer"):
        predict_files(predictor, [place], home=tmp_path)
    (tmp_path / FILE).write_text(tokenizer.text, encoding="utf-8")
    said = predict_files(predictor, [place, str(tmp_path / "none.txt")], home=tmp_path)
    assert [row["input"] for row in said["predictions"]] == [f"{place}:{line}" for line in (1, 3, 4)]
    for text, row in zip(("a fine film", "a dull film and a fine film", "film"), said["predictions"], strict=True):
        (numbers,) = tokenizer.encode([text], None, 12)
        logits = model(torch.tensor([numbers]))
        assert row["probability"] == pytest.approx(logits.softmax(1).max().item(), abs=1e-4)
        assert row["label"] == model.record.class_names[int(logits.argmax())]
    assert [row["input"] for row in said["failed"]] == [str(tmp_path / "none.txt")]
    (tmp_path / FILE).write_text(Tokenizer.trained(["other words here"] * 3, 40).text, encoding="utf-8")
    with pytest.raises(KdctlError, match="is not the tokenizer that this model was trained with"):
        predict_files(predictor, [place], home=tmp_path)
