"""The app: every command, and how an error ends. Heavy imports happen inside the commands, so that --help answers at once."""

from __future__ import annotations

import os
import sys
import traceback
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

import keepkv
from keepkv.cli.ask import ask
from keepkv.cli.chat import chat
from keepkv.cli.check import check
from keepkv.cli.documents import compile, store
from keepkv.cli.eval import evaluate, report
from keepkv.cli.fidelity import fidelity
from keepkv.cli.inspect import inspect
from keepkv.cli.methods import methods
from keepkv.cli.options import command, flag, help_text
from keepkv.cli.serve import serve
from keepkv.errors import KeepKVError

HELP = """Make the KV cache of a language model ten times smaller, and measure what that costs.

$ keepkv ask report.txt "Who signed it?" --compare full
$ keepkv chat --budget 512
$ keepkv fidelity book.txt --methods keepkv,snapkv,h2o --budgets 25%,10%

keepkv COMMAND --help explains a command, and keepkv methods lists the compression methods.
"""
USE = "Use a model"
DOCUMENTS = "Compiled documents"
MEASURE = "Measure and compare"

app = typer.Typer(
    name="keepkv",
    help=help_text(HELP),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, flag("Print the versions and the attention backend, for bug reports.", "--version")] = False,
) -> None:
    if version:
        from keepkv.cli.version import version_text

        typer.echo(version_text())
        raise typer.Exit


command(app, panel=USE)(ask)
command(app, panel=USE)(chat)
command(app, panel=USE)(serve)
command(app, panel=DOCUMENTS)(compile)
app.add_typer(store, name="store", rich_help_panel=DOCUMENTS)
command(app, panel=USE)(check)
command(app, panel=MEASURE)(fidelity)
command(app, panel=MEASURE)(inspect)
command(app, "eval", panel=MEASURE)(evaluate)
command(app, panel=MEASURE)(report)
command(app, panel=MEASURE)(methods)


def main() -> None:
    """Runs the command line. A mistake of the user ends with one line on standard error and status 2."""
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
        _end(_unexpected(error), 1)


def _unexpected(error: Exception) -> str:
    """One line about an error that keepkv does not raise on purpose."""
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return f"{what} (there is not enough memory: read in pieces with --chunk 2048, or take a smaller model or text)"
    if place := _place_in_own_code(error):
        return f"{what} (in your own code, {place}: --debug shows the stack trace)"
    if method := _own_method(sys.argv):
        return f"{what} (with your own method {method}: check what its functions return; --debug shows the stack trace)"
    return f"{what} (this is a bug in keepkv: please report it with the output of --debug and of keepkv --version)"


def _place_in_own_code(error: Exception) -> str:
    """Where an error was raised in a file of the user's own, such as a method's, or ""."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename} line {error.lineno}"
    folders = [Path(keepkv.__file__).resolve().parent, Path(os.__file__).resolve().parent]  # ours, and the standard library
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename).resolve()
        is_library = {"site-packages", "dist-packages"} & set(file.parts) or any(map(file.is_relative_to, folders))
        if file.suffix == ".py" and file.exists() and not is_library:
            return f"{frame.filename} line {frame.lineno}"
    return ""


def _own_method(arguments: list[str]) -> str:
    """The first method of the user's own, such as FILE.py:NAME, that is named at the command line, or ""."""
    values = " ".join(arguments).replace("=", " ").split()
    named = (value for option, value in pairwise(values) if option in ("--method", "--methods", "--compare"))
    return next((name for value in named for name in value.split(",") if ":" in name), "")


def _end(message: str, status: int) -> None:
    print(f"keepkv: {message}", file=sys.stderr)
    sys.exit(status)
