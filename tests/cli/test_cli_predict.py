"""predict, called as a user calls it: it says of files what evaluation says of the same images."""

from __future__ import annotations

import json
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdctl import predict as predicting
from kdctl import runs
from kdctl.cli import app
from kdctl.data.digits import Digits
from kdctl.evaluate import TorchPredictor, quick
from kdctl.evaluate import predict as predict_split
from kdctl.export import manifest
from kdctl.export.onnx import Onnx, open_predictor, record_metadata
from kdctl.export.torchscript import TorchScript
from kdctl.export.torchscript import open_predictor as open_torchscript
from kdctl.models.record import ModelRecord, build_model, load_model, save_model
from kdctl.tasks.classification import Classification

CLASSES = [f"class {digit}" for digit in range(10)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run without data, teacher or training, its student as an ONNX file, and the digits' test images as PNG."""
    home = tmp_path_factory.mktemp("predict")
    run = home / "runs" / "mine" / "001"
    torch.manual_seed(1)
    statistics = {"mean": [0.3], "std": [0.38]}
    model = build_model(ModelRecord("digits_cnn", {"width": 4}, 10, CLASSES, [1, 8, 8], statistics)).eval()
    save_model(model, run / "student")
    runs.write_json(run / "run.json", {"created": "2030", "role": "main", "status": "done"})
    (run / "config.yaml").write_text("data: {kind: npz, path: nowhere.npz}\n")
    file = run / "artefacts" / "onnx" / "model.onnx"
    file.parent.mkdir(parents=True)
    Onnx().convert(model, (1, 8, 8), file, record_metadata(model.record.to_dict()))
    made = manifest.describe(
        open_predictor(file, 1), target="onnx", variant="onnx", model=file.name, source="student", folder=file.parent
    )
    runs.write_json(file.parent / manifest.NAME, made)
    images = Digits().load().test.images.numpy()[:, 0]
    for number, image in enumerate(images):
        path = home / "images" / str(number // 100) / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    np.save(home / "grey.npy", images)
    return home


@pytest.fixture
def call(home, monkeypatch, capsys):
    monkeypatch.chdir(home)

    def call(*arguments: str) -> tuple[int, dict, str]:
        code = app.run(["predict", *arguments, "--json"])
        seen = capsys.readouterr()
        return code, json.loads(seen.out), seen.err

    return call


@pytest.fixture(scope="module")
def expected(home):
    """Probabilities of the test split, computed from the logits of evaluation."""
    model = quick(load_model(home / "runs" / "mine" / "001"))
    logits = predict_split(TorchPredictor(model), Digits().load().test, Classification(), 512).logits.astype(np.float64)
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum(1, keepdims=True)


def probabilities(document: dict) -> np.ndarray:
    found = np.zeros((document["samples"], 10))
    for row, prediction in zip(found, document["predictions"], strict=True):
        for each in prediction["top"]:
            row[each["class"]] = each["probability"]
    return found


@pytest.mark.parametrize("what", ["mine", "runs/mine/001/artefacts/onnx"])
def test_files_are_predicted_as_evaluation_does(call, expected, what):
    code, document, _ = call(what, "--input", "images", "--top", "10")
    assert (code, document["samples"], document["failed"]) == (0, 500, [])
    assert document["predictions"][123]["input"] == "images/1/123.png"
    np.testing.assert_allclose(probabilities(document), expected, atol=1e-5)
    best = [row["class"] for row in document["predictions"]]
    assert (np.array(best) == expected.argmax(1)).mean() > 0.995 and len(set(best)) > 1
    first = document["predictions"][0]
    assert first["label"] == CLASSES[first["class"]] and first["probability"] == first["top"][0]["probability"]


def test_arrays_in_every_layout(call, expected, home):
    grey = np.load(home / "grey.npy")[:4]
    arrays = {
        "nhw": grey,
        "nhwc": np.repeat(grey[..., None], 3, 3),
        "nchw": (grey[:, None] / 255).astype(np.float32),
        "float64": np.repeat(grey[:, None] / 255, 3, 1),
        "targets": np.arange(4),
    }
    np.savez(home / "all.npz", **arrays)
    code, document, _ = call("--input", "all.npz", "grey.npy", "--top", "10")
    assert code == 0
    names = [row["input"] for row in document["predictions"]]
    assert names[:5] == ["all.npz:nhw[0]", "all.npz:nhw[1]", "all.npz:nhw[2]", "all.npz:nhw[3]", "all.npz:nhwc[0]"]
    found = probabilities(document)
    np.testing.assert_allclose(found[:16], np.tile(expected[:4], (4, 1)), atol=1e-5)
    np.testing.assert_allclose(found[16:], expected, atol=1e-5)


def test_sizes_and_colours_are_the_pipelines(home, tmp_path):
    """A larger colour image: a file and an array of it are taken alike, and as an image folder would read it."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "big.png")
    np.save(tmp_path / "big.npy", pixels[None])
    np.save(tmp_path / "float.npy", (pixels[None] / 255).astype(np.float32))
    places = [str(tmp_path / name) for name in ("big.png", "big.npy", "float.npy")]
    for shape in ((1, 8, 8), (3, 8, 8), (3, 10, 16)):
        file, array, real = (sample.pixels for sample in predicting.samples(places, shape))
        assert file.shape == shape and file.dtype == np.float32
        np.testing.assert_array_equal(file, array)
        np.testing.assert_allclose(real, file, atol=2 / 255)


def test_what_cannot_be_read_does_not_lose_the_others(call, home):
    (home / "damaged.png").write_bytes((home / "images/0/000.png").read_bytes()[:40])
    np.save(home / "bytes.npy", np.full((1, 8, 8), 200.0))
    np.save(home / "flat.npy", np.zeros(8))
    np.save(home / "counts.npy", np.zeros((1, 8, 8), np.int64))
    (home / "empty").mkdir(exist_ok=True)
    wrong = ["damaged.png", "bytes.npy", "flat.npy", "counts.npy", "empty", "gone.png"]
    code, document, _ = call("mine", "--input", "images/0/001.png", *wrong, "images/0/002.png")
    assert code == 1 and not document["ok"]
    assert [row["input"] for row in document["predictions"]] == ["images/0/001.png", "images/0/002.png"]
    assert [error["file"] for error in document["errors"]] == wrong
    messages = [error["message"] for error in document["errors"]]
    for message, part in zip(messages, ["image", "0, 1", "shape", "int64", "no image", "no such"], strict=True):
        assert part in message


def test_lines_of_json(call, home):
    code, document, _ = call("--input", "images/0/000.png", "--input", "gone.npy", "-o", "out/p.jsonl", "--top", "2")
    assert code == 1
    lines = [json.loads(line) for line in (home / "out/p.jsonl").read_text().splitlines()]
    assert lines[0] == document["predictions"][0] and len(lines[0]["top"]) == 2
    assert lines[1]["input"] == "gone.npy" and "no such" in lines[1]["message"]


def test_for_people(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    assert app.run(["predict", "--input", "images/0/000.png", "--top", "2"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("images/0/000.png  class ") and "%" not in line


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["mine"], 2, "no file to predict"),
        (["nobody", "--input", "grey.npy"], 4, "no run at 'nobody'"),
        (["mine", "latest", "--input", "grey.npy"], 2, "one run is enough"),
        (["runs/mine/001/artefacts/onnx", "--device", "cpu", "--input", "grey.npy"], 2, "its own runtime"),
    ],
)
def test_wrong_calls(call, arguments, code, part):
    found, document, _ = call(*arguments)
    assert found == code and part in document["errors"][0]["message"]


def test_softmax_is_that_of_float64():
    logits = np.array([[1000.0, 999.0], [0.0, -1e4], [np.nan, 0.0]], dtype=np.float32)
    found = predicting.softmax(logits)
    np.testing.assert_allclose(found[0], [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))], rtol=1e-15)
    assert found[1].tolist() == [1.0, 0.0] and np.isnan(found[2]).all()


def test_a_file_of_any_runtime_knows_what_its_logits_are(tmp_path, home):
    """Of several classes a sample, one of them as good as impossible, in a runtime that is not ONNX Runtime."""
    model = build_model(ModelRecord("digits_cnn", {"width": 4}, 10, CLASSES, [1, 8, 8], link="sigmoid")).eval()
    with torch.no_grad():
        model.net.fc.bias.copy_(torch.tensor([-800.0, 30.0, 40.0, *[-30.0] * 7]))
    TorchScript().convert(model, (1, 8, 8), tmp_path / "model.torchscript", record_metadata(model.record.to_dict()))
    predictor = open_torchscript(tmp_path / "model.torchscript", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (said,) = predicting.predict_files(predictor, [str(home / "images/0/000.png")], top=10)["predictions"]
    assert [one["class"] for one in said["labels"]] == [2, 1]
    assert said["top"][-1] == {"label": "class 0", "class": 0, "probability": 0.0}


def test_an_artefact_that_was_changed_is_refused(call, home):
    path = Path("runs/mine/001/artefacts/onnx/model.onnx")
    whole = path.read_bytes()
    try:
        path.write_bytes(whole + b"x")
        code, document, _ = call(str(path.parent), "--input", "grey.npy")
        assert code == 1 and "checksum" in document["errors"][0]["message"]
    finally:
        path.write_bytes(whole)


def test_a_bar_counts_every_image(home, monkeypatch):
    """Of files as many as there are, known before; of a split as many as it has."""
    seen = []

    @contextmanager
    def bar(what, total):
        seen.append([total, 0])

        def advance(number):
            seen[-1][1] += number

        yield advance

    monkeypatch.chdir(home)
    predictor = predicting.open_student(runs.find("mine"))
    predicting.predict_files(predictor, ["images/0", "gone.png"], bar=bar)
    predicting.predict_files(predictor, ["images/0", "grey.npy"], bar=bar)
    predict_split(predictor, Digits().load().test, Classification(), 64, bar)
    assert seen == [[101, 101], [None, 600], [500, 500]]
