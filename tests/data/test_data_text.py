"""Texts from files: columns, labels, what is wrong with a line, and the tokenizer that makes numbers of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdctl import runs
from kdctl.data.base import Dataset
from kdctl.data.text import Text
from kdctl.data.tokenizer import Tokenizer
from kdctl.data.tokens import TokenSplit
from kdctl.errors import ConfigError, MissingError
from kdctl.signals import IGNORE

pytest.importorskip("tokenizers")

LINES = ["a good film\tpos", "a bad film\tneg", 'he said "good\tpos', "so-so, really\t", "bad, bad, bad\tneg"]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a train.tsv of five texts, and an empty cache."""
    monkeypatch.setenv("KDCTL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "train.tsv").write_text("\n".join(["text\tlabel", *LINES]) + "\n")
    return tmp_path


def load(root: Path, **arguments: Any) -> Dataset:
    return Text(root=str(root), **arguments).load()


def said(dataset: Dataset, row: int, name: str = "train") -> list[str]:
    """The tokens of a text as words."""
    split = getattr(dataset, name)
    assert isinstance(split, TokenSplit) and dataset.tokenizer is not None
    library = pytest.importorskip("tokenizers").Tokenizer.from_str(dataset.tokenizer)
    return [library.id_to_token(number) for number in split.ids[split.starts[row] : split.starts[row + 1]].tolist()]


def plain(dataset: Dataset, row: int, name: str = "train") -> str:
    return " ".join(said(dataset, row, name)).replace(" ##", "")


# --------------------------------------------------------------------------------------------------------------- files


def test_tsv_without_quoting_and_a_text_without_label(root: Path) -> None:
    data = load(root)
    assert data.class_names == ["neg", "pos"]
    assert data.train.targets.tolist() == [1, 0, 1, IGNORE, 0]
    assert [plain(data, row) for row in (0, 2)] == ["[CLS] a good film [SEP]", '[CLS] he said " good [SEP]']
    assert data.input_shape == (128,) and not data.mean


def test_csv_with_quotes(root: Path) -> None:
    (root / "train.csv").write_text('label,text\n1,"bad, ""good"", film"\n0,"two\nlines"\n')
    data = load(root, train="train.csv")
    assert plain(data, 0) == '[CLS] bad , " good " , film [SEP]' and plain(data, 1) == "[CLS] two lines [SEP]"
    assert data.train.targets.tolist() == [1, 0]


def test_jsonl_with_columns_of_other_names_and_numbers_as_labels(root: Path) -> None:
    rows = [{"s": "good", "y": 10}, {"s": "bad", "y": 9}, {"s": "film", "y": None}, {"s": "a"}]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load(root, train="train.jsonl", text="s", label="y")
    assert data.class_names == ["9", "10"] and data.train.targets.tolist() == [1, 0, IGNORE, IGNORE]
    assert plain(data, 1) == "[CLS] bad [SEP]"


def test_pairs_are_one_text_in_two_segments(root: Path) -> None:
    (root / "pairs.tsv").write_text("a\tb\tlabel\ngood film\tbad\t1\nfilm\tgood good\t0\n")
    data = load(root, train="pairs.tsv", text="a", pair="b")
    assert plain(data, 0) == "[CLS] good film [SEP] bad [SEP]"
    split = data.train
    assert isinstance(split, TokenSplit) and split.tokens.pairs
    numbers = split.fetch(split.index)
    words = [said(data, row) for row in (0, 1)]
    wanted = [[0] * (w.index("[SEP]") + 1) + [1] * (len(w) - w.index("[SEP]") - 1) for w in words]
    segments = split.tokens.segments(numbers).tolist()
    assert [row[: len(w)] for row, w in zip(segments, words, strict=True)] == wanted


def test_other_files_have_the_classes_of_the_training_file(root: Path) -> None:
    (root / "dev.tsv").write_text("text\tlabel\nbad\tneg\n")
    (root / "test.tsv").write_text("text\tlabel\ngood\tpos\nfilm\tpos\n")
    data = load(root, val="dev.tsv", test="test.tsv")
    assert data.val is not None and data.val.targets.tolist() == [0]
    assert data.test is not None and data.test.targets.tolist() == [1, 1]


def test_the_order_of_named_classes_is_kept(root: Path) -> None:
    data = load(root, class_names=["pos", "other", "neg"])
    assert data.class_names == ["pos", "other", "neg"] and data.train.targets.tolist() == [0, 2, 0, IGNORE, 2]


# ------------------------------------------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("dev.tsv", "text\tlabel\nbad\tneg\ngood\tgreat\n", 3),
        ("dev.csv", 'text,label\n"two\nlines",neg\ngood,great\n', 4),
        ("dev.jsonl", '{"text": "bad", "label": "neg"}\n{"text": "good", "label": "great"}\n', 2),
    ],
)
def test_an_unknown_label_is_named_with_file_and_line(root: Path, name: str, content: str, line: int) -> None:
    (root / name).write_text(content)
    with pytest.raises(ConfigError, match="'great' is no class; there are: neg, pos") as caught:
        load(root, val=name)
    problem = caught.value.problems[0]
    assert (problem.file, problem.line) == (str(root / name), line)


def test_a_missing_column_is_named_beside_those_that_are_there(root: Path) -> None:
    with pytest.raises(ConfigError, match="there is no text 'sentence'; there are: text, label") as caught:
        load(root, text="sentence")
    assert caught.value.problems[0].line == 2
    with pytest.raises(ConfigError, match="there is no text 'second'"):
        load(root, pair="second")
    with pytest.raises(ConfigError, match="no text has a column 'class'; there are: text, label"):
        load(root, label="class")
    with pytest.raises(ConfigError, match="no text has a column 'class'"):
        load(root, label="class", class_names=["neg", "pos"])
    with pytest.raises(ConfigError, match="no text of this file has a label"):
        load(root, label=None)
    assert load(root, label=None, class_names=["neg", "pos"]).train.targets.unique().tolist() == [IGNORE]


@pytest.mark.parametrize("content", ["", "text\tlabel\n"])
def test_a_file_without_texts_is_refused(root: Path, content: str) -> None:
    (root / "train.tsv").write_text(content)
    with pytest.raises(ConfigError, match="there is no text in this file"):
        load(root)


def test_files_that_are_not_there_or_not_read(root: Path) -> None:
    with pytest.raises(MissingError, match=r"data\.val: there is no file .*dev\.tsv"):
        load(root, val="dev.tsv")
    (root / "train.xml").write_text("<a/>")
    with pytest.raises(ConfigError, match=r"allowed: \.tsv, \.csv, \.jsonl"):
        load(root, train="train.xml")
    (root / "train.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": \n')
    with pytest.raises(ConfigError, match="no JSON") as caught:
        load(root, train="train.jsonl")
    assert caught.value.problems[0].line == 2


# ----------------------------------------------------------------------------------------------------------- tokenizer


def test_a_tokenizer_is_a_file_or_the_folder_of_a_model(root: Path) -> None:
    made = Tokenizer.trained(["good bad film", "a film"], 60)
    (root / "model").mkdir()
    (root / "model" / "tokenizer.json").write_text(made.text)
    by_folder = load(root, tokenizer=str(root / "model"))
    by_file = load(root, tokenizer=str(root / "model" / "tokenizer.json"))
    assert by_folder.train.fingerprint() == by_file.train.fingerprint()
    assert by_folder.tokenizer == made.text
    split = by_folder.train
    assert isinstance(split, TokenSplit) and split.tokens.tokenizer == made.sha256
    assert "[UNK]" in said(by_folder, 2)  # the 'h' of "he" is no sign of its texts
    with pytest.raises(MissingError, match=r"there is no tokenizer at .*nowhere"):
        load(root, tokenizer=str(root / "nowhere"))
    (root / "broken.json").write_text("{}")
    with pytest.raises(ConfigError, match="this is no tokenizer"):
        load(root, tokenizer=str(root / "broken.json"))


TIES = """
import random
from kdctl.data.tokenizer import Tokenizer
draw = random.Random(0)
words = ["".join(draw.choice("abcdefghij") for _ in range(5)) for _ in range(80)]
texts = [" ".join(draw.sample(words, 4)) for _ in range(40)]
made = Tokenizer.trained(texts, 120)
"""


def test_a_trained_tokenizer_is_the_same_in_every_process() -> None:
    """Many pairs of signs are equally frequent in these texts: which of them are merged must not be left to chance."""
    here: dict[str, Any] = {}
    exec(TIES, here)
    again: dict[str, Any] = {}
    exec(TIES, again)
    command = [sys.executable, "-c", TIES + "print(made.sha256)"]
    elsewhere = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert here["made"].sha256 == again["made"].sha256 == elsewhere.stdout.strip()
    vocab = json.loads(here["made"].text)["model"]["vocab"]
    assert len(vocab) == 120 and sorted(vocab.values()) == list(range(120))
    assert list(vocab)[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_a_trained_tokenizer_knows_the_words_of_its_texts(root: Path) -> None:
    data = load(root)
    split = data.train
    assert isinstance(split, TokenSplit)
    tokens = split.tokens
    assert (tokens.pad, tokens.first, tokens.separator, tokens.mask) == (0, 2, 3, 4)
    assert said(data, 4) == ["[CLS]", "bad", ",", "bad", ",", "bad", "[SEP]"]
    assert tokens.vocab_size == len(json.loads(data.tokenizer or "")["model"]["vocab"])
    small = load(root, vocab_size=40).train
    assert isinstance(small, TokenSplit) and small.tokens.vocab_size == 40 and len(small.ids) > len(split.ids)


def test_the_rarest_signs_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdctl.data.tokenizer._SIGNS", 3)
    made = Tokenizer.trained(["aab abb cab", "d ab", "ca"], 30)
    assert {word.removeprefix("##")[0] for word in list(json.loads(made.text)["model"]["vocab"])[5:]} == set("abc")


# -------------------------------------------------------------------------------------------------------- kept numbers


def kept(root: Path) -> list[Path]:
    return sorted((root / "cache" / "texts").glob("*.npz"))


def test_texts_are_made_into_numbers_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(root)
    assert runs.cache_home() == root / "cache" and len(kept(root)) == 1

    def refuse(*_: Any) -> Any:
        raise AssertionError("it was done before")

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "encode", refuse)
        again = load(root)
        assert again.train.fingerprint() == first.train.fingerprint()
        (root / "train.tsv").write_text("text\tlabel\n" + "\n".join(LINES).replace("\tneg", "\tpos"))
        assert load(root).train.targets.tolist() == [0, 0, 0, IGNORE, 0]  # labels are not kept
        with pytest.raises(AssertionError, match="done before"):
            load(root, max_length=4)
    (root / "train.tsv").write_text("text\tlabel\nanother film\tpos\n")
    assert plain(load(root), 0) == "[CLS] another film [SEP]"


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other"])
def test_a_damaged_file_of_numbers_is_made_again(root: Path, damage: str) -> None:
    whole = load(root).train.fingerprint()
    (place,) = kept(root)
    content = bytearray(place.read_bytes())
    if damage == "other":
        np.savez(place, other=np.arange(3))
    else:
        content[60] ^= 0xFF
        half = bytes(content[: len(content) // 2])
        place.write_bytes({"empty": b"", "cut": half, "flipped": bytes(content)}[damage])
    assert load(root).train.fingerprint() == whole
    with np.load(place) as mended:
        assert set(mended.files) == {"ids", "ends"}


def test_long_texts_are_cut_and_end_as_others_do(root: Path) -> None:
    data = load(root, max_length=4)
    assert data.input_shape == (4,)
    assert [said(data, row) for row in (0, 4)] == [["[CLS]", "a", "good", "[SEP]"], ["[CLS]", "bad", ",", "[SEP]"]]
    assert load(root).train.fetch(data.train.index).shape[1] > 4


def test_a_mark_of_the_byte_order_is_no_part_of_a_column(root: Path) -> None:
    (root / "train.csv").write_bytes("text,label\ngood,1\nbad,0\n".encode("utf-8-sig"))
    assert load(root, train="train.csv").train.targets.tolist() == [1, 0]


def test_empty_lines_and_long_cells(root: Path) -> None:
    (root / "train.jsonl").write_text('{"text": "good", "label": 1}\n\n{"text": "bad", "label": 0}\n')
    assert load(root, train="train.jsonl").train.targets.tolist() == [1, 0]
    (root / "train.csv").write_text(f"text,label\n{'good ' * 30_000},1\nbad,0\n")
    assert load(root, train="train.csv").train.targets.tolist() == [1, 0]


def test_half_a_sign_is_named_with_its_line(root: Path) -> None:
    (root / "train.jsonl").write_text('{"text": "good", "label": 1}\n{"text": "bad \\ud83d", "label": 0}\n')
    with pytest.raises(ConfigError, match=r"U\+D83D, half of a sign") as caught:
        load(root, train="train.jsonl")
    assert caught.value.problems[0].line == 2
