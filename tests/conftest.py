"""What holds for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

SHARED = ("sharding", "ranks", "elsewhere", "few_sample", "predict", "bench", "snapshots", "browser")
"""Files `..._<name>.py` whose tests share something that takes long to make: one process runs all of such a file."""


class _ByFileWhereShared(LoadScopeScheduling):
    """Hands out single tests, but for the files of SHARED, which come first and stay together."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if file.removesuffix(".py").endswith(tuple(f"_{name}" for name in SHARED)) else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _ByFileWhereShared(config, log)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCTL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def nothing_measured() -> Iterator[None]:
    """Runs in this process settle by rule: what a test sees does not hang on how fast the machine is at the moment."""
    from kdctl.config.schema import Experiment, RunSettings
    from kdctl.device import settle_by_rule
    from kdctl.probe import choose

    def settle(experiment: Experiment, *_: Any) -> RunSettings:
        return settle_by_rule(experiment.train)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "settle", settle)
        yield
