"""A finished group with every file that a report reads, made once: no test of a report trains anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_runs import make_group

from kdctl.report.facts import collect
from kdctl.report.page import render
from kdctl.runs import Run

NOTE = "an <i>added</i> note"


@pytest.fixture(scope="session")
def group(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Run], Path]:
    """The runs of five seeds and six controls, the student of seed 0 first, and the file of the group."""
    return make_group(tmp_path_factory.mktemp("group") / "runs", seeds=5)


@pytest.fixture(scope="session")
def text(group: tuple[list[Run], Path]) -> str:
    """The page of the group, drawn once for all tests."""
    return render(collect([group[0][0]]), notes=[NOTE])
