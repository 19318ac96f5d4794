"""A runtime in an environment of its own: conversion, reading and running there are the same, and so are the errors.

The other environment is this one: `pretended` stands in for a target whose library only the child process sees.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kdctl.errors import ConfigError, KdctlError, MissingError
from kdctl.export import elsewhere, files
from kdctl.export.base import Contents, Learned, Quantization
from kdctl.models.record import ModelRecord, build_model

SHAPE = (1, 2, 3)
IMAGES = np.random.default_rng(0).random((4, *SHAPE), dtype=np.float32)

TARGET = '''
"""A target for tests: a file is JSON; its logits are sums over each image, times what the file says."""

import json
import os
from pathlib import Path

import numpy as np

from kdctl import __version__
from kdctl.errors import ConfigError, Problem
from kdctl.export import elsewhere
from kdctl.export.base import Contents, Exporter, FilePredictor


class Pretended(Exporter):
    target, file_name, quantizations = "pretended", "model.json", ("int8-static",)

    def __init__(self, *, factor: int = 1):
        self.factor = factor

    def convert(self, model, image_shape, out, metadata, quantization=None):
        told = {"metadata": metadata, "factor": self.factor, "shape": list(image_shape)}
        told["weight"] = float(next(model.parameters()).detach().sum())
        if quantization is not None:
            scales = {path: found.weight_scale.tolist() for path, found in quantization.learned.items()}
            ranges = {path: found.input_range for path, found in quantization.learned.items()}
            told |= {"images": float(quantization.images.sum()), "keep": sorted(quantization.keep), "scales": scales}
            told |= {"ranges": ranges, "mode": quantization.mode}
        out.write_text(json.dumps(told))


class Predictor(FilePredictor):
    runtime, num_classes, class_names, fixed_batch = "pretended 1", 2, ["a", "b"], None

    def __init__(self, path, threads):
        told = json.loads(path.read_text())
        print("a greeting on stdout")
        self.image_shape, self.factor = tuple(told["shape"]), told["factor"]
        self.metadata = {"threads": threads, "record": {"link": "sigmoid"}}

    def __call__(self, images):
        if images.max() > 90:
            os._exit(7)
        if images.max() > 9:
            raise ConfigError(Problem("too bright"))
        sums = images.sum((1, 2, 3))
        return np.stack([sums, self.factor * sums], 1).astype(np.float32)


def open_predictor(path, threads=None):
    return Predictor(path, threads)


def inspect(path):
    if path.name == "config":
        raise ConfigError(Problem("no such thing", key="mode", hint="another"))
    if path.name == "bug":
        raise ValueError("a bug")
    if path.name == "dead":
        os._exit(9)
    return Contents(1, 2, 3, 4, None, {"ADD": 1}, 0.5)
'''


@pytest.fixture(scope="module")
def pretended(tmp_path_factory):
    """A target that only a child process has: it finds the module, and the library it needs, on a path of its own."""
    folder = tmp_path_factory.mktemp("pretended")
    (folder / "site").mkdir()
    (folder / "site" / "a_library_of_tests.py").write_text("")
    (folder / "site" / "pretended.py").write_text(TARGET)
    start = (
        "import sys\nimport kdctl.export as export\nfrom kdctl.export import elsewhere\n"
        f"sys.path.insert(0, {str(folder / 'site')!r})\n"
        f"export.__path__.append({str(folder / 'site')!r})\n"
        "elsewhere.LIBRARIES['pretended'] = ('a_library_of_tests',)\n"
        "export.EXPORTERS['pretended'] = ('pretended:Pretended', 'for tests')\n"
        "from kdctl.export import guest\nguest.main(sys.argv[3:])\n"
    )
    (folder / "start.py").write_text(start)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{folder / "start.py"}" "$@"\n')
    python.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(elsewhere.LIBRARIES, "pretended", ("a_library_of_tests",))
        patch.setenv("KDCTL_PRETENDED_PYTHON", str(python))
        yield python


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(ModelRecord("mlp", {"hidden": [3]}, 2, ["a", "b"], list(SHAPE))).eval()


@pytest.fixture(scope="module")
def converted(pretended, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "model.json"
    learned = {"fc": Learned(np.array([0.5, 0.25], np.float32), 4, (-1.0, 2.0)), "other": Learned(np.float32(1))}
    quantization = Quantization(images=IMAGES, keep=frozenset({"b", "a"}), learned=learned)
    elsewhere.convert("pretended", {"factor": 2}, model, SHAPE, out, {"class_names": ["ä"]}, quantization)
    return out


def test_all_of_a_request_arrives(converted, model):
    told = json.loads(converted.read_text())
    assert told["metadata"] == {"class_names": ["ä"]}
    assert (told["factor"], told["shape"], told["keep"], told["mode"]) == (2, list(SHAPE), ["a", "b"], "static")
    assert told["images"] == pytest.approx(float(IMAGES.sum()))
    assert told["scales"] == {"fc": [0.5, 0.25], "other": 1.0}
    assert told["ranges"] == {"fc": [-1.0, 2.0], "other": None}
    assert told["weight"] == pytest.approx(float(next(model.parameters()).detach().sum()))


@pytest.fixture
def predictor(converted):
    return elsewhere.open_predictor("pretended", converted, threads=3)


def test_batches_go_there_and_come_back(predictor):
    assert (predictor.runtime, predictor.image_shape, predictor.num_classes) == ("pretended 1", SHAPE, 2)
    assert (predictor.class_names, predictor.fixed_batch, predictor.link) == (["a", "b"], None, "sigmoid")
    assert predictor.metadata == {"threads": 3, "record": {"link": "sigmoid"}}
    for n in (1, 50000, 2):
        images = np.random.default_rng(n).random((n, *SHAPE), dtype=np.float32)
        sums = images.sum((1, 2, 3))
        np.testing.assert_allclose(predictor(images), np.stack([sums, 2 * sums], 1), rtol=1e-5)
    wrong = np.zeros((2, 1, 3, 2), np.float32)
    with pytest.raises(KdctlError, match=r"takes images \(N, 1, 2, 3\); these are \(2, 1, 3, 2\)"):
        predictor(wrong)
    process = predictor._process
    assert process.poll() is None and os.getpgid(process.pid) == process.pid  # Ctrl-C is for this process alone
    predictor.close()
    assert process.poll() is not None


def test_errors_and_deaths_are_told(predictor):
    image = np.ones((1, *SHAPE), np.float32)
    with pytest.raises(ConfigError, match="too bright"):
        predictor(image * 10)
    assert predictor(image)[0, 0] == 6  # it goes on
    with pytest.raises(KdctlError, match="ended with code 7"):
        predictor(image * 100)


def test_replies_of_one_action(pretended):
    assert elsewhere.inspect("pretended", Path("file")) == Contents(1, 2, 3, 4, None, {"ADD": 1}, 0.5)
    with pytest.raises(ConfigError) as caught:
        elsewhere.inspect("pretended", Path("config"))
    assert (caught.value.problems[0].key, caught.value.problems[0].hint) == ("mode", "another")
    with pytest.raises(KdctlError, match="ValueError: a bug"):
        elsewhere.inspect("pretended", Path("bug"))
    with pytest.raises(KdctlError, match="ended with code 9"):
        elsewhere.inspect("pretended", Path("dead"))


def test_interpreters_that_do_not_do(pretended, tmp_path, monkeypatch):
    monkeypatch.setenv("KDCTL_PRETENDED_PYTHON", str(tmp_path))
    with pytest.raises(MissingError, match="that is no Python"):
        elsewhere.python_of("pretended")
    monkeypatch.delenv("KDCTL_PRETENDED_PYTHON")
    with pytest.raises(MissingError, match=r"pretended is not installed .*kdctl\[pretended\].*KDCTL_PRETENDED_PYTHON"):
        elsewhere.python_of("pretended")
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setenv("KDCTL_PRETENDED_PYTHON", str(bare))
    with pytest.raises(MissingError, match=r"lacks what it needs: .*No module named"):
        elsewhere.inspect("pretended", tmp_path)
    monkeypatch.setenv("KDCTL_PRETENDED_PYTHON", sys.executable)  # kdctl is there, the library is not
    with pytest.raises(KdctlError, match="pretended"):
        elsewhere.inspect("pretended", tmp_path)


def test_another_version_is_refused(pretended, tmp_path, monkeypatch):
    monkeypatch.setattr(elsewhere, "__version__", "9.9")
    with pytest.raises(MissingError, match=r"the other environment has kdctl .*, this one 9\.9"):
        elsewhere.inspect("pretended", tmp_path)


def test_here_it_is_this_interpreter():
    assert elsewhere.python_of("onnx") == sys.executable
    assert elsewhere.is_here("onnx")


def test_no_library_no_variable_names_the_extra(model, tmp_path, monkeypatch):
    monkeypatch.setitem(elsewhere.LIBRARIES, "litert", ("no_such_library",))
    monkeypatch.delenv("KDCTL_LITERT_PYTHON", raising=False)
    with pytest.raises(MissingError, match=r"kdctl\[litert\].*KDCTL_LITERT_PYTHON") as caught:
        files.write("litert", model, tmp_path / "m.tflite", {})
    assert caught.value.code == 4
    assert os.listdir(tmp_path) == []


def test_files_of_a_target_that_is_not_here_go_there(model, tmp_path, monkeypatch):
    monkeypatch.setitem(elsewhere.LIBRARIES, "onnx", ("no_such_library",))
    asked, path = [], tmp_path / "model.onnx"
    for name in ("convert", "open_predictor", "inspect"):
        monkeypatch.setattr(elsewhere, name, lambda *given, name=name: asked.append((name, *given)))
    files.write("onnx", model, path, {}, None, {"opset": 19})
    files.open_file("onnx", path, 2)
    files.inspect("onnx", path)
    assert asked == [
        ("convert", "onnx", {"opset": 19}, model, SHAPE, path, {}, None),
        ("open_predictor", "onnx", path, 2),
        ("inspect", "onnx", path),
    ]
