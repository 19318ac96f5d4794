"""Runs with models of the transformers library: one teaches a `bert`, and a student leaves Python as an ONNX file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdctl.compress.drop_layers import residual_blocks, without
from kdctl.data.tokenizer import Tokenizer
from kdctl.errors import ConfigError
from kdctl.evaluate import evaluate_run
from kdctl.experiment import load_run
from kdctl.export import files
from kdctl.models.record import load_model, save_model
from kdctl.signals import find_logits
from kdctl.torchvision_guard import ensure_torchvision

pytest.importorskip("tokenizers")
ensure_torchvision()
transformers = pytest.importorskip("transformers")

TRAINED = """
name: student
task: {kind: text_classification}
data: {kind: text, root: texts, test: test.tsv, max_length: 12, tokenizer: ./tiny, batch_size: 16}
student: {kind: "huggingface:./tiny", weights: pretrained, num_hidden_layers: 1}
optimizer: {kind: adamw, lr: 0.01}
train: {epochs: 1, device: cpu, threads: 1}
"""
TAUGHT = (
    TRAINED.replace('{kind: "huggingface:./tiny", weights: pretrained, num_hidden_layers: 1}', "{kind: bert, depth: 1}")
    + """
teacher: {kind: "huggingface:./tiny", weights: pretrained, attention: eager, control: true}
losses:
  - {kind: kd, weight: 1, T: 2}
  - kind: attention_mse
    weight: 0.1
    taps: [{student: bert.encoder.layer.0.attention.self.softmax, teacher: bert.encoder.layer.1.attention.self.1}]
"""
)


@pytest.fixture(autouse=True)
def tiny(folder: Path) -> Path:
    """A BERT of two layers in a folder with its tokenizer, and texts beside it."""
    (folder / "texts").mkdir()
    lines = [f"{'the film ' * (n % 5)}{('bad', 'good')[n % 2]}\t{('neg', 'pos')[n % 2]}" for n in range(48)]
    for name, some in (("train", lines), ("test", lines[:10])):
        (folder / "texts" / f"{name}.tsv").write_text("\n".join(["text\tlabel", *some]))
    tokenizer = Tokenizer.trained([line.split("\t")[0] for line in lines], 60)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=tokenizer.tokens(12).vocab_size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16,
    )  # fmt: skip
    net = transformers.BertForSequenceClassification(config)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    net.save_pretrained(folder / "tiny")
    (folder / "tiny" / "tokenizer.json").write_text(tokenizer.text)
    return folder / "tiny"


def test_it_teaches_with_its_attention(folder: Path, run_it: Callable[..., Any]) -> None:
    run, _ = run_it(text=TAUGHT)
    (line,) = (line for line in run.metrics() if line["stage"] == "student")
    assert all(0 < line["terms"][name] < 100 for name in ("kd", "attention_mse"))
    (folder / "tiny" / "tokenizer.json").write_text(Tokenizer.trained(["another"], 60).text)
    with pytest.raises(ConfigError, match="another tokenizer") as caught:
        run_it("name=other", f"data.tokenizer={run.path}/tokenizer.json", text=TAUGHT)
    assert caught.value.problems[0].key == "teacher.weights"


def test_a_run_needs_no_folder_and_becomes_an_onnx_file(
    folder: Path, tmp_path: Path, run_it: Callable[..., Any]
) -> None:
    run, _ = run_it(text=TRAINED)
    before = evaluate_run(run, load_run(run))["metrics"]
    shutil.move(folder / "tiny" / "config.json", tmp_path / "away.json")
    (folder / "tiny" / "model.safetensors").unlink()
    assert evaluate_run(run, load_run(run))["metrics"] == before
    model = load_model(run.path)
    files.write("onnx", model, tmp_path / "student.onnx", {})
    predictor = files.open_file("onnx", tmp_path / "student.onnx", 1)
    numbers = torch.tensor([[2, 7, 8, 9, 3], [2, 7, 3, 0, 0]])
    for some in (numbers, numbers[1:, :3]):
        with torch.no_grad():
            wanted = find_logits(model(some)).numpy()
        np.testing.assert_allclose(predictor(some.numpy()), wanted, rtol=1e-4, atol=1e-5)


def test_layers_can_be_left_out(folder: Path, tmp_path: Path, run_it: Callable[..., Any]) -> None:
    run, _ = run_it("student.num_hidden_layers=2", text=TRAINED)
    model = load_model(run.path)
    assert residual_blocks(model) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    shallow = without(model, ["bert.encoder.layer.1"])
    numbers = torch.tensor([[2, 7, 8, 9, 3]])
    with torch.no_grad():
        found = find_logits(shallow(numbers))
        assert not torch.allclose(found, find_logits(model(numbers)))
        save_model(shallow, tmp_path / "shallow")
        assert torch.equal(find_logits(load_model(tmp_path / "shallow")(numbers)), found)
