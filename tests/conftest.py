"""What holds for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


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
