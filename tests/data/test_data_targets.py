"""Texts with several labels, numbers, or tagged words: cells, files without a header, CoNLL, and what is wrong."""

from __future__ import annotations

import json
import lzma
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kdctl.data.base import Dataset
from kdctl.data.text import Text
from kdctl.data.tokens import TokenSplit
from kdctl.errors import ConfigError, MissingError
from kdctl.signals import IGNORE

pytest.importorskip("tokenizers")

CONLL = "-DOCSTART- O\n\nann B-PER\nwent O\nto O\nwell-known B-LOC\n\n\nbob\tB-PER\nlee\tI-PER\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KDCTL_CACHE", str(tmp_path / "cache"))
    return tmp_path


def load(root: Path, target: str, **arguments: Any) -> Dataset:
    return Text(root=str(root), target=target, vocab_size=60, **arguments).load()


def write(root: Path, name: str, content: str) -> str:
    (root / name).write_text(content)
    return name


# ------------------------------------------------------------------------------------------------------ several labels


def test_several_classes_in_a_cell(root: Path) -> None:
    file = write(root, "a.tsv", "text\tlabel\na b\tred, blue\nb\t\nc\tgreen\n")
    data = load(root, "classes", train=file)
    assert data.class_names == ["blue", "green", "red"]
    assert data.train.targets.tolist() == [[1, 0, 1], [IGNORE] * 3, [0, 1, 0]]
    other = write(root, "b.tsv", "text\tlabel\na\tred; blue,x\n")
    assert load(root, "classes", train=other, separator=";").class_names == ["blue,x", "red"]


def test_a_list_in_json_may_be_empty(root: Path) -> None:
    rows = [{"text": "a", "label": [2, 10]}, {"text": "b", "label": []}, {"text": "c", "label": None}, {"text": "d"}]
    file = write(root, "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    data = load(root, "classes", train=file)
    assert data.class_names == ["2", "10"]
    assert data.train.targets.tolist() == [[1, 1], [0, 0], [IGNORE] * 2, [IGNORE] * 2]


def test_numbers_without_a_header_count_a_file_of_names(root: Path) -> None:
    """As GoEmotions lies there, packed."""
    with lzma.open(root / "a.tsv.xz", "wt") as file:
        file.write('a "b\t2,0\tx1\nb\t1\tx2\n')
    write(root, "labels.txt", "joy\nfear\nneutral\n")
    data = load(root, "classes", train="a.tsv.xz", columns=["text", "label", "id"], class_names="labels.txt")
    assert data.class_names == ["joy", "fear", "neutral"]
    assert data.train.targets.tolist() == [[1, 0, 1], [0, 1, 0]]


def test_numbers_are_names_where_a_class_is_called_so(root: Path) -> None:
    file = write(root, "a.tsv", "text\tlabel\na\t0\n")
    assert load(root, "class", train=file, class_names=["no", "yes"]).train.targets.tolist() == [0]
    with pytest.raises(ConfigError, match="'0' is no class"):
        load(root, "class", train=file, class_names=["1", "2"])


# ------------------------------------------------------------------------------------------------------------- numbers


def test_a_number_a_text(root: Path) -> None:
    data = load(root, "number", train=write(root, "a.csv", "text,label\na,2.5\nb,\nc,-1e1\n"))
    targets = data.train.targets
    assert data.class_names == ["score"] and targets.dtype == torch.float32
    assert targets[[0, 2]].tolist() == [2.5, -10.0] and math.isnan(targets[1])


@pytest.mark.parametrize("cell", ["much", "nan", "inf"])
def test_what_is_no_number(root: Path, cell: str) -> None:
    file = write(root, "a.csv", f"text,label\na,1\nb,{cell}\n")
    with pytest.raises(ConfigError, match=f"'{cell}' is no number") as caught:
        load(root, "number", train=file)
    assert caught.value.problems[0].line == 3


# ---------------------------------------------------------------------------------------------------------------- tags


def words_of(data: Dataset, row: int) -> list[tuple[str, int]]:
    """The tokens of a text, each with its tag."""
    split = data.train
    assert isinstance(split, TokenSplit) and split.tags is not None and data.tokenizer is not None
    library = pytest.importorskip("tokenizers").Tokenizer.from_str(data.tokenizer)
    places = range(int(split.starts[row]), int(split.starts[row + 1]))
    return [(library.id_to_token(int(split.ids[i])), int(split.tags[i])) for i in places]


def test_the_first_token_of_a_word_carries_its_tag(root: Path) -> None:
    data = load(root, "tags", train=write(root, "a.conll", CONLL))
    assert data.class_names == ["B-LOC", "B-PER", "I-PER", "O"] and len(data.train) == 2
    first = words_of(data, 0)
    assert first[0] == ("[CLS]", IGNORE) and first[-1] == ("[SEP]", IGNORE)
    begun = [(word, tag) for word, tag in first if tag != IGNORE]
    assert [tag for _, tag in begun] == [1, 3, 3, 0]
    assert first[4:-1] == [("well", 0), ("-", IGNORE), ("known", IGNORE)]
    assert [tag for _, tag in words_of(data, 1) if tag != IGNORE] == [1, 2]
    again = load(root, "tags", train="a.conll")  # from what was kept
    assert words_of(again, 0) == first


def test_json_lines_say_the_same_as_conll(root: Path) -> None:
    rows = [
        {"tokens": ["ann", "went", "to", "well-known"], "tags": ["B-PER", "O", "O", "B-LOC"]},
        {"tokens": ["bob", "lee"], "tags": ["B-PER", "I-PER"]},
    ]
    one = load(root, "tags", train=write(root, "a.jsonl", "\n".join(map(json.dumps, rows))))
    other = load(root, "tags", train=write(root, "a.txt", CONLL))
    assert [words_of(one, row) for row in (0, 1)] == [words_of(other, row) for row in (0, 1)]
    rows[1].pop("tags")
    rest = load(root, "tags", train=write(root, "b.jsonl", "\n".join(map(json.dumps, rows))))
    assert rest.train.targets.tolist() == [0, IGNORE] and {tag for _, tag in words_of(rest, 1)} == {IGNORE}


def test_words_beyond_the_longest_text_have_no_tag(root: Path) -> None:
    data = load(root, "tags", train=write(root, "a.conll", "a X\nb Y\na X\nb Y\n"), max_length=4)
    assert words_of(data, 0) == [("[CLS]", IGNORE), ("a", 0), ("b", 1), ("[SEP]", IGNORE)]


def test_named_columns_of_conll(root: Path) -> None:
    file = write(root, "a.conll", "a DT B-NP O\nb NN I-NP B-X\n")
    data = load(root, "tags", train=file, columns=["text", "pos", "label", "rest"])
    assert data.class_names == ["B-NP", "I-NP"]
    assert load(root, "tags", train=file).class_names == ["B-X", "O"]


# ------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("target", "name", "content", "arguments", "message"),
    [
        ("tags", "a.tsv", "text\tlabel\na\tb\n", {}, "'.tsv' are not read for words with tags"),
        ("class", "a.conll", "a X\n", {}, "'.conll' are not read"),
        ("tags", "a.jsonl", '{"tokens": ["a", "b"], "tags": ["X"]}', {}, "1 tags for 2 words"),
        ("tags", "a.jsonl", '{"tokens": "a", "tags": ["X"]}', {}, "there is no list of words 'tokens'"),
        ("tags", "a.conll", "a X\nb\n", {}, "1 columns, and the first line has 2"),
        ("tags", "a.conll", "a X\n", {"pair": "b"}, "words with tags are of one text"),
        ("class", "a.jsonl", '{"text": "a", "label": "x"}', {"columns": ["text"]}, "JSON lines do"),
        ("class", "a.jsonl", '{"text": "a", "label": ["x"]}', {}, "one class is expected"),
        ("class", "a.tsv", "a\tx\ty\n", {"columns": ["text", "label"]}, "3 columns, and data.columns names 2"),
        ("number", "a.tsv", "text\tlabel\na\t1\n", {"class_names": ["x"]}, "a regression has no classes"),
        ("next", "a.tsv", "text\tlabel\na\t1\n", {}, "the task learns from texts without labels"),
        ("class", "a.tsv", "text\tlabel\na\tx\n", {"max_length": 2}, "adds 2 special tokens"),
        ("class", "a.tsv", "text\tlabel\na\tx\n", {"class_names": ["x", "x"]}, "'x' is named twice"),
        ("class", "a.tsv.xz", "no archive", {}, "the file cannot be read"),
    ],
)
def test_refused(root: Path, target: str, name: str, content: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(root, target, train=write(root, name, content), **arguments)


def test_names_of_classes_that_are_not_there(root: Path) -> None:
    with pytest.raises(MissingError, match=r"there is no file .*labels\.txt"):
        load(root, "class", train=write(root, "a.tsv", "text\tlabel\na\tx\n"), class_names="labels.txt")
