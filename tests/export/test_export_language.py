"""Language models as files: logits of each token, whole and pruned, and artefacts of a run measured by perplexity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kdctl import build, runs
from kdctl.artefacts.measure import evaluate_artefact
from kdctl.artefacts.yardstick import Yardstick
from kdctl.compress.prune_heads import attentions, without
from kdctl.config.expand import load_experiment
from kdctl.evaluate import TorchPredictor, evaluate_run
from kdctl.experiment import Plan, load_run, train
from kdctl.export import files
from kdctl.export.onnx import OnnxPredictor, record_metadata
from kdctl.models.generate import continued
from kdctl.models.record import Model, ModelRecord, build_model, load_model
from kdctl.signals import TokenInput
from kdctl.watch import Reporter

TOKENS = TokenInput(vocab_size=40, length=10, pad=0, first=1, separator=2)
FILE = """
name: small
task: {kind: causal_lm}
data: {kind: corpus, root: texts, units: characters, max_length: 16, batch_size: 16, val_share: 0.1, test_share: 0.1}
student: {kind: gpt, depth: 2, width: 16, heads: 2}
optimizer: {kind: adamw, lr: 0.01}
train: {epochs: 1, device: cpu, threads: 1, precision: fp32, layout: contiguous}
compress:
  - {kind: prune_heads, heads: 1, units: 0.25, name: fewer}
  - {kind: finetune, epochs: 1}
  - {kind: quantize, dtype: int8}
"""


@pytest.fixture(scope="module")
def pruned() -> Model:
    torch.manual_seed(0)
    arguments = {"depth": 2, "width": 24, "heads": 3}
    model = build_model(ModelRecord("gpt", arguments, 40, [], [], tokens=TOKENS, head="vocabulary")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return without(model, {attentions(model.net)[0]: [1], attentions(model.net)[1]: [0, 2]})


def test_a_pruned_decoder_as_a_file_of_any_number_and_length(pruned: Model, tmp_path: Path) -> None:
    texts = np.random.default_rng(0).integers(3, 40, (6, 10))
    texts[2, 4:] = 0
    files.write("onnx", pruned, tmp_path / "model.onnx", record_metadata(pruned.record.to_dict()))
    predictor, own = OnnxPredictor(tmp_path / "model.onnx", 1), TorchPredictor(pruned)
    for count, width in ((6, 10), (1, 10), (3, 4), (2, 1)):
        some = texts[:count, :width]
        assert predictor(some).shape == (count, width, 40)
        assert np.abs(predictor(some) - own(some)).max() < 1e-4
    assert predictor.num_classes == 40


def test_a_pruned_decoder_writes_with_its_keys_kept(pruned: Model) -> None:
    start = torch.tensor([[3, 4, 5], [6, 7, 8]])
    written = continued(pruned, start, 10, None, temperature=0)
    with torch.no_grad():
        logits = pruned(written[:, :-1])
    logits[..., TOKENS.pad] = -torch.inf
    assert torch.equal(written[:, 3:], logits.argmax(2)[:, 2:])


def test_artefacts_of_a_run_are_measured_by_perplexity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Yardstick, "timed", property(lambda self: False, lambda self, given: None), raising=False)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.txt").write_text("the cat sat on a mat and slept " * 40)
    Path("file.yaml").write_text(FILE)
    done = train(Plan(load_experiment("file.yaml").experiment, FILE), Reporter())
    run = runs.Run(Path(done["run"]))
    fewer, _, int8 = done["artefacts"]
    before = evaluate_run(run, load_run(run))["metrics"]
    assert int8["before"]["metrics"] == pytest.approx(before)
    assert fewer["after"]["parameters"] < fewer["before"]["parameters"]
    assert int8["after"]["metrics"]["perplexity"] == pytest.approx(np.exp(int8["after"]["metrics"]["nll"]))
    again = evaluate_artefact(run, load_run(run), run / "artefacts" / int8["variant"], "test")
    assert again["metrics"] == pytest.approx(int8["after"]["metrics"], rel=1e-5)
    data, model = build.build_data(load_run(run)), load_model(run.stage_dir("finetune") / "model")
    assert data.test is not None
    largest = 0.0
    for row in range(len(data.test)):
        (tokens,) = data.test.fetch(torch.tensor([row]))
        log_p = model(tokens[None])[0, :-1].detach().log_softmax(1)
        largest = max(largest, -float(log_p[torch.arange(len(tokens) - 1), tokens[1:]].min()))
    assert int8["largest_logit"] == pytest.approx(largest, rel=1e-5)  # of log probabilities, not of numbers of tokens
    assert 0 < int8["max_abs_diff"] < 0.2
