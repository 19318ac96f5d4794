"""The order of the house: imports point strictly down, siblings stay apart, nothing above the torch line imports torch.

Every import statement counts, also those inside functions; names that are imported as text (the tables) do not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kdctl.cli.app import COMMANDS

ROOT = Path(__file__).resolve().parent.parent / "kdctl"

ORDER = [
    ["errors"],
    ["source"],
    ["registry", "config", "runs", "stats", "watch", "launch", "loggers"],
    ["report"],
    ["device", "ranks", "sharding", "clock", "taps", "signals", "torchvision_guard"],
    ["quant"],
    ["models", "data", "optim"],
    ["tasks"],
    ["quality"],
    ["losses"],
    ["teachers"],
    ["methods"],
    ["assembly"],
    ["build"],
    ["probe"],
    ["cache"],
    ["checkpoint"],
    ["evaluate"],
    ["provenance"],
    ["shares"],
    ["step"],
    ["fit"],
    ["bench"],
    ["summary"],
    ["forecast", "analysis"],
    ["export"],
    ["compress"],
    ["artefacts"],
    ["predict"],
    ["pipeline"],
    ["extension", "control", "group"],
    ["experiment", "smoke"],
    ["cli"],
    ["api"],
    ["__main__"],
]
"""The rooms from the bottom up; rooms of one row may use each other without going in circles, unless SIBLINGS."""

SIBLINGS = [{"models", "data", "optim"}]
"""Rooms that never import each other."""

ABOVE_THE_LINE = ["errors", "source", "registry", "config", "runs", "stats", "watch", "launch", "loggers", "report"]
VERBS_WITHOUT_TORCH = ["init", "list", "explain", "schema", "show", "compare", "doctor"]
SHARED_BY_VERBS = ["app", "console", "templates", "verb"]
HEAVY = {"torch", "torchvision", "numpy"}


@dataclass(frozen=True)
class Import:
    """One import statement: of `name`, in `module`; deferred when inside a function, typing when never executed."""

    module: str
    name: str
    line: int
    deferred: bool
    typing: bool


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of the package at `root`."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = [root.name, *path.relative_to(root).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def read_imports(root: Path) -> list[Import]:
    known = modules(root)
    return [found for name, path in known.items() for found in _imports_of(name, path, known)]


def _imports_of(module: str, path: Path, known: dict[str, Path]) -> Iterator[Import]:
    def visit(node: ast.AST, deferred: bool, typing: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, node.lineno, deferred, typing)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield Import(module, inner if inner in known else str(node.module), node.lineno, deferred, typing)
        typing = typing or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        deferred = deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, deferred, typing)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False, False)


def room(module: str) -> str | None:
    """The room that a module of the package stands in; None for the package itself and for foreign modules."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == ROOT.name else None


def order_problems(imports: list[Import]) -> list[str]:
    """Every import that points up, to a sibling, or concerns a room that the order does not know."""
    level = {name: i for i, row in enumerate(ORDER) for name in row}
    problems = []
    for found in imports:
        here, there = room(found.module), room(found.name)
        if there is None or here == there:
            continue
        where = f"{found.module}:{found.line} imports {found.name}"
        unknown = [name for name in (here, there) if name is not None and name not in level]
        if unknown:
            problems.append(f"{where}: no place in the order for {unknown[0]}")
        elif here is None or level[there] > level[here]:
            problems.append(f"{where}: that is upwards")
        elif any({here, there} <= row for row in SIBLINGS):
            problems.append(f"{where}: siblings stay apart")
    return problems


def cycles(imports: list[Import]) -> list[list[str]]:
    """Groups of modules that import each other in a circle when they run, by Tarjan's strongly connected components."""
    edges: dict[str, set[str]] = {}
    for found in imports:
        if not found.typing and found.name != found.module and room(found.name) is not None:
            edges.setdefault(found.module, set()).add(found.name)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    result: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in edges.get(module, ()):
            if other not in index:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                result.append(sorted(group))

    for module in edges:
        if module not in index:
            visit(module)
    return result


def heavy_paths(imports: list[Import], start: str, deferred: bool) -> list[str]:
    """The ways on which importing `start` reaches a heavy library; `deferred` follows imports inside functions too."""
    by_module: dict[str, list[Import]] = {}
    for found in imports:
        if not found.typing and (deferred or not found.deferred):
            by_module.setdefault(found.module, []).append(found)
    way = {start: start}
    queue, reached = [start], []
    while queue:
        module = queue.pop()
        for found in by_module.get(module, []):
            if found.name.split(".")[0] in HEAVY:
                reached.append(f"{way[module]} -> {found.name} (line {found.line})")
            parents = [found.name.rsplit(".", up)[0] for up in range(found.name.count(".") + 1)]
            for target in parents:  # importing a.b.c runs a, a.b and a.b.c
                if target.startswith(ROOT.name) and target not in way:
                    way[target] = f"{way[module]} -> {target}"
                    queue.append(target)
    return reached


IMPORTS = read_imports(ROOT)
MODULES = modules(ROOT)
TORCH_FREE = [
    name
    for name in MODULES
    if room(name) in (None, *ABOVE_THE_LINE)
    or MODULES[name].name == "__init__.py"
    or name in [f"kdctl.cli.{verb}" for verb in [*VERBS_WITHOUT_TORCH, *SHARED_BY_VERBS]]
]


def test_imports_point_down():
    assert order_problems(IMPORTS) == []


def test_no_circles():
    assert cycles(IMPORTS) == []


@pytest.mark.parametrize("module", TORCH_FREE)
def test_nothing_above_the_torch_line_reaches_torch(module):
    assert heavy_paths(IMPORTS, module, deferred=True) == []


@pytest.mark.parametrize("module", sorted({target.split(":")[0] for target, _ in COMMANDS.values()}))
def test_importing_a_verb_does_not_import_torch(module):
    assert heavy_paths(IMPORTS, module, deferred=False) == []


def test_the_lists_of_this_file_name_what_is_there():
    for verb in [*VERBS_WITHOUT_TORCH, *SHARED_BY_VERBS]:
        assert f"kdctl.cli.{verb}" in MODULES
    assert "kdctl.config.schema" in TORCH_FREE and "kdctl.losses" in TORCH_FREE


# ------------------------------------------------------------------------------------- the checks themselves can fail


@pytest.fixture
def house(tmp_path):
    """A small package called kdctl, written from {file: source}."""

    def build(files: dict[str, str]) -> list[Import]:
        root = tmp_path / "kdctl"
        for name, source in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / "__init__.py").touch()
            path.write_text(source)
        (root / "__init__.py").touch()
        return read_imports(root)

    return build


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"errors.py": "from kdctl import runs\n", "runs.py": ""}, "upwards"),
        ({"fit.py": "def f():\n    import kdctl.cli.app\n", "cli/app.py": ""}, "upwards"),
        ({"data/base.py": "from kdctl.models import vgg\n", "models/vgg.py": ""}, "siblings"),
        ({"cli/app.py": "import kdctl.helpers\n", "helpers.py": ""}, "no place in the order for helpers"),
    ],
)
def test_a_wrong_arrow_is_found(house, files, problem):
    (found,) = order_problems(house(files))
    assert problem in found


def test_a_right_arrow_is_not(house):
    files = {"fit.py": "from kdctl.errors import KdctlError\nfrom kdctl.models import vgg\n"}
    assert order_problems(house({**files, "errors.py": "", "models/vgg.py": ""})) == []


def test_a_circle_is_found(house):
    files = {"config/a.py": "import kdctl.config.b", "config/b.py": "def f():\n    from kdctl.config import a\n"}
    assert cycles(house(files)) == [["kdctl.config.a", "kdctl.config.b"]]


def test_torch_is_found_through_others(house):
    imports = house({
        "runs.py": "def f():\n    from kdctl.report import plots\n",
        "report/plots.py": "import numpy as np\n",
        "stats.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n",
        "report/__init__.py": "import torch.nn\n",
    })  # fmt: skip
    found = heavy_paths(imports, "kdctl.runs", deferred=True)
    assert any("kdctl.report.plots -> numpy" in way for way in found)
    assert any("kdctl.report -> torch.nn" in way for way in found)
    assert heavy_paths(imports, "kdctl.runs", deferred=False) == []
    assert heavy_paths(imports, "kdctl.stats", deferred=True) == []
