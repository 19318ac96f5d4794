"""Energy counters as the kernel shows them, and the peak of memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kdctl.bench import meter
from kdctl.bench.meter import Counter, Meter, find_counters


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two packages, a core and a memory zone of the first, and psys, which holds them all."""
    zones = {"0": "package-0", "0:0": "core", "0:1": "dram", "1": "package-1", "2": "psys"}
    for number, name in zones.items():
        zone = tmp_path / f"intel-rapl:{number}"
        zone.mkdir()
        (zone / "name").write_text(f"{name}\n")
        (zone / "energy_uj").write_text("1000\n")
        (zone / "max_energy_range_uj").write_text("262143328850\n")
    return tmp_path


def advance(powercap: Path, **zones: int) -> None:
    for name, value in zones.items():
        (powercap / f"intel-rapl:{name[1:].replace('_', ':')}" / "energy_uj").write_text(str(value))


def test_packages_and_their_memory_are_counted_once(powercap: Path) -> None:
    with Meter(powercap=powercap) as measured:
        advance(powercap, z0=3_001_000, z0_0=9_000_000, z0_1=501_000, z1=1_001_000, z2=99_000_000)
    found = measured.describe()
    assert found["energy_joules"] == pytest.approx(3 + 0.5 + 1)
    assert found["energy_source"] == "Intel RAPL (package-0, dram, package-1), the whole machine"


def test_a_counter_that_begins_anew(tmp_path: Path) -> None:
    file = tmp_path / "energy_uj"
    counter = Counter(file, wrap=999_999)
    for value in (900_000, 950_000, 25_000, 30_000):
        file.write_text(str(value))
        counter.read()
    assert counter.joules == pytest.approx(0.13)


def test_readings_in_between_catch_a_turn(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Meter(powercap=powercap)
    measured.__enter__()
    for value in (200_000_001_000, 100_000_001_000, 1000):
        advance(powercap, z0=value)
        measured._read()
    measured.__exit__(None, None, None)
    wrap = 262_143_328_851
    assert measured.describe()["energy_joules"] == pytest.approx((200e9 + (wrap - 100e9) + (wrap - 100e9)) / 1e6)


def test_no_counters_and_why(tmp_path: Path, powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_counters(tmp_path / "nowhere") == ([], "not measured: this machine shows no RAPL counters")
    (powercap / "intel-rapl:1" / "energy_uj").write_text("what?")
    with Meter(powercap=powercap) as measured:
        pass
    found = measured.describe()
    assert found["energy_joules"] is None and "stopped answering" in found["energy_source"]

    def refused(path: Path, *_: object) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return "package-0" if path.name == "name" else "1"

    monkeypatch.setattr(Path, "read_text", refused)
    counters, why = find_counters(powercap)
    assert counters == [] and "rights of root" in why


def test_a_resumed_work_has_no_energy(powercap: Path) -> None:
    with Meter(powercap=powercap) as measured:
        pass
    assert measured.describe(seconds=0)["energy_joules"] == 0
    found = measured.describe(seconds=100)
    assert found["energy_joules"] is None and "resumed" in found["energy_source"]


def test_the_peak_of_memory(powercap: Path) -> None:
    with Meter(powercap=powercap) as small:
        pass
    with Meter(powercap=powercap) as large:
        np.ones(200 << 20, dtype=np.uint8).sum()
    with Meter(powercap=powercap) as after:
        pass
    peaks = [m.describe()["peak_bytes"] for m in (small, large, after)]
    assert peaks[1] >= peaks[0] + (150 << 20)
    if Path("/proc/self/clear_refs").exists():
        assert peaks[2] < peaks[1] - (100 << 20)


def test_a_peak_that_cannot_be_reset(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "no")))
    meter._reset_peak()
