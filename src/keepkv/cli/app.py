"""The app: every command, and how an error ends. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from keepkv.cli.ask import ask
from keepkv.cli.chat import chat
from keepkv.cli.documents import compile, store
from keepkv.cli.eval import evaluate, report
from keepkv.cli.measure import fidelity, inspect, methods
from keepkv.cli.serve import serve
from keepkv.errors import KeepKVError

app = typer.Typer(
    name="keepkv", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]},
    help="A KV cache ten times smaller, with the model answering as if nothing had been removed.",
)  # fmt: skip


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from keepkv import __version__

        typer.echo(__version__)
        raise typer.Exit


app.command()(ask)
app.command()(chat)
app.command()(compile)
app.add_typer(store, name="store")
app.command()(inspect)
app.command()(fidelity)
app.command()(methods)
app.command("eval")(evaluate)
app.command()(report)
app.command()(serve)


def main() -> None:
    """Runs the command line: a user's mistake ends with one line on standard error and status 2."""
    debug = "--debug" in sys.argv
    try:
        app()
    except KeepKVError as error:
        if debug:
            raise
        _end(str(error), 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        _end("stopped", 130)
    except Exception as error:
        if debug:
            raise
        _end(f"{type(error).__name__}: {error} (an error of keepkv's own: --debug shows where)", 1)


def _end(message: str, status: int) -> None:
    print(f"keepkv: {message}", file=sys.stderr)
    sys.exit(status)
