"""Models as an experiment asks for them: what a new one begins with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdctl import build
from kdctl.config.expand import load_experiment
from kdctl.models.record import save_model

pytest.importorskip("tokenizers")


def test_a_new_net_of_several_labels_begins_at_their_shares(tmp_path: Path) -> None:
    """In the mean it says of each class how many have it; weights that are loaded bring their own bias."""
    rows = ["a film\tred,big", "the film\tred", "a cat\tred", "the cat\t[]", "a dog\t"]
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + "\n".join(rows).replace("[]", "big") + "\n")
    file = tmp_path / "x.yaml"
    file.write_text(
        "name: x\ntask: {kind: multilabel}\nstudent: {kind: bert, depth: 1, width: 8, heads: 2}\n"
        "data: {kind: text, root: ., test: train.tsv, vocab_size: 40, max_length: 8, val_fraction: 0}\n"
    )

    def built(*overrides: str) -> torch.Tensor:
        experiment = load_experiment(file, overrides).experiment
        data = build.build_data(experiment)
        model = build.build_model(experiment.stages[0].student, data, "student")  # type: ignore[arg-type]
        save_model(model, tmp_path / "model")
        return model.net.get_parameter("classifier.bias").detach()

    shares = torch.tensor([3 / 6, 4 / 6])  # big, red: of the four that have labels, one with and one without added
    torch.testing.assert_close(built(), shares.logit())
    same = [row.split("\t")[0] + "\tred,big" for row in rows]
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + "\n".join(same) + "\n")
    torch.testing.assert_close(built(f"student.weights={tmp_path}/model.safetensors"), shares.logit())
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + "\n".join(same).replace("red,big", "red") + "\n")
    assert built("task.kind=classification", "data.class_names=[big, red]").abs().max() < 0.5
