"""`kdctl`: the table of commands, and the one place that runs a verb and turns what goes wrong into text and exit code.

To add a verb: write kdctl/cli/<verb>.py with one function (verb.py shows its form) and one line in COMMANDS. The
function takes an options object and its own parameters, returns a Reply (a JSON-able dict and a function that shows it
to people) and raises KdctlError. It never prints JSON, parses common options, catches errors or calls sys.exit: that
happens here and in verb.py, so `--json`, `--quiet`, `--debug`, `--offline`, overrides, exit codes and broken pipes
behave alike everywhere. A reply that is whole and still fails (a missed gate, an interrupted run) carries its error in
`Reply.error`. Only the module of the verb that is run is imported, and a verb's module imports what is heavy inside its
function: `--help` must not cost torch.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from kdctl import __version__
from kdctl.cli import completion, console
from kdctl.cli.verb import command, plain_flag, spare_pydantic
from kdctl.errors import (
    Interrupted,
    KdctlError,
    OutOfMemoryError,
    Problem,
    UsageError,
    did_you_mean,
    is_out_of_memory,
)

COMMANDS = {
    "init": ("kdctl.cli.init:init", "Write an experiment file to start from."),
    "list": ("kdctl.cli.list:list_", "The catalogue: models, losses, data, templates, runs, ..."),
    "explain": ("kdctl.cli.explain:explain", "One component or configuration key."),
    "schema": ("kdctl.cli.schema:schema", "The JSON Schema of experiment files, for editors."),
    "check": ("kdctl.cli.check:check", "Every problem of an experiment file at once, without torch."),
    "show": ("kdctl.cli.show:show", "The resolved experiment, and where its values came from."),
    "train": ("kdctl.cli.train:train", "Run every stage of an experiment."),
    "resume": ("kdctl.cli.resume:resume", "Continue an unfinished run."),
    "eval": ("kdctl.cli.eval:eval_", "Measure student and teacher on the same samples."),
    "predict": ("kdctl.cli.predict:predict", "Labels and probabilities for image files and arrays."),
    "cache": ("kdctl.cli.cache:cache", "Build, show, verify or clear the store of teacher outputs."),
    "compress": ("kdctl.cli.compress:compress", "Prune, factorise, fine-tune, quantize a run's student."),
    "export": ("kdctl.cli.export:export", "Files for other runtimes, each run and compared in its own."),
    "bench": ("kdctl.cli.bench:bench", "Latency, throughput and memory of runs and artefacts."),
    "compare": ("kdctl.cli.compare:compare", "Runs, groups and artefacts side by side."),
    "report": ("kdctl.cli.report:report", "One page about a run and its group, which opens offline."),
    "clean": ("kdctl.cli.clean:clean", "What could be deleted, and with --yes deletes it."),
    "doctor": ("kdctl.cli.doctor:doctor", "The environment: what is missing or mismatched, and how to mend it."),
}


class _Terminated(KeyboardInterrupt):
    """SIGTERM, where nothing has a way of its own to stop at it."""


class _Stopped(Exception):
    """A signal has stopped a verb at once: the KeyboardInterrupt that it comes from, in a form that Typer hands on."""


class LazyGroup(typer.core.TyperGroup):
    """A group that imports a verb's module only when that verb is called."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stopped:
            raise _Stopped from stopped

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module, function = COMMANDS[cmd_name][0].split(":")
        return command(cmd_name, getattr(importlib.import_module(module), function))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        word = args[0]
        if word not in COMMANDS and not word.startswith("-"):
            hint = did_you_mean(word, COMMANDS) or "`kdctl --help` lists the commands"
            raise UsageError(f"no such command '{word}'", hint=hint)
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Names of commands with their lines, without importing any of them; else options."""
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        item: Any = type(super().shell_complete(ctx, "--help")[0])  # whose module depends on Typer's version
        return [item(name, help=text) for name, (_, text) in COMMANDS.items() if name.startswith(incomplete)]

    def get_help_option(self, ctx: Any) -> Any:
        return plain_flag(super().get_help_option(ctx))


app = typer.Typer(
    cls=LazyGroup,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"kdctl {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """Knowledge distillation and model compression from one YAML.

    `kdctl init` writes an experiment, `kdctl train` runs it, `kdctl eval` measures the result, `kdctl compress` makes
    it smaller. `kdctl COMMAND --help` explains a command.
    """


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code; nothing that goes wrong leaves as a traceback."""
    console.set_up()
    as_json, debug = "--json" in arguments, "--debug" in arguments
    try:
        with _terminable():
            return _main(arguments)
    except (_Stopped, KeyboardInterrupt, typer.Abort) as stopped:
        if not isinstance(stopped, typer.Abort):
            console.leave()
        number = signal.SIGTERM if isinstance(stopped.__cause__ or stopped, _Terminated) else signal.SIGINT
        return _stopped(number, as_json)
    except BrokenPipeError:
        return _unheard(1)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if completion.asked():
            return 1  # a shell that completes a line has no place for an error
        return _fail(_as_kdctl_error(error), as_json)


def _main(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] in completion.OPTIONS:
        completion.answer(list(arguments))
        return 0
    group: Any = typer.main.get_command(app)
    for parameter in group.params:
        spare_pydantic(parameter, bool)
        if f"--{str(parameter.name).replace('_', '-')}" in completion.OPTIONS:
            parameter.help = f"{parameter.help.split(' for ')[0]} for this shell, or for the one named after it."
    if completion.asked():
        completion.show_texts_as_they_are()
    code = group.main(list(arguments) or ["--help"], prog_name="kdctl", standalone_mode=False)
    sys.stdout.flush()
    return code or 0


@contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM stop the work inside as SIGINT does. Of several processes it ends one at once, as it always did."""
    alone = threading.current_thread() is threading.main_thread() and "WORLD_SIZE" not in os.environ
    if not alone or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stopped(number: int, as_json: bool) -> int:
    """The exit code of what a signal has stopped at once; with --json also a document, of several processes' first."""
    from kdctl import launch

    error = Interrupted(number, "stopped before it was done")
    return _fail(error, as_json) if as_json and launch.rank() == 0 else error.code


def _fail(error: KdctlError, as_json: bool) -> int:
    shown = [] if as_json else [error]
    try:
        if as_json:
            console.print_json(error.as_dict())
        sys.stdout.flush()
    except BrokenPipeError:
        return _unheard(error.code)
    except OSError as full:
        _unheard(error.code)
        unwritten = KdctlError(Problem(str(full.strerror), file="stdout"))
        shown = [unwritten, error] if str(error) != full.strerror else [unwritten]
    with suppress(OSError):  # where stderr is full too, there is no place left to say it
        for each in shown:
            console.print_error(each)
    return error.code


def _unheard(code: int) -> int:
    """The exit code where nobody reads what is printed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains at exit
    return code


def _as_kdctl_error(error: Exception) -> KdctlError:
    """Any exception as an error with an exit code; what nobody foresaw is called internal."""
    if isinstance(error, KdctlError):
        return error
    if isinstance(error, _ClickUsageError):
        context = getattr(error, "ctx", None)
        hint = f"`{context.command_path} --help` shows what is allowed" if context else None
        lacking: Any = getattr(error, "param", None) if type(error).__name__ == "MissingParameter" else None
        if hint and getattr(lacking, "help", None):
            hint = f"{lacking.help}; {hint}"
        return UsageError(error.format_message(), hint=hint)
    if is_out_of_memory(error):
        hint = "a smaller data.batch_size or data.eval_batch_size needs less; train.accumulate keeps the loss the same"
        return OutOfMemoryError(f"memory does not suffice: {error}", hint=hint)
    if isinstance(error, OSError):
        return KdctlError(Problem(error.strerror or str(error), file=_text(error.filename)))
    said = f"{type(error).__name__}: {error}"
    if (place := _own_code(error)) is not None:
        return KdctlError(f"{place}: {said}", hint="the code that you gave failed; run with --debug for the traceback")
    return KdctlError(f"internal error: {said}", hint="this is a fault of kdctl; run with --debug for the traceback")


def _own_code(error: Exception) -> str | None:
    """The last line of a user's own file (`kind: ./file.py:Class`) on the way to the error, if there is one."""
    from kdctl import registry

    lines = traceback.extract_tb(error.__traceback__)
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [line for line, name in zip(lines, names, strict=True) if name.startswith(registry.USER_MODULE)]
    return f"{own[-1].filename}:{own[-1].lineno}, in {own[-1].name}" if own else None


_ClickUsageError: Any = typer.BadParameter.__mro__[1]  # Typer exports the subclass alone


def _text(name: object) -> str | None:
    return None if name is None else str(name)
