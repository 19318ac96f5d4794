"""The store: rows by split, turn and sample, filled in any order, by several, and never wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from made_stores import CLASSES, SAMPLES, batch_of, files, put, read, right

from kdctl.errors import ConfigError, MissingError
from kdctl.signals import CLEAN, Signals
from kdctl.teachers import store as stores
from kdctl.teachers import turn as turns
from kdctl.teachers.block import ASIDE
from kdctl.teachers.contents import Contents


def missing(store, rows, turn=0, split="train"):
    found = store.missing(batch_of(rows, turn, split))
    return [] if found is None else torch.as_tensor(rows)[found].tolist()


# ------------------------------------------------------------------------------------------------------------- filling


def test_rows_are_there_at_once_and_on_the_disk_after_a_flush(open_store):
    store = open_store()
    assert missing(store, [3, 1, 2]) == [3, 1, 2]
    put(store, [3, 1])
    assert right(store, [1, 3, 1]) and missing(store, [3, 1, 2]) == [2]
    assert missing(open_store(), [3, 1]) == [3, 1]
    store.flush()
    assert right(open_store(), [1, 3]) and missing(open_store(), [0, 1, 3]) == [0]


def test_turns_and_splits_are_apart(open_store):
    store = open_store()
    put(store, [1], turn=0)
    put(store, [1], turn=1)
    put(store, [1], turn=CLEAN, split="val")
    store.flush()
    store = open_store()
    assert right(store, [1], turn=0) and right(store, [1], turn=1) and right(store, [1], turn=CLEAN, split="val")
    assert missing(store, [1], turn=10) == [1] and missing(store, [1], turn=CLEAN) == [1]


def test_a_complete_turn_is_one_file_in_order(open_store):
    store = open_store()
    for rows in torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0)).split(7):
        put(store, rows)
        store.flush()
    assert [p.name for p in files(store, "")] == ["key.json", "train.0.0.block"]
    everything = torch.arange(SAMPLES).flip(0)
    assert right(store, everything) and right(open_store(), everything)
    assert open_store().missing(batch_of([0])) is None


def test_a_turn_that_fits_into_memory_needs_no_segment(open_store, monkeypatch):
    store = open_store()
    monkeypatch.setattr(turns.Turn, "_write_segment", None)
    for rows in torch.arange(SAMPLES).split(7):
        put(store, rows)
    assert right(open_store(), torch.arange(SAMPLES))


def test_many_rows_do_not_wait_in_memory(open_store, monkeypatch):
    monkeypatch.setattr(stores, "WAITING_BYTES", 100)
    store = open_store()
    put(store, range(5))
    assert files(store, ".segment") == []
    put(store, range(5, 10))
    assert len(files(store, ".segment")) == 1 and right(open_store(), range(10))


def test_many_small_segments_become_one(open_store):
    store = open_store()
    for row in range(SAMPLES - 1):
        put(store, [row])
        store.flush()
        assert len(files(store, ".segment")) <= turns.MOST_SEGMENTS
    assert right(store, range(SAMPLES - 1)) and right(open_store(), range(SAMPLES - 1))
    put(store, [SAMPLES - 1])
    assert right(open_store(), range(SAMPLES)) and files(store, ".segment") == []


def test_large_segments_are_not_merged_again(open_store, monkeypatch):
    monkeypatch.setattr(turns, "SMALL_BYTES", 1)
    store = open_store()
    for row in range(turns.MOST_SEGMENTS + 3):
        put(store, [row])
        store.flush()
    assert len(files(store, ".segment")) == turns.MOST_SEGMENTS + 3


def test_a_row_keeps_its_first_value(open_store):
    store = open_store()
    put(store, [1, 2])
    batch = batch_of([2, 3, 3])
    store.add(batch, Signals(torch.full((3, CLASSES), 9.0)))
    assert right(store, [1, 2]) and read(store, [3]).unique().tolist() == [9.0]
    assert store.turn("train", 0).held == 3


def test_samples_that_nobody_asks_for_need_no_row(open_store):
    used = [1, 4, 9]
    store = open_store(used=used)
    put(store, used[:2])
    assert store.missing(batch_of([1])) is not None
    put(store, used[2:])
    assert store.missing(batch_of([1])) is None and right(store, [9, 1])
    store.flush()
    again = open_store(used=used)
    assert again.missing(batch_of([9])) is None and right(again, [9, 1, 4])


# -------------------------------------------------------------------------------------------------------------- fields


def test_mapped_and_resident_rows_are_the_same(open_store, monkeypatch):
    store = open_store()
    put(store, range(SAMPLES))
    resident = read(open_store(), [7, 0, 39])
    monkeypatch.setattr(stores, "RESIDENT_BYTES", 0)
    assert torch.equal(read(open_store(), [7, 0, 39]), resident)


def test_old_turns_make_room_for_new_ones(open_store, monkeypatch):
    store = open_store()
    monkeypatch.setattr(stores, "_RESIDENT_IN_ALL", 2 * SAMPLES * CLASSES * 2)
    for turn in range(4):
        put(store, range(SAMPLES), turn)
    assert all(right(store, [5, 6], turn) for turn in (0, 1, 2, 3, 0))
    assert len(store._resident) == 2


@pytest.mark.parametrize("classes", [100, 40_000, 70_000])
def test_top_k_keeps_the_mass_of_the_rest(open_store, classes):
    contents = Contents(True, 4, ("tap",), "fp32", classes)
    store = open_store(contents)
    logits = torch.randn(3, classes, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, -1] = 30
    feature = torch.randn(3, 2, 4)
    store.add(batch_of([5, 6, 7]), Signals(logits, features={"tap": feature}))
    store.flush()
    stored, features = open_store(contents).signals(batch_of([7, 5]), ("tap",), True)
    expected = logits[[2, 0]]
    top = expected.topk(4).indices
    given, said = stored.softmax(1), expected.softmax(1)
    torch.testing.assert_close(given.gather(1, top), said.gather(1, top), rtol=1e-4, atol=0)
    torch.testing.assert_close(stored.logsumexp(1), expected.logsumexp(1), rtol=1e-6, atol=1e-4)
    others = stored[torch.ones_like(stored, dtype=torch.bool).scatter(1, top, False)].view(2, -1)
    assert torch.equal(others.amin(1), others.amax(1)), "the rest is spread evenly"
    assert torch.equal(features["tap"], feature[[2, 0]])


@pytest.mark.parametrize(("dtype", "error"), [("fp16", 2**-11), ("fp32", 0.0)])
def test_values_are_rounded_once(open_store, dtype, error):
    contents = Contents(True, None, (), dtype, CLASSES)
    logits = torch.randn(SAMPLES, CLASSES) * 20
    store = open_store(contents)
    store.add(batch_of(range(SAMPLES)), Signals(logits))
    found = read(open_store(contents), range(SAMPLES))
    assert ((found - logits).abs() <= error * logits.abs()).all()
    assert torch.equal(found, logits.half().float() if dtype == "fp16" else logits)


def test_what_fp16_cannot_hold_is_refused(open_store):
    with pytest.raises(ConfigError, match=r"teacher_cache.dtype: fp32"):
        open_store().add(batch_of([0]), Signals(torch.full((1, CLASSES), 1e6)))
    wide = Contents(True, None, (), "fp32", CLASSES)
    open_store(wide).add(batch_of([0]), Signals(torch.full((1, CLASSES), 1e6)))
    with pytest.raises(ConfigError, match="not finite in fp32"):
        open_store(wide).add(batch_of([0]), Signals(torch.full((1, CLASSES), torch.nan)))


def test_features_of_changing_shape_are_refused(open_store):
    contents = Contents(False, None, ("a",), "fp16", CLASSES)
    store = open_store(contents)
    store.add(batch_of([0]), Signals(torch.empty(1, 0), features={"a": torch.zeros(1, 2)}))
    with pytest.raises(ConfigError, match="shape of tap:a"):
        store.add(batch_of([1]), Signals(torch.empty(1, 0), features={"a": torch.zeros(1, 3)}))


# ------------------------------------------------------------------------------------------------------------- damages


def _complete(open_store):
    store = open_store()
    for turn in (0, 1):
        put(store, range(SAMPLES), turn)
    put(store, [1, 2], turn=2)
    store.flush()
    return store


@pytest.mark.parametrize("which", ["train.1.0.block", "train.2.0.*.segment"])
def test_a_flipped_byte_stops_who_reads_it(open_store, which):
    store = _complete(open_store)
    (path,) = store.folder.glob(which)
    whole = bytearray(path.read_bytes())
    whole[-100] ^= 1
    path.write_bytes(whole)
    turn = int(path.name.split(".")[1])
    assert right(open_store(), [1])
    with pytest.raises(MissingError, match="damaged") as caught:
        read(open_store(), [1], turn)
    assert caught.value.problems[0].file == str(path)
    with pytest.raises(MissingError, match="damaged"):
        open_store().verify()
    path.unlink()
    again = open_store()
    assert missing(again, [1], turn) == [1] and len(again.verify()) == 2


def test_verify_names_every_damaged_file(open_store):
    store = _complete(open_store)
    assert len(store.verify()) == 3
    for path in files(store, ".block"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MissingError) as caught:
        store.verify()
    assert [Path(p.file).name for p in caught.value.problems] == ["train.0.0.block", "train.1.0.block"]


def test_a_file_of_another_store_is_refused(open_store):
    store = _complete(open_store)
    other = open_store(folder="other", weights="v")
    put(other, range(SAMPLES))
    (store.folder / "train.0.0.block").write_bytes((other.folder / "train.0.0.block").read_bytes())
    with pytest.raises(MissingError, match="another store"):
        read(open_store(), [1])


def test_a_file_of_another_turn_is_refused(open_store):
    store = _complete(open_store)
    (store.folder / "train.0.0.block").write_bytes((store.folder / "train.1.0.block").read_bytes())
    with pytest.raises(MissingError, match=r"holds train\.1\.0"):
        read(open_store(), [1])


def test_a_damaged_key_is_refused(open_store):
    store = _complete(open_store)
    (store.folder / "key.json").write_text("{")
    with pytest.raises(MissingError, match=r"key\.json.*damaged"):
        open_store()


def test_a_file_in_the_place_of_the_folder_is_refused(open_store, tmp_path):
    (tmp_path / "store").write_text("")
    with pytest.raises(ConfigError, match="no folder"):
        open_store()


def test_what_a_process_left_long_ago_is_removed(open_store):
    store = _complete(open_store)
    for name, age in (("old", 2 * 24 * 3600), ("new", 60)):
        (store.folder / f"{ASIDE}{name}").write_text("")
        os.utime(store.folder / f"{ASIDE}{name}", (time.time() - age,) * 2)
    put(open_store(), [5], turn=7)
    assert [p.name for p in store.folder.glob(f"{ASIDE}*")] == [f"{ASIDE}new"]


def test_clear_deletes_what_kdctl_made(open_store):
    store = _complete(open_store)
    (store.folder / f"{ASIDE}x").write_text("of a killed process")
    (store.folder / "mine.block").write_text("")
    number, size = stores.clear(store.folder)
    assert number == 5 and size > 800
    assert [p.name for p in store.folder.iterdir()] == ["mine.block"]
    (store.folder / "mine.block").unlink()
    assert stores.clear(store.folder) == (0, 0) and not store.folder.exists()
    put(store, [3], turn=5)  # a process that still has it open makes it anew
    store.flush()
    assert right(open_store(), [3], turn=5)


# ----------------------------------------------------------------------------------------------------- several at once


def test_what_another_has_written_is_found(open_store):
    one, two = open_store(), open_store()
    put(one, range(0, 20))
    assert missing(two, [1]) == [1]
    one.flush()
    assert missing(two, [1, 30]) == [30] and right(two, [1])
    put(two, range(20, SAMPLES))  # with the rows of the other, this is all
    assert [p.name for p in files(two, "")] == ["key.json", "train.0.0.block"]
    assert right(one, [1]), "its segment is deleted, and still read"
    assert missing(one, [30]) == [] and right(one, range(SAMPLES))


def test_the_second_of_two_blocks_is_dropped(open_store):
    one, two = open_store(), open_store()
    put(one, range(0, 39))
    put(two, range(0, 39))
    put(one, [39])
    before = files(one, ".block")[0].stat().st_ino
    put(two, [39])
    assert files(two, ".block")[0].stat().st_ino == before and right(two, range(SAMPLES))
    assert [p.name for p in files(two, "")] == ["key.json", "train.0.0.block"]


def test_merging_loses_nothing_of_another(open_store):
    one, two = open_store(), open_store()
    for row in range(0, 38, 2):
        put(one, [row])
        one.flush()
        put(two, [row + 1])
        two.flush()
    assert right(one, range(37)) and right(two, range(38)) and right(open_store(), range(38))


CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from made_stores import CONTENTS, SAMPLES, made_key, put, right
from kdctl.teachers import block, store as stores, turn as turns
from kdctl.teachers.store import Store

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def open_store():
    return Store(Path({folder!r}), made_key(), CONTENTS, {{"train": SAMPLES}})
"""

HALF_WRITTEN = """
store, fsync, count = open_store(), os.fsync, iter(range(100))
block.os.fsync = lambda file: kill() if next(count) == 4 else fsync(file)
for rows in torch.arange(SAMPLES).split(5):
    put(store, rows)
    store.flush()
"""

BEFORE_CLEANING = """
store = open_store()
turns._remove = kill
for rows in torch.arange(SAMPLES).split(5):
    put(store, rows)
    store.flush()
"""

TOGETHER = """
sys.stdin.readline()
for turn in range(6):
    store = open_store()
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(turn * 10 + {number}))
    for rows in order.split(3):
        missing = store.missing(batch := __import__("made_stores").batch_of(rows, turn))
        if missing is not None and missing.any():
            put(store, rows[missing], turn)
        store.flush()
        assert right(store, rows, turn)
    assert right(store, order, turn)
print("done")
"""


def child(tmp_path, body, **values):
    values |= {"tests": str(Path(__file__).parent), "folder": str(tmp_path / "store")}
    return [sys.executable, "-c", (CHILD + body).format(**values)]


@pytest.mark.parametrize(("body", "held"), [(HALF_WRITTEN, 15), (BEFORE_CLEANING, SAMPLES)])
def test_a_killed_process_leaves_what_it_had_flushed(open_store, tmp_path, body, held):
    assert subprocess.run(child(tmp_path, body)).returncode == -9
    store = open_store()
    left = {p.name for p in store.folder.iterdir()}
    assert any(n.startswith(ASIDE) for n in left) == (held < SAMPLES), "one was killed while it wrote"
    assert store.turn("train", 0).held == held and right(store, range(held))
    assert store.verify()
    put(store, range(held, SAMPLES))
    store.flush()
    assert right(open_store(), range(SAMPLES))


def test_two_processes_fill_the_same_turns_at_once(open_store, tmp_path):
    both = [
        subprocess.Popen(child(tmp_path, TOGETHER, number=n), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for n in (1, 2)
    ]
    assert [p.communicate("go\n")[0] for p in both] == ["done\n", "done\n"]
    store = open_store()
    assert [p.name for p in files(store, "")] == ["key.json", *(f"train.{t}.0.block" for t in range(6))]
    assert all(right(store, range(SAMPLES), turn) for turn in range(6))
    assert len(store.verify()) == 6


def test_a_segment_that_vanishes_between_listing_and_reading(open_store, monkeypatch):
    one, two = open_store(), open_store()
    put(one, range(5))
    one.flush()
    listed = turns.turn_files
    names = iter([["train.0.0.0123456789abcdef.segment"]])
    monkeypatch.setattr(turns, "turn_files", lambda *place: next(names, None) or listed(*place))
    assert right(two, range(5))
