"""Measured cells: fresh processes, in turns, with their own threads; no assertion about time."""

from __future__ import annotations

import itertools
import os
import sys
import textwrap

import numpy as np
import pytest
from torch import nn

from kdctl.bench import cell as timing
from kdctl.bench import cost
from kdctl.bench.latency import Cell, measure
from kdctl.errors import KdctlError

OPENERS = """
    import os
    import numpy as np

    class Predictor:
        image_shape = (1, 2, 2)
        num_classes = 2
        fixed_batch = None

        def __init__(self, name, log, threads):
            print("a library that prints")
            os.write(1, b"and one that writes")
            self.name, self.log, self.calls = name, log, 0
            self.runtime = f"{threads} {os.environ['OMP_NUM_THREADS']} {os.getpid()}"

        def __call__(self, images):
            assert images.dtype == np.float32 and images.shape[1:] == (1, 2, 2)
            self.calls += 1
            if self.calls > 4:  # after the warm-up, in which processes run side by side
                with open(self.log, "a") as file:
                    file.write(f"{self.name}{len(images)} ")
            return np.zeros((len(images), 2), np.float32)

    def good(name, log, threads):
        return Predictor(name, log, threads)

    def hungry(megabytes, threads):
        predictor = Predictor("h", os.devnull, threads)
        np.ones(megabytes * 2**17)
        return predictor

    def asks(threads):
        predictor = Predictor("a", os.devnull, threads)
        predictor.runtime = str(os.environ.get("OTHER"))
        return predictor

    def apart(threads):
        predictor = Predictor("a", os.devnull, threads)
        predictor.runtime = str(os.getpgrp() == os.getpid())
        return predictor

    def raises(threads):
        raise RuntimeError("no such runtime")

    def dies(threads):
        os.write(2, b"something\\nout of luck\\n")
        os._exit(9)
"""


@pytest.fixture(autouse=True)
def openers(tmp_path, monkeypatch):
    (tmp_path / "openers.py").write_text(textwrap.dedent(OPENERS))
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    )


def cell(name, log, **settings):
    return Cell(name, "openers:good", {"name": name, "log": str(log)}, **settings)


def test_cells_take_turns_in_processes_of_their_own(tmp_path):
    log = tmp_path / "log"
    told = []
    a, b, c = measure(
        [cell("a", log, batch=2), cell("b", log), cell("c", log, threads=2)], seconds=0.3, progress=told.append
    )
    assert [row.what for row in (a, b, c)] == ["a", "b", "c"]
    assert [row.batch for row in (a, b, c)] == [2, 1, 1]
    assert [row.runtime.split()[:2] for row in (a, b, c)] == [["1", "1"], ["1", "1"], ["2", "2"]]
    assert len({row.runtime.split()[2] for row in (a, b, c)} | {str(os.getpid())}) == 4
    assert told == ["batch 1, 1 thread", "batch 2, 1 thread", "batch 1, 2 threads"]
    for row in (a, b, c):
        assert 0 < row.p50_ms <= row.p95_ms and row.cpu_ms > 0 and row.calls > 1
        assert row.samples_per_second == pytest.approx(1000 * row.batch / row.p50_ms)
        assert row.as_dict()["peak_bytes"] > 2**20


def test_a_comparison_is_interleaved(tmp_path):
    log = tmp_path / "log"
    measure([cell("a", log), cell("b", log)], seconds=0.3)
    turns = [name for name, _ in itertools.groupby(log.read_text().split())]
    assert turns == ["a1", "b1", "a1", "b1"]  # three turns: a b, b a, a b


def test_a_cell_runs_in_another_interpreter(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nOTHER=yes exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    here, there = measure(
        [Cell("here", "openers:asks"), Cell("there", "openers:asks", python=str(python))], seconds=0.1
    )
    assert (here.runtime, there.runtime) == ("None", "yes")
    with pytest.raises(KdctlError, match=r"x cannot be timed: .*nowhere: No such file"):
        measure([Cell("x", "openers:asks", python=str(tmp_path / "nowhere"))])


@pytest.mark.skipif(os.name != "posix", reason="groups of processes")
def test_a_terminals_signals_do_not_reach_a_cell_nor_a_users_file_its_modules(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "work" / "json.py").write_text("raise RuntimeError('not the module that was meant')")
    assert measure([Cell("x", "openers:apart")], seconds=0.1)[0].runtime == "True"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_the_cells_own(tmp_path):
    mine = np.ones(300 * 2**17)
    small, large = measure(
        [Cell("s", "openers:hungry", {"megabytes": 1}), Cell("l", "openers:hungry", {"megabytes": 120})], seconds=0.1
    )
    assert small.peak_bytes < 100 * 2**20 < large.peak_bytes < mine.nbytes


@pytest.mark.parametrize(
    "opener, message",
    [
        ("raises", "x cannot be timed: RuntimeError: no such runtime"),
        ("dies", "x cannot be timed: its process ended with code 9: out of luck"),
        ("missing", "has no attribute 'missing'"),
    ],
)
def test_a_cell_that_fails_says_why(opener, message):
    with pytest.raises(KdctlError, match=message):
        measure([Cell("x", f"openers:{opener}")], seconds=0.1)


def test_costs(tmp_path):
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 64, 10)
    )
    assert cost.parameters(net) == 4 * 27 + 8 + 2560 + 10
    assert cost.macs(net, (3, 8, 8)) == 64 * 4 * 27 + 2560
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)  # 10 tokens; attention has two products
    assert cost.macs(nn.Sequential(nn.Flatten(1, 2), layer), (1, 10, 16)) == 10 * 16 * (4 * 16 + 2 * 10 + 2 * 32)
    assert net.training
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_bytes(b"123")
    (tmp_path / "openers.py").write_bytes(b"12345")
    assert cost.file_bytes(tmp_path) == 8 and cost.file_bytes(tmp_path / "openers.py") == 5


@pytest.mark.parametrize(("ticks", "expected"), [([0, 0, 7, 7, 8, 8, 3, 5], 2e-6), ([4] * 8, None)])
def test_a_clock_that_moves_in_ticks_gives_no_time_of_nothing(
    ticks: list[int], expected: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.cycle(ticks)
    monkeypatch.setattr(timing.time, "process_time_ns", lambda: next(calls))
    found = timing._round(lambda images: images, None, 0.01)
    assert found["cpu_ms"] == pytest.approx(expected) if expected else found["cpu_ms"] == min(found["wall_ms"])
    assert found["cpu_ms"] > 0
