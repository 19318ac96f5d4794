"""What all verbs share: the common options, the reply, and how a plain function becomes a command.

A verb is a function. Its first parameter says which common options it takes (`Options`, or `ExperimentOptions` for one
that reads an experiment or a run); the others are Typer parameters; it returns a Reply and raises KdctlError:

    def eval_(
        options: ExperimentOptions,
        run: Annotated[str, Argument(help="a run directory, or latest")] = "latest",
        split: Annotated[str, Option(help="which split is measured")] = "test",
    ) -> Reply:
        \"""Measure student and teacher on the same samples.\"""      <- the text of `kdctl eval --help`
        return Reply({"run": run, "metrics": {...}}, show)          <- show(document) prints it for people
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

import typer
import typer.core
import typer.main
from typer import Argument, Option

from kdctl.cli import completion, console
from kdctl.errors import KdctlError, UsageError

__all__ = ["Argument", "ExperimentOptions", "Option", "Options", "Reply", "command"]

SCHEMA_VERSION = 1
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?|mps")
_OVERRIDE = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*=")
_ARGUMENT_INFO = type(Argument())


@dataclass(frozen=True)
class Options:
    """The options of every verb."""

    quiet: Annotated[bool, Option("-q", "--quiet", help="Only the result and errors.")] = False
    verbose: Annotated[bool, Option("-v", "--verbose", help="More about what is done.")] = False
    json: Annotated[bool, Option("--json", help="One JSON document on stdout.")] = False
    debug: Annotated[bool, Option("--debug", help="Show the traceback of an error.")] = False
    offline: Annotated[bool, Option("--offline", help="Never touch the network.")] = False


@dataclass(frozen=True)
class ExperimentOptions(Options):
    """The options of a verb that reads an experiment or a run; --device stands last in `overrides`."""

    device: Annotated[str | None, Option("--device", help="auto, cpu, cuda, cuda:1, mps.")] = None
    overrides: Annotated[
        list[str], Argument(metavar="KEY=VALUE", help="Values that replace the file's, such as train.epochs=5.")
    ] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.device is not None:
            check_device(self.device)
            object.__setattr__(self, "overrides", [*self.overrides, f"train.device={self.device}"])


def check_device(name: str) -> None:
    """Raises UsageError where --device names none; whether the machine has it shows later."""
    if not _DEVICE.fullmatch(name):
        hint = "cuda is a GPU, cuda:1 the second one, mps Apple's; auto takes the best there is"
        raise UsageError(f"--device: got '{name}'; allowed: auto, cpu, cuda, cuda:N, mps", hint=hint)


def check_no_device(name: str | None) -> None:
    """Raises UsageError where --device is given for an artefact."""
    if name is not None:
        raise UsageError("--device is for a run: an artefact computes in its own runtime", hint="leave --device out")


@dataclass(frozen=True)
class Reply:
    """What a verb answers: the JSON document (without schema_version and ok) and how to show it to people.

    `error` makes a reply that is whole and still fails, such as measurements whose gate was missed: the document is
    printed, then the error, and the exit code is the error's.
    """

    document: dict[str, Any]
    show: Callable[[dict[str, Any]], None]
    error: KdctlError | None = None

    def deliver(self, as_json: bool) -> int:
        """Prints the reply and returns the exit code."""
        if as_json:
            head = {"schema_version": SCHEMA_VERSION, "ok": self.error is None}
            console.print_json(head | self.document | (self.error.as_dict() if self.error else {}))
        else:
            self.show(self.document)
            if self.error:
                sys.stdout.flush()
                console.print_error(self.error)
        return self.error.code if self.error else 0


def command(name: str, verb: Callable[..., Reply]) -> Any:
    """The Typer command of a verb: its own parameters and, after them, the common ones."""
    own, shared = _parameters(verb)
    positional = [p for p in own if any(isinstance(m, _ARGUMENT_INFO) for m in p.annotation.__metadata__)]
    kind = _options_class(verb)

    def call(**values: Any) -> int:
        if issubclass(kind, ExperimentOptions):
            _sort_words(values, positional)
        options = kind(**{p.name: values.pop(p.name) for p in shared})
        console.set_up(options.quiet, options.verbose)
        if options.offline:
            os.environ.update(KDCTL_OFFLINE="1", HF_HUB_OFFLINE="1")
        with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
            reply = verb(options, **values)
        return reply.deliver(options.json)

    parameters = [*own, *shared]
    for each in parameters:
        info = next(m for m in each.annotation.__metadata__ if hasattr(m, "autocompletion"))
        info.autocompletion = info.autocompletion or completion.of(name, each.name)
    call.__doc__ = verb.__doc__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name, cls=_Command, context_settings={"help_option_names": ["-h", "--help"]})(call)
    built = typer.main.get_command(app)
    for parameter in built.params:
        spare_pydantic(parameter, call.__annotations__[str(parameter.name)])
        if parameter.param_type_name == "argument":
            parameter.metavar = parameter.metavar or str(parameter.name).upper()
    return built


def _options_class(verb: Callable[..., Reply]) -> type[Options]:
    return next(iter(inspect.signature(verb, eval_str=True).parameters.values())).annotation


def _parameters(verb: Callable[..., Reply]) -> tuple[list[inspect.Parameter], list[inspect.Parameter]]:
    """The verb's own parameters and those of its options class, all as keywords with resolved annotations."""
    own = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for p in list(inspect.signature(verb, eval_str=True).parameters.values())[1:]
    ]
    kind = _options_class(verb)
    hints = inspect.get_annotations(Options, eval_str=True) | inspect.get_annotations(kind, eval_str=True)
    shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=hints[field.name],
            default=None if field.default is dataclasses.MISSING else field.default,
        )
        for field in dataclasses.fields(kind)
    ]
    return own, shared


def _sort_words(values: dict[str, Any], positional: Sequence[inspect.Parameter]) -> None:
    """Tells overrides from the verb's own arguments wherever they stand, so that RUN may be left out before a.b=c."""
    given = [values[p.name] for p in positional if values[p.name] not in (None, p.default)]
    words = [*given, *(values["overrides"] or [])]
    plain = [word for word in words if not _is_override(word)]
    if len(plain) > len(positional):
        raise UsageError(f"unexpected argument '{plain[len(positional)]}'", hint="an override is written key=value")
    for index, parameter in enumerate(positional):
        if index < len(plain):
            values[parameter.name] = plain[index]
        elif parameter.default is parameter.empty:
            raise UsageError(f"missing argument {parameter.name.upper()}", hint="it stands before the overrides")
        else:
            values[parameter.name] = parameter.default
    values["overrides"] = [word for word in words if _is_override(word)]


def _is_override(word: str) -> bool:
    return bool(_OVERRIDE.match(word)) and not os.path.exists(word)  # which no length of a name upsets


def spare_pydantic(parameter: Any, annotation: Any) -> None:
    """Lets text and absent values through as they are: Typer would import pydantic (70 ms) to turn str into str."""
    base = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    is_text = base in (str, str | None, list[str])
    many = parameter.multiple or parameter.nargs == -1
    convert = parameter.process_value

    def process_value(context: Any, value: Any) -> Any:
        absent = value is None or value == () or value == []
        required = parameter.required and not context.resilient_parsing  # of a line that is being completed nothing is
        if (absent and required) or not (absent or is_text):
            return convert(context, value)
        return () if absent and many else value

    parameter.process_value = process_value


class _Command(typer.core.TyperCommand):
    """A command with a usage line in the common form (`CONFIG [KEY=VALUE]...`)."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        pieces = [self.options_metavar or ""]
        for argument in (p for p in self.params if p.param_type_name == "argument"):
            name = argument.metavar if argument.required else f"[{argument.metavar}]"
            pieces.append(f"{name}..." if argument.nargs == -1 else str(name))
        return pieces

    def get_help_option(self, ctx: Any) -> Any:
        return plain_flag(super().get_help_option(ctx))


def plain_flag(option: Any) -> Any:
    """A flag that is False, not None, when it is absent: Typer imports pydantic to convert a None."""
    if option is not None:
        option.default = False
    return option
