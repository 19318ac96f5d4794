"""What a stage of compression or export would fail by is told before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdctl.config.schema import Experiment
from kdctl.errors import ConfigError, MissingError
from kdctl.experiment import Plan, train
from kdctl.export import elsewhere, openvino
from kdctl.watch import Reporter

REFUSED = [
    ("{kind: drop_layers}", "stages.drop_layers-0.25", "no residual block"),
    ("{kind: prune, skip: [layer9]}", "stages.prune-0.5.skip", "no layer is called 'layer9'"),
    ("{kind: prune_heads}", "stages.prune_heads-0.25.heads", "has no attention"),
    ("{kind: sparsify, skip: [layer9]}", "stages.sparsify-0.5.skip", "layer9"),
    ("{kind: quantize, keep: [layer9]}", "stages.int8", "'layer9' matches no layer"),
]


class Untrained(Reporter):
    """No step may be made."""

    def step(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
        raise AssertionError("something was trained")


@pytest.fixture
def refused(experiment: Callable[..., Experiment], folder: Path) -> Callable[..., Any]:
    """The error of the small experiment with an override, raised before the first step; no run is left."""

    def go(override: str, error: type[Exception] = ConfigError) -> Any:
        with pytest.raises(error) as caught:
            train(Plan(experiment(override), ""), Untrained())
        assert not list(folder.glob("runs/small/[0-9]*"))
        return caught.value

    return go


@pytest.mark.parametrize(("stage", "key", "says"), REFUSED, ids=[stage.split()[1].strip(",}") for stage, *_ in REFUSED])
def test_a_net_of_whose_kind_nothing_can_be_made(stage: str, key: str, says: str, refused: Callable[..., Any]) -> None:
    problem = refused(f"compress=[{stage}]").problems[0]
    assert says in problem.message and problem.key == key


def test_a_runtime_that_is_not_installed(refused: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise MissingError("OpenVINO is not there", hint="pip install 'kdctl[openvino]'")

    monkeypatch.setattr(openvino, "library", missing)
    assert "OpenVINO is not there" in str(refused("export=[{kind: openvino}]", MissingError))
    assert "OpenVINO is not there" in str(refused("compress=[{kind: quantize, target: openvino}]", MissingError))
    monkeypatch.setattr(elsewhere, "LIBRARIES", {"litert": ("a_library_that_nobody_has",)})
    monkeypatch.delenv("KDCTL_LITERT_PYTHON", raising=False)
    assert "litert is not installed" in str(refused("export=[{kind: litert}]", MissingError))


TEXTS = """
name: small
task: {kind: text_classification}
data: {kind: text, root: ., max_length: 8, vocab_size: 40, val_fraction: 0.2}
student: {kind: bert, depth: 1, width: 8, heads: 2}
train: {epochs: 1, device: cpu, threads: 1}
"""


@pytest.mark.parametrize(
    "override",
    ["export=[{kind: torchscript}]", "compress=[{kind: quantize, target: openvino}]", "compress=[{kind: prune}]"],
)
def test_models_of_texts_where_only_those_of_images_are_taken(
    override: str, folder: Path, experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(openvino, "library", lambda: None)
    (folder / "train.tsv").write_text("text\tlabel\n" + "good film\t1\nbad film\t0\n" * 20)
    with pytest.raises(ConfigError, match="models of images so far; the model takes texts"):
        train(Plan(experiment(override, text=TEXTS), ""), Untrained())


SIMKD = (
    "method={kind: simkd}", "distill=null", "teacher.train=null", "teacher.control=true",
    "losses=[{kind: fitnet, regressor: none, taps: [{student: projector, teacher: layer3}]}]",
)  # fmt: skip


def test_a_layer_that_the_net_has_later_is_no_mistake(run_it: Callable[..., Any], folder: Path) -> None:
    keep = "compress=[{kind: quantize, name: int8, keep: [LAYER]}]"
    _, document = run_it(*SIMKD, keep.replace("LAYER", "projector"), "train.epochs=1")
    assert [a["variant"] for a in document["artefacts"]] == ["int8"]
    run, _ = run_it("compress=[{kind: low_rank, name: small, keep_ratio: 0.5, round_to: 1}]", "train.epochs=1")
    given = f"student.weights={run / 'artefacts' / 'small' / 'model.safetensors'}"
    _, document = run_it(given, "train.epochs=1", keep.replace("LAYER", "layer2.conv.0"))
    assert document["status"] == "done"


def test_later_stages_and_what_can_be_made_are_let_through(run_it: Callable[..., Any]) -> None:
    stages = "compress=[{kind: prune, round_to: 2}, {kind: finetune, epochs: 1}, {kind: sparsify}]"
    assert run_it(stages, "train.epochs=1")[1]["status"] == "done"
