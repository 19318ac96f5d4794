"""What a machine offers: cores, quota, threads of the environment; what is put into force, and put back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdctl import device
from kdctl.config.schema import RunSettings
from kdctl.errors import ConfigError, MissingError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "300000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "900000 100000\n"}, 8),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/pod\n4:memory:/pod\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
    ],
)
def test_cores_within_the_quota(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert device.usable_cores(tmp_path) == cores


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "4,2"}, 4),
        ({"MKL_NUM_THREADS": "2"}, 2),
        ({"OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "2"}, 3),
        ({"OMP_NUM_THREADS": "0"}, None),
        ({"OMP_NUM_THREADS": "many"}, None),
    ],
)
def test_threads_of_the_environment(
    environment: dict[str, str], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert device.wished_threads() == expected


def test_the_rule_keeps_what_is_set() -> None:
    given = RunSettings(precision="bf16", layout="channels_last", threads=7, compile=True, device="cpu", seed=3)
    assert device.settle_by_rule(given) == given
    plain = device.settle_by_rule(RunSettings(device="cpu"))
    assert (plain.precision, plain.layout, plain.compile) == ("fp32", "contiguous", False)
    assert plain.threads == (device.wished_threads() or device.usable_cores())


def test_what_a_device_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="fp16 does not train on a CPU"):
        device.settle_by_rule(RunSettings(device="cpu", precision="fp16"))
    with pytest.raises(ConfigError, match="allowed: auto, cpu"):
        device.choose_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(MissingError, match="no device 'cuda'"):
            device.choose_device("cuda")


def test_settings_in_force_are_put_back() -> None:
    def state() -> tuple[object, ...]:
        return torch.get_num_threads(), torch.get_deterministic_debug_mode(), torch.get_float32_matmul_precision()

    before, random = state(), torch.get_rng_state()
    with device.restored(CPU):
        for threads in (2, 1, 2):
            device.apply_settings(RunSettings(device="cpu", threads=threads))
            assert torch.get_num_threads() == threads
        assert torch.are_deterministic_algorithms_enabled()
        torch.rand(3)
        torch.manual_seed(5)
    assert state() == before
    assert torch.equal(torch.get_rng_state(), random)


def test_threads_are_left_alone_until_they_are_settled() -> None:
    before = torch.get_num_threads()
    with device.restored(CPU):
        device.apply_settings(RunSettings())
        assert torch.get_num_threads() == before


def test_the_processor_has_a_name() -> None:
    assert device.processor(CPU).strip()
    assert isinstance(device.has_fast_bf16(CPU), bool)
