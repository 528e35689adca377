"""The command line: the commands by name, and how an error ends: the user's own in one sentence and exit code 2, without a traceback.

Each command is a module of its own, and imports what it needs when it is called, so that `fedloom --help` takes no longer than typer.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from fedloom.cli.audit import audit_command
from fedloom.cli.chat import chat_command
from fedloom.cli.command_group import CommandGroup
from fedloom.cli.console import complain, err, print_traceback, reset_consoles, write_any_text
from fedloom.cli.demo import demo_command
from fedloom.cli.exit_codes import ExitCode
from fedloom.cli.export import export_command
from fedloom.cli.init import init_command
from fedloom.cli.inspect import inspect_command
from fedloom.cli.join import join_command
from fedloom.cli.keys import keys_app
from fedloom.cli.predict import predict_command
from fedloom.cli.privacy import privacy_command
from fedloom.cli.region import region_command
from fedloom.cli.replay import replay_command
from fedloom.cli.report import report_command
from fedloom.cli.rollback import rollback_command
from fedloom.cli.run import run_command
from fedloom.cli.serve import serve_command
from fedloom.cli.shards import shards_command
from fedloom.cli.site import site_app
from fedloom.cli.status import status_command
from fedloom.cli.stop_signals import stops
from fedloom.cli.sweep import sweep_command
from fedloom.cli.up import up_command
from fedloom.cli.watch import watch_command
from fedloom.cli.worker import worker_command
from fedloom.core.errors import Refused
from fedloom.core.files import disk_full_error

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    suggest_commands=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune one language model across organisations without moving their data: federated LoRA.\n\n"
    "Start with [bold]fedloom demo[/bold].",
    epilog="Exit codes: 0 done, 1 a check failed, 2 refused, 130 Ctrl-C, 143 SIGTERM (docs/command-line.md).",
    rich_markup_mode="rich",
)
SPINS = "1000"
"""How often a thread of torch asks for work before it sleeps. By default it spins for milliseconds, at others' cost."""
SIMULATE, USE, CHECK, DEPLOY = "Simulate", "Use a result", "Check data, privacy and runs", "Deploy"
"""Groups of commands in the help."""

app.command("demo", rich_help_panel=SIMULATE)(demo_command)
app.command("init", rich_help_panel=SIMULATE)(init_command)
app.command("run", rich_help_panel=SIMULATE)(run_command)
app.command("sweep", rich_help_panel=SIMULATE)(sweep_command)
app.command("watch", rich_help_panel=USE)(watch_command)
app.command("report", rich_help_panel=USE)(report_command)
app.command("predict", rich_help_panel=USE)(predict_command)
app.command("chat", rich_help_panel=USE)(chat_command)
app.command("export", rich_help_panel=USE)(export_command)
app.command("rollback", rich_help_panel=USE)(rollback_command)
app.command("inspect", rich_help_panel=CHECK)(inspect_command)
app.command("privacy", rich_help_panel=CHECK)(privacy_command)
app.command("audit", rich_help_panel=CHECK)(audit_command)
app.command("replay", rich_help_panel=CHECK)(replay_command)
app.command("up", rich_help_panel=DEPLOY)(up_command)
app.command("serve", rich_help_panel=DEPLOY)(serve_command)
app.command("join", rich_help_panel=DEPLOY)(join_command)
app.command("status", rich_help_panel=DEPLOY)(status_command)
app.command("region", rich_help_panel=DEPLOY)(region_command)
app.command("worker", rich_help_panel=DEPLOY)(worker_command)
app.command("shards", rich_help_panel=DEPLOY)(shards_command)
app.add_typer(keys_app, name="keys", cls=CommandGroup, rich_help_panel=DEPLOY)
app.add_typer(site_app, name="site", cls=CommandGroup, rich_help_panel=DEPLOY)


def _show_version(chosen: bool) -> None:
    if chosen:
        typer.echo(f"fedloom {version('fedloom')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What stands before the name of a command."""


def main() -> NoReturn:
    """The `fedloom` command."""
    write_any_text(sys.stdout)
    write_any_text(sys.stderr)
    sys.excepthook = print_traceback
    reset_consoles()
    if "OMP_WAIT_POLICY" not in os.environ:  # read when torch is imported
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    try:
        with stops.caught():
            code = app(prog_name="fedloom", standalone_mode=False)  # typer returns the code of an Exit
    except typer.Exit as stop:
        code = stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = ExitCode.INTERRUPTED
    except Exception as error:
        code = _explain(error)
        if err.verbose or code == ExitCode.BUG:
            print_traceback(type(error), error, error.__traceback__)
    sys.exit(code or ExitCode.DONE)


def _explain(error: Exception) -> ExitCode:
    """Print one sentence on an error that is the user's to mend; return the exit code."""
    if isinstance(error, Refused):
        complain(str(error))
    elif hasattr(error, "format_message"):  # a usage error of click
        path = getattr(getattr(error, "ctx", None), "command_path", "fedloom")
        complain(f"{error.format_message().rstrip('.')} ({path} --help)")
    elif disk_full := disk_full_error(error):
        complain(f"the disk is full: {disk_full.filename or 'a file'} could not be written; make room")
    elif isinstance(error, OSError) and error.filename and error.strerror:
        complain(f"{error.filename}: {error.strerror}")
    else:
        return ExitCode.BUG
    return ExitCode.REFUSED
