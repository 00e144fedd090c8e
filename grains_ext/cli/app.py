"""The application: what every command has in common, and how a run ends."""

import functools
import inspect
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape
from typer.core import TyperGroup

from grains_ext.cli import config
from grains_ext.cli.output import err, say

# As they are used one after the other, not by letter.
_ORDER = (
    *("demo", "info", "attribute", "fit", "refine", "gate", "tune", "evaluate", "report"),
    *("convert", "export", "generate", "inject", "adapter", "bench"),
)


class _InOrder(TyperGroup):
    def list_commands(self, context: Any) -> list[str]:
        return sorted(super().list_commands(context), key=lambda name: (*_ORDER, name).index(name))


app = typer.Typer(
    cls=_InOrder,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Find what pushes a model toward an answer, steer it, and ship the steered model.",
)

# What no input should be able to cause shows its traceback; all else is one message.
_DEFECTS = (AssertionError, AttributeError, IndexError, NameError)


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None and not context.resilient_parsing:
        names = {parameter.name for parameter in context.command.params if parameter.name}
        context.default_map = config.read(path, str(context.info_name), names)
    return path


_Context = typer.Context
_Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=_read_config,
        metavar="RUN.yaml",
        help="Take what the command line does not give from this file. Each run writes one.",
        rich_help_panel="Run",
    ),
]
_Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No messages and no progress bars.", rich_help_panel="Run"),
]
_Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of a failure.", rich_help_panel="Run"),
]


def command(
    *, on_interrupt: str = "stopped; nothing was written"
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function as a command with --config, --quiet and --debug.

    on_interrupt: what to say after Ctrl-C or SIGTERM; {output} is the --output that was given.

    After a run with --output the file that repeats it lies in that folder, as COMMAND.yaml, or
    beside that file.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(context: typer.Context, quiet: bool, debug: bool, **parameters: Any) -> None:
            err.quiet = quiet
            if "config" not in own:
                del parameters["config"]
            given = {**parameters, "context": context} if "context" in own else parameters
            try:
                function(**given)
            except KeyboardInterrupt as stop:
                say(on_interrupt.format(output=parameters.get("output")))
                raise typer.Exit(143 if isinstance(stop, _Terminated) else 130) from None
            except Exception as error:
                # Where the function is called by other code than main, it gets the error itself.
                error.grains_debug = debug  # type: ignore[attr-defined]
                raise
            if isinstance(parameters.get("output"), Path) and not parameters.get("dry_run"):
                config.write(str(context.info_name), parameters)

        own = inspect.signature(function).parameters
        shared = {"context": _Context, "config": _Config, "quiet": _Quiet, "debug": _Debug}
        defaults: dict[str, Any] = {"config": None, "quiet": False, "debug": False}
        merged = [
            *own.values(),
            *(
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=defaults.get(name, inspect.Parameter.empty),
                    annotation=kind,
                )
                for name, kind in shared.items()
                if name not in own
            ),
        ]
        keywords = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in merged]
        run.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in keywords}
        del run.__wrapped__
        app.command()(run)
        return function

    return register


class _Terminated(KeyboardInterrupt):
    """SIGTERM, by which schedulers, containers and `timeout` end a run: it ends as by Ctrl-C."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def main() -> None:
    """Entry point: a user's mistake prints one message; --debug shows the traceback."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except Exception as error:
        if getattr(error, "grains_debug", False) or isinstance(error, _DEFECTS):
            raise
        err.quiet = False
        err.print(f"[red]error:[/red] {escape(_said(error))}", highlight=False)
        sys.exit(1)


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])  # its own text is in quotes
    return str(error) or type(error).__name__
