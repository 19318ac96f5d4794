"""Plain texts as blocks of tokens, and what is asked about them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kdctl.data.base import Dataset
from kdctl.data.corpus import Corpus
from kdctl.data.loader import TrainLoader, clean_batches
from kdctl.data.tokenizer import Tokenizer
from kdctl.data.tokens import TokenSplit, kept_encoding
from kdctl.errors import ConfigError, MissingError
from kdctl.signals import IGNORE, TokenInput

pytest.importorskip("tokenizers")

TEXT = "".join(f"line {number} of it,\nand so on.\n" for number in range(40))
TOKENS = TokenInput(vocab_size=100, length=12, pad=0, first=1, separator=2, mask=3)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "train.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def load(root: Path, target: str = "next", **options: object) -> Dataset:
    return Corpus(**({"root": str(root), "max_length": 16, "target": target} | options)).load()  # type: ignore[arg-type]


def split_of(texts: list[list[int]], asks: str, targets: list[int] | None = None) -> TokenSplit:
    return TokenSplit.of(texts, torch.tensor(targets or [0] * len(texts)), TOKENS, asks=asks)


def test_characters_come_back_as_they_were_and_every_one_is_asked_about_once(root: Path) -> None:
    dataset = load(root, units="characters", val_share=0, test_share=0)
    tokenizer = Tokenizer(str(dataset.tokenizer))
    split = dataset.train
    assert isinstance(split, TokenSplit) and split.head == "vocabulary"
    blocks = [
        row[: int(n)].tolist() for row, n in zip(split.fetch(torch.arange(len(split))), split.lengths, strict=True)
    ]
    assert tokenizer.decode(blocks[0] + [t for block in blocks[1:] for t in block[1:]]) == TEXT
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(blocks))
    asked = [t for batch in clean_batches(split, batch_size=4) for t in batch.targets[batch.targets != IGNORE].tolist()]
    assert len(asked) == len(TEXT) - 1
    assert dataset.class_names[:2] == ["<pad>", "<unk>"] and "\n" in dataset.class_names


@pytest.mark.parametrize("units", ["bpe", "wordpiece", "characters"])
def test_a_trained_tokenizer_is_the_same_every_time(root: Path, units: str) -> None:
    made = [load(root, units=units, vocab_size=320, target="next").tokenizer for _ in range(2)]
    assert made[0] == made[1]


def test_bytes_lose_nothing(root: Path) -> None:
    dataset = load(root, units="bpe", vocab_size=280)
    tokenizer = Tokenizer(str(dataset.tokenizer))
    other = "Ünïcode \t and a sign ☃ that it has never seen\n"
    assert tokenizer.decode(tokenizer.encode_plain(other)) == other
    assert len(tokenizer.vocabulary()) == len(set(tokenizer.vocabulary())) == 280


def test_what_has_no_file_is_the_end_of_the_training_text(root: Path) -> None:
    shares = load(root, units="characters", val_share=0.1, test_share=0.2)
    sizes = {name: int(split.lengths.sum()) - len(split) + 1 for name, split in shares.splits()}  # type: ignore[attr-defined]
    whole = len(TEXT)
    assert sizes == {"train": round(0.7 * whole), "val": round(0.1 * whole), "test": whole - round(0.8 * whole)}
    (root / "test.txt").write_text("a text to test on, of a few words")
    named = load(root, units="characters", test="test.txt", val_share=0)
    assert [name for name, _ in named.splits()] == ["train", "test"]
    assert int(named.train.lengths.sum()) - len(named.train) + 1 == whole  # type: ignore[attr-defined]


def test_lines_of_json_hold_texts(root: Path) -> None:
    (root / "train.jsonl").write_text('{"body": "one two three"}\n\n{"body": "four five six"}\n')
    dataset = load(root, train="train.jsonl", text="body", units="characters", val_share=0, test_share=0)
    split = dataset.train
    assert Tokenizer(str(dataset.tokenizer)).decode(split.fetch(torch.tensor([0]))[0].tolist()) == "one two three\nfo"
    with pytest.raises(ConfigError, match="no text 'text' in this line"):
        load(root, train="train.jsonl")


def test_blocks_with_hidden_tokens_lie_between_the_tokens_that_begin_and_end_a_text(root: Path) -> None:
    dataset = load(root, target="hidden", vocab_size=60)
    split = dataset.train
    assert isinstance(split, TokenSplit)
    tokens = split.tokens
    rows = split.fetch(torch.arange(2))
    assert rows[:, 0].tolist() == [tokens.first] * 2 and rows[:, -1].tolist() == [tokens.separator] * 2
    batch = next(clean_batches(split, batch_size=32))
    hidden = batch.inputs == tokens.mask
    assert batch.keep is not None and batch.keep.equal(hidden)
    assert hidden.any(1).all() and 0.08 < float(hidden.float().mean()) < 0.25
    assert batch.targets[~hidden].eq(IGNORE).all() and not batch.targets[hidden].eq(IGNORE).any()
    again = next(clean_batches(split, batch_size=32))
    assert again.inputs.equal(batch.inputs)


def test_texts_that_were_encoded_in_another_way_are_not_taken() -> None:
    """A file of a single text and a corpus of it: one has special tokens and is cut, the other is whole."""
    texts = [f"the same text {np.random.default_rng().integers(1 << 60)}"]
    first = kept_encoding("texts", texts, TOKENS, lambda: [[1, 5, 2]])
    assert kept_encoding("plain", texts, TOKENS, lambda: [[5, 6, 7, 8]])[0].tolist() == [5, 6, 7, 8]
    assert kept_encoding("texts", texts, TOKENS, lambda: [[0]])[0].tolist() == first[0].tolist() == [1, 5, 2]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"train": "none.txt"}, MissingError, "there is no file"),
        ({"train": "x.parquet"}, ConfigError, "are not read"),
        ({"target": "class"}, ConfigError, "plain text"),
        ({"val_share": 0.5, "test_share": 0.5}, ConfigError, "leave nothing"),
        ({"max_length": 1}, ConfigError, "cannot be cut"),
        ({"target": "hidden", "units": "characters"}, ConfigError, "begin and end a text"),
    ],
)
def test_what_cannot_be_read_is_refused(root: Path, options: dict[str, object], error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        load(root, **options)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- what is asked about


def test_the_next_token_is_asked_of_all_but_the_last() -> None:
    split = split_of([[5, 6, 7], [8, 9]], "next")
    posed = split.posed(torch.tensor([0, 1]), split.fetch(torch.tensor([0, 1])), torch.tensor([-1, -1]))
    assert posed.targets.tolist() == [[6, 7, IGNORE], [9, IGNORE, IGNORE]]
    assert posed.keep is not None and posed.keep.tolist() == [[True, True, False], [True, False, False]]


def test_of_texts_without_labels_the_same_is_asked_and_nothing_known() -> None:
    split = split_of([[5, 6, 7], [8, 9, 4]], "next", [0, IGNORE])
    posed = split.posed(torch.tensor([0, 1]), split.fetch(torch.tensor([0, 1])), torch.tensor([-1, -1]))
    assert posed.targets.tolist() == [[6, 7, IGNORE], [IGNORE] * 3]
    assert posed.keep is not None and posed.keep.sum(1).tolist() == [2, 2]


def test_other_tokens_are_hidden_in_each_view_and_the_same_in_the_same() -> None:
    split = split_of([[1, *range(10, 20), 2]] * 50, "hidden")
    rows = torch.arange(50)
    first, same, other = (split.posed(rows, split.fetch(rows), torch.full((50,), view)).inputs for view in (0, 0, 1))
    assert first.equal(same) and not first.equal(other)
    assert len({tuple(row) for row in first.tolist()}) > 10  # of equal texts too
    assert (first[:, 0] == 1).all() and (first[:, -1] == 2).all()
    assert 0.1 < float((first == TOKENS.mask).float().mean()) < 0.2


def test_hidden_tokens_do_not_depend_on_padding_or_the_other_texts() -> None:
    split = split_of([[1, 20, 21, 22, 23, 2], [1, *range(30, 40), 2]], "hidden")
    alone = split.posed(torch.tensor([0]), split.fetch(torch.tensor([0])), torch.tensor([4]))
    both = split.posed(torch.tensor([0, 1]), split.fetch(torch.tensor([0, 1])), torch.tensor([4, 4]))
    assert both.inputs[0, :6].equal(alone.inputs[0]) and both.targets[0, :6].equal(alone.targets[0])


def test_a_tokenizer_without_a_mask_hides_nothing() -> None:
    with pytest.raises(ConfigError, match="stands for a hidden one"):
        TokenSplit.of([[1, 2]], torch.tensor([0]), TokenInput(9, 4, 0), asks="hidden")


def test_batches_of_training_ask_in_each_epoch_about_others() -> None:
    split = split_of([[1, *range(10, 20), 2]] * 8, "hidden")
    loader = TrainLoader(split, batch_size=8)
    (first,), (second,) = list(loader.epoch(0)), list(loader.epoch(1))
    a, b = (batch.inputs[torch.argsort(batch.index)] for batch in (first, second))
    assert not a.equal(b)
    assert first.keep is not None and first.targets[first.keep].ne(IGNORE).all()


def test_parts_keep_what_is_asked() -> None:
    split = split_of([[5, 6], [7, 8], [9, 4]], "next")
    for part in (
        split.subset(torch.tensor([2, 0])),
        split.labelled(split.targets),
        TokenSplit.together([split, split]),
    ):
        assert part.head == "vocabulary" and part.asks == "next"
    assert split.fingerprint() != split_of([[5, 6], [7, 8], [9, 4]], "targets").fingerprint()


def test_a_padding_token_within_the_text_is_refused(root: Path) -> None:
    """Tokenizers without padding pad with the token that ends a text, which corpora put between texts."""
    tokenizer = json.loads(str(load(root, units="bpe", vocab_size=300).tokenizer).replace("[PAD]", "<|endoftext|>"))
    (root / "own.json").write_text(json.dumps(tokenizer).replace("<pad>", "<|endoftext|>"))
    options = {"tokenizer": str(root / "own.json"), "val_share": 0, "test_share": 0}
    assert len(load(root, **options).train) > 10
    (root / "train.txt").write_text(TEXT + "<|endoftext|>" + TEXT)
    with pytest.raises(ConfigError, match=r"'<\|endoftext\|>' stands within the text") as caught:
        load(root, **options)
    assert caught.value.problems[0].key == "data.tokenizer"


def test_a_cache_that_cannot_be_written_costs_time_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "file").touch()
    monkeypatch.setenv("KDCTL_CACHE", str(root / "file"))
    assert kept_encoding("plain", ["a"], TOKENS, lambda: [[4, 5]])[0].tolist() == [4, 5]
