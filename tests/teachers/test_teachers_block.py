"""One file of a store: what goes in comes out, and nothing damaged, cut or foreign does."""

from __future__ import annotations

import numpy as np
import pytest

from kdctl.errors import MissingError
from kdctl.teachers import block as blocks
from kdctl.teachers.block import Block, Field, Header, write

FIELDS = (Field("logits", "<f2", (3,)), Field("top_indices", "<u2", (2,)), Field("rest", "<f4", ()))


def columns(rows):
    return {
        "logits": np.arange(rows * 3, dtype="<f2").reshape(rows, 3) / 8,
        "top_indices": np.arange(rows * 2, dtype="<u2").reshape(rows, 2),
        "rest": np.arange(rows, dtype="<f4"),
    }


def save(path, rows=7, part=4, store="s", of="train.0.0", fields=FIELDS):
    values = columns(rows)
    header = Header(store, of, rows, fields)
    return write(path, header, lambda f: (values[f.name][i : i + part] for i in range(0, rows, part)))


def read_all(path, store="s", of="train.0.0"):
    block = Block(path, store, of)
    return {name: np.array(block.column(name)) for name in block.fields}


@pytest.mark.parametrize("rows", [1, 7, 500])
def test_what_is_written_is_read(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(blocks, "CHUNK", 256)  # so that rows lie across chunks and chunks across fields
    assert save(tmp_path / "a", rows)
    some = np.array([rows - 1, 0, rows // 2])
    for name, values in columns(rows).items():
        np.testing.assert_array_equal(read_all(tmp_path / "a")[name], values)
        np.testing.assert_array_equal(Block(tmp_path / "a", "s", "train.0.0").take(name, some), values[some])


def test_every_flipped_byte_is_refused(tmp_path):
    save(tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        (tmp_path / "b").write_bytes(damaged)
        with pytest.raises(MissingError) as caught:
            read_all(tmp_path / "b")
        assert caught.value.problems[0].file == str(tmp_path / "b")
        assert "cache clear" in str(caught.value)


def test_every_truncation_is_refused(tmp_path):
    save(tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "b").write_bytes(whole[:size])
        with pytest.raises(MissingError, match="truncated"):
            Block(tmp_path / "b", "s", "train.0.0")
    (tmp_path / "b").write_bytes(whole[:-10])
    with pytest.raises(MissingError, match=f"truncated: {len(whole) - 10:,} of {len(whole):,} bytes"):
        Block(tmp_path / "b", "s", "train.0.0")


def test_a_longer_file_is_refused(tmp_path):
    save(tmp_path / "a")
    with open(tmp_path / "a", "ab") as file:
        file.write(b"x")
    with pytest.raises(MissingError, match="where its header says"):
        Block(tmp_path / "a", "s", "train.0.0")


def test_a_foreign_file_is_refused(tmp_path):
    save(tmp_path / "a")
    with pytest.raises(MissingError, match="belongs to another store"):
        Block(tmp_path / "a", "other", "train.0.0")
    with pytest.raises(MissingError, match=r"holds train\.0\.0, and its name says train\.1\.0"):
        Block(tmp_path / "a", "s", "train.1.0")
    (tmp_path / "text").write_text("something else entirely, and long enough for a prefix")
    with pytest.raises(MissingError, match="no file of a store"):
        Block(tmp_path / "text", "s", "train.0.0")


def test_a_chunk_is_checked_when_it_is_first_read(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "CHUNK", 256)
    save(tmp_path / "a", rows=500)
    whole = bytearray((tmp_path / "a").read_bytes())
    block = Block(tmp_path / "a", "s", "train.0.0")
    start = len(whole) - block.header.data_bytes - 4 * -(-block.header.data_bytes // 256) - 4
    whole[start + 2 * 256 + 5] ^= 1  # in the third chunk: logits of row 86
    (tmp_path / "a").write_bytes(whole)
    block = Block(tmp_path / "a", "s", "train.0.0")
    assert block.take("logits", np.array([0, 84, 499])).shape == (3, 3)
    assert block.take("rest", np.arange(500)).shape == (500,)
    for rows in ([0, 86], [85], [86]):  # row 85 begins before the chunk and ends in it
        with pytest.raises(MissingError, match=r"chunk 2 of \d+ is damaged"):
            block.take("logits", np.array(rows))
    with pytest.raises(MissingError, match="chunk 2"):
        block.verify()


def test_a_file_is_never_replaced_and_nothing_is_left_beside_it(tmp_path):
    assert save(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    assert not save(tmp_path / "a", rows=3)
    assert (tmp_path / "a").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_without_hard_links_a_file_still_gets_its_name(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(blocks.os, "link", refuse)
    assert save(tmp_path / "a") and not save(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_failed_write_leaves_nothing(tmp_path):
    header = Header("s", "train.0.0", 7, FIELDS)
    with pytest.raises(ValueError, match="7 rows"):
        write(tmp_path / "a", header, lambda f: [columns(6)[f.name]])
    assert list(tmp_path.iterdir()) == []
