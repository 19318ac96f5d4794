"""Completion of words on the command line: what a parameter of a verb may be, read from tables and names of files.

Typer asks here while the user types: nothing that is heavy is imported, and what goes wrong completes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from kdctl.errors import UsageError, did_you_mean

VARIABLE = "_KDCTL_COMPLETE"
"""The environment variable with which a shell asks."""
OPTIONS = ("--install-completion", "--show-completion")
SHELLS = ("bash", "zsh", "fish", "powershell", "pwsh")
Words = Iterable[str | tuple[str, str]]
Source = Callable[[Any, str], Words]
"""(context, what is typed so far) -> words, each with its help where there is some."""


def of(verb: str, parameter: str) -> Callable[..., list[Any]] | None:
    """What completes a parameter of a verb, in the form that Typer takes; None where its values are free."""
    source = _SOURCES.get(f"{verb}.{parameter}") or _SOURCES.get(parameter)
    if source is None:
        return None

    def complete(ctx: Any, incomplete: str) -> list[Any]:
        try:
            return list(source(ctx, incomplete))
        except Exception:  # a shell has no place for an error
            return []

    complete.__annotations__ = {"incomplete": str}  # by these and by their names Typer knows what to hand over
    return complete


def asked() -> bool:
    """Whether a shell, not a user, called."""
    return VARIABLE in os.environ


def answer(arguments: list[str]) -> None:
    """`--show-completion [SHELL]` prints the script of a shell, `--install-completion [SHELL]` puts it into its start.

    Raises UsageError where the shell is none of those that Typer knows.
    """
    from typer.completion import get_completion_script, install

    shell = arguments[1] if len(arguments) > 1 else _current_shell()
    if shell not in SHELLS:
        what = f"'{shell}' is no shell that can be completed" if shell else "it cannot be told which shell this is"
        hint = did_you_mean(shell or "", SHELLS) or f"`kdctl {arguments[0]} bash`"
        raise UsageError(f"{what}; allowed: {', '.join(SHELLS)}", hint=hint)
    if arguments[0] == "--show-completion":
        print(get_completion_script(prog_name="kdctl", complete_var=VARIABLE, shell=shell))
        return
    name, path = install(shell=shell, prog_name="kdctl", complete_var=VARIABLE)
    print(f"completion for {name} is installed in {path}; it takes effect in the next shell")


def _current_shell() -> str | None:
    try:
        import shellingham

        return str(shellingham.detect_shell()[0])
    except Exception:  # it has its own error where it finds none
        return None


def show_texts_as_they_are() -> None:
    """Keeps Typer from loading rich (50 ms) to take markup out of help texts, which have none."""
    try:
        import typer._completion_classes as classes

        classes._sanitize_help_text = lambda text: text
    except (ImportError, AttributeError):
        return


# ------------------------------------------------------------------------------------------------------------- sources


def _one_of(*words: str) -> Source:
    return lambda ctx, incomplete: words


def _several_of(source: Source) -> Source:
    """Words with commas between them: the last one is completed."""

    def complete(ctx: Any, incomplete: str) -> Words:
        before, comma, last = incomplete.rpartition(",")
        for word in source(ctx, last):
            name, *text = (word,) if isinstance(word, str) else word
            if name in before.split(","):
                continue
            yield (before + comma + name, *text) if text else before + comma + name  # type: ignore[misc]

    return complete


def _all_of(*sources: Source) -> Source:
    return lambda ctx, incomplete: [word for source in sources for word in source(ctx, incomplete)]


def _under_runs(pattern: str) -> list[Path]:
    from kdctl.runs import ROOT

    return [path for path in sorted(ROOT.glob(pattern)) if not path.parent.name.startswith(".")]


def _runs(ctx: Any, incomplete: str) -> Words:
    found = [path.parent for path in _under_runs("*/[!.]*/run.json")]
    if not found:
        return []
    return ["latest", *dict.fromkeys(path.parent.name for path in found), *map(str, found)]


def _artefacts(ctx: Any, incomplete: str) -> Words:
    return [str(path.parent) for path in _under_runs("*/*/artefacts/[!.]*/manifest.json")]


def _groups(ctx: Any, incomplete: str) -> Words:
    return [str(path) for path in _under_runs("*/groups/[0-9]*.json")]


def _configs(ctx: Any, incomplete: str) -> Words:
    """YAML files and the folders beside them; without any the shell looks for files itself."""
    folder, part = os.path.split(incomplete)
    entries = [e for e in os.scandir(folder or ".") if e.name.startswith(part) and not e.name.startswith(".")]
    files = sorted(e.name for e in entries if e.name.endswith((".yaml", ".yml")))
    folders = sorted(e.name + "/" for e in entries if e.is_dir()) if files else []
    return [os.path.join(folder, name) for name in [*files, *folders]]


def _templates(ctx: Any, incomplete: str) -> Words:
    from kdctl.cli import templates

    return list(templates.templates())


def _lists(ctx: Any, incomplete: str) -> Words:
    from kdctl import registry

    return [*registry.GROUPS, "templates", "runs"]


def _components(ctx: Any, incomplete: str, group: str | None = None) -> Words:
    """Components of a group, or of all of them, with their summaries; `group.name` once a group is typed."""
    from kdctl import registry

    typed = incomplete.partition(".")[0]
    if group is None and "." in incomplete and typed in registry.GROUPS:
        return [(f"{typed}.{c.name}", c.summary) for c in registry.catalogue(typed).values()]
    groups = registry.GROUPS if group is None else [group]
    names = [(c.name, c.summary) for g in groups for c in registry.catalogue(g).values()]
    return [*names, *((alias, name) for g in groups for alias, name in registry.aliases(g).items())]


def _listed(ctx: Any, incomplete: str) -> Words:
    """What stands in the list that is asked for."""
    from kdctl import registry

    what = ctx.params.get("what")
    if what in registry.GROUPS:
        return _components(ctx, incomplete, what)
    return {"templates": _templates, "runs": _runs}[what](ctx, incomplete)


_RUN_OR_ARTEFACT = _all_of(_runs, _artefacts)
_SOURCES: dict[str, Source] = {
    "run": _runs,
    "against": _runs,
    "config": _configs,
    "recipe": _configs,
    "template": _templates,
    "explain.name": _components,
    "list.what": _lists,
    "list.pattern": _listed,
    "cache.action": _one_of("build", "show", "verify", "clear"),
    "show.experiment": _all_of(_configs, _runs),
    "show.diff": _all_of(_configs, _runs),
    "eval.what": _all_of(_runs, _artefacts, _configs),
    "export.what": _RUN_OR_ARTEFACT,
    "bench.what": _RUN_OR_ARTEFACT,
    "predict.what": _RUN_OR_ARTEFACT,
    "report.what": _all_of(_runs, _groups),
    "clean.what": _runs,
    "compare.what": _all_of(_runs, _artefacts, _groups),
    "compare.baseline": _all_of(_runs, _artefacts, _groups),
    "compare.form": _one_of("table", "md", "csv", "json", "html"),
    "to": _several_of(partial(_components, group="exporters")),
    "dtype": _several_of(_one_of("fp32", "int8", "int4", "fp16", "bf16")),
    "quantize": _one_of("int8", "int4", "fp16", "bf16"),
    "split": _one_of("train", "val", "test"),
    "checkpoint": _one_of("best", "last"),
    "device": _one_of("auto", "cpu", "cuda", "mps"),
}
"""By `verb.parameter`, or by the parameter's name in all verbs."""
