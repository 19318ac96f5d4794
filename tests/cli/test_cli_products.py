"""What is said of an artefact, in words."""

from __future__ import annotations

from typing import Any

import pytest

from kdctl.cli import products


@pytest.mark.parametrize(("size", "told"), [(500, "2.00x smaller"), (1000, "1.00x smaller"), (1250, "1.25x larger")])
def test_a_larger_file_is_not_called_smaller(size: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    document: dict[str, Any] = {
        "variant": "pt2", "artefact": "runs/a/001/artefacts/pt2", "before": {"bytes": 1000}, "after": {"bytes": size},
        "max_abs_diff": 0.5, "delegated": None, "details": {}, "gates": [], "notes": [],
    }  # fmt: skip
    products._show_one(document)
    assert capsys.readouterr().out == f"pt2: {told}, largest difference 0.5; runs/a/001/artefacts/pt2\n"
