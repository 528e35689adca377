"""A group of commands: `-v` and `-q` at each of them, the nearest name for an unknown one, and how a command ends that is stopped."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import typer
from typer.core import TyperArgument, TyperGroup, TyperOption
from typer.utils import get_params_from_function

from fedloom.cli.console import complain, err, notes
from fedloom.cli.exit_codes import ExitCode
from fedloom.cli.stop_signals import stops
from fedloom.core.text import did_you_mean

FEW_LETTERS = 0.6
"""Share of letters from which on a command may be meant: names of commands are short, and so two letters change places easily."""


class CommandGroup(TyperGroup):
    """The commands of `fedloom`, or those of `fedloom keys` and `fedloom site`."""

    def __init__(self, **settings: Any) -> None:
        """With the settings of typer's group."""
        super().__init__(**settings)
        for command in (self, *self.commands.values()):
            if command is self or not isinstance(command, CommandGroup):
                _restore_help(command)
                command.help = _unwrapped(command.help or "")
                command.params += _verbosity_options()

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that the arguments begin with."""
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-") and not ctx.resilient_parsing:
            near = did_you_mean(name, self.commands, FEW_LETTERS)
            ctx.fail(f"there is no command {name!r}" + (f"; {near}" if near else ""))
        return super().resolve_command(ctx, args)

    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        """Read the arguments, and end in order where it is stopped."""
        with _stops_explained():
            return super().make_context(*arguments, **settings)

    def invoke(self, ctx: Any) -> Any:
        """Carry the command out, and end in order where it is stopped."""
        with _stops_explained():
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result


@contextmanager
def _stops_explained() -> Iterator[None]:
    """End with the exit code of what stops the block from outside: a signal, or a reader of the output that went away."""
    try:
        yield
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(
            error.__context__, BrokenPipeError
        ):  # rich exits with 1 for it
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest when it ends
        raise typer.Exit(ExitCode.BROKEN_PIPE) from error
    except (typer.Exit, typer.Abort):
        raise
    except (KeyboardInterrupt, Exception) as error:
        if (code := stops.exit_code(error)) is None:
            raise
        complain("interrupted", "bold yellow")
        raise typer.Exit(code) from error


def _restore_help(command: Any) -> None:
    """Give arguments their help text, which typer before 0.21 loses with click from 8.4 on, and their metavar.

    Where an argument `file` has the metavar FILE, typer shows the name of its type in its place.
    """
    declared = get_params_from_function(command.callback.__wrapped__) if command.callback else {}
    for parameter in command.params:
        if isinstance(parameter, TyperArgument) and parameter.name in declared:
            parameter.help = declared[parameter.name].default.help
            if parameter.metavar:
                parameter.type = copy(parameter.type)
                parameter.type.name = parameter.metavar


def _unwrapped(text: str) -> str:
    """Join the lines of each paragraph, which a terminal breaks by its own width; not of one that begins with a backspace."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(one if one.startswith("\b") else " ".join(one.split()) for one in paragraphs)


def _verbosity_options() -> list[TyperOption]:
    verbose, quiet = "Show the traceback of an error, too.", "Print results and errors only: no progress, no notes."
    return [
        TyperOption(param_decls=["-v", "--verbose"], is_flag=True, expose_value=False, callback=_verbose, help=verbose),
        TyperOption(param_decls=["-q", "--quiet"], is_flag=True, expose_value=False, callback=_quiet, help=quiet),
    ]


def _verbose(_: Any, __: Any, chosen: bool) -> None:
    err.verbose = err.verbose or chosen


def _quiet(_: Any, __: Any, chosen: bool) -> None:
    notes.quiet = notes.quiet or chosen
