"""Data sets as the datasets library reads them: from a folder, which is what a name on the Hub becomes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from kdctl.config.expand import load_experiment
from kdctl.data.base import Dataset
from kdctl.data.hub import HubCorpus, HubText
from kdctl.data.tokens import TokenSplit
from kdctl.errors import ConfigError, MissingError
from kdctl.signals import IGNORE
from kdctl.smoke import smoke
from kdctl.watch import Reporter

pytest.importorskip("tokenizers")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    return tmp_path


def test_without_the_library_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingError) as caught:
        HubText(name="glue", subset="sst2").load()
    assert caught.value.problems[0].hint == "pip install 'kdctl[datasets]'"


@pytest.mark.parametrize(
    "data", ["{kind: hub_text, name: glue, subset: sst2, text: sentence}", "{kind: hub_corpus, name: wikitext}"]
)
def test_a_smoke_run_needs_neither_library_nor_network(
    data: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    task, model = ("causal_lm", "gpt") if "corpus" in data else ("text_classification", "bert")
    text = f"name: x\ntask: {{kind: {task}}}\ndata: {data}\nstudent: {{kind: {model}, depth: 1, width: 16, heads: 2}}\n"
    (folder / "x.yaml").write_text(text)
    experiment = load_experiment(folder / "x.yaml", require_files=False).experiment
    done = smoke(experiment, Reporter())
    assert "synthetic texts stand in" in done["notes"][0]


@pytest.mark.parametrize("given", [{}, {"name": "glue", "root": "."}])
def test_one_of_name_and_folder(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"one of data\.name") as caught:
        HubText(**given)
    assert caught.value.problems[0].key == "data.name"


class TestRead:
    @pytest.fixture(autouse=True)
    def library(self, folder: Path) -> Any:
        """A folder in the Hub's form, with two splits whose labels name their classes out of their order."""
        library = pytest.importorskip("datasets")
        rows = {"text": ["a good film", "a bad film", "so"], "label": [1, 0, -1], "tokens": [["a"], ["b", "c"], ["d"]]}
        rows |= {"tags": [[0], [1, 0], [1]], "several": [[0, 1], [], [1]]}
        names = library.ClassLabel(names=["pos", "neg"])
        features = library.Features({
            "text": library.Value("string"), "label": names, "tokens": library.List(library.Value("string")),
            "tags": library.List(library.ClassLabel(names=["O", "B-x"])),
            "several": library.List(names),
        })  # fmt: skip
        for split in ("train", "test"):
            file = folder / "data" / f"{split}-00000-of-00001.parquet"
            library.Dataset.from_dict(rows, features=features).to_parquet(file)
        return library

    def load(self, folder: Path, **arguments: Any) -> Dataset:
        return HubText(root=str(folder / "data"), **{"test": "test", "vocab_size": 50, **arguments}).load()

    def test_classes_keep_the_order_that_the_column_gives_them(self, folder: Path) -> None:
        data = self.load(folder)
        assert data.class_names == ["pos", "neg"]
        assert data.train.targets.tolist() == [1, 0, IGNORE]
        assert data.test is not None and isinstance(data.test, TokenSplit) and len(data.test) == 3

    def test_lists_of_classes_and_of_words(self, folder: Path) -> None:
        several = self.load(folder, label="several", target="classes")
        assert several.train.targets.tolist() == [[1, 1], [0, 0], [0, 1]] and several.class_names == ["pos", "neg"]
        tagged = self.load(folder, target="tags", text="tokens", label="tags")
        assert tagged.class_names == ["O", "B-x"] and isinstance(tagged.train, TokenSplit)
        assert tagged.train.tags is not None
        assert [tag for tag in tagged.train.tags.tolist() if tag != IGNORE] == [0, 1, 0, 1]

    def test_hidden_tags_are_none(self, folder: Path, library: Any) -> None:
        tags = library.List(library.ClassLabel(names=["O", "B-x"]))
        features = library.Features({"tokens": library.List(library.Value("string")), "tags": tags})
        rows = {"tokens": [["a"], ["b", "c"]], "tags": [[-1], [1, -1]]}
        file = folder / "data" / "test-00000-of-00001.parquet"
        library.Dataset.from_dict(rows, features=features).to_parquet(file)
        for name in (folder / "data").glob("train*"):
            name.unlink()
        rows = {"tokens": [["a"], ["b", "c"]], "tags": [[0], [1, 0]]}
        library.Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
        data = self.load(folder, target="tags", text="tokens", label="tags")
        assert isinstance(data.test, TokenSplit) and data.test.tags is not None
        assert set(data.test.tags.tolist()) == {IGNORE} and data.test.targets.tolist() == [IGNORE, IGNORE]

    @pytest.mark.parametrize(
        ("changed", "key", "said"),
        [
            ({"text": "txet"}, "data.text", "no column 'txet'; there are: text, label"),
            ({"test": "tset"}, "data.train", "no split 'tset'"),
            ({"subset": "other"}, "data.subset", "other"),
        ],
    )
    def test_what_is_not_there(self, folder: Path, changed: dict[str, Any], key: str, said: str) -> None:
        with pytest.raises(ConfigError, match=said) as caught:
            self.load(folder, **changed)
        assert caught.value.problems[0].key == key

    def test_a_name_that_cannot_be_had(self, library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(library.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setenv("KDCTL_OFFLINE", "1")
        with pytest.raises(MissingError, match="glue could not be had"):
            HubText(name="glue", subset="sst2").load()

    def test_a_corpus_is_the_text_of_a_column(self, folder: Path) -> None:
        (folder / "plain").mkdir()
        lines = [json.dumps({"said": "to be or not to be " * 20}) for _ in range(20)]
        (folder / "plain" / "train.jsonl").write_text("\n".join(lines))
        data = HubCorpus(
            root=str(folder / "plain"), text="said", units="characters", vocab_size=40, max_length=16, target="next"
        ).load()
        assert data.tokenizer is not None and len(data.train) > 100 and data.val is not None and data.test is not None
        with pytest.raises(ConfigError, match="no column 'text'"):
            HubCorpus(root=str(folder / "plain"), target="next").load()
