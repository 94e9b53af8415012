"""`keepkv chat`: a conversation at a terminal."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from keepkv.cli.options import Debug, Device, Dtype, MaxNewTokens, Method, Model, Seed, SlotDtype, checked
from keepkv.cli.progress import bar, err, out
from keepkv.errors import InputError, KeepKVError, nearest
from keepkv.recipe import CONVERSATION
from keepkv.render import size

if TYPE_CHECKING:
    from keepkv.text.conversation import Conversation

HELP = """[bold]/report[/bold]        what the cache holds
[bold]/budget 512[/bold]    change the budget: slots per KV head, bytes (64MB) or a share (10%)
[bold]/undo[/bold]          take the last turn back, exactly
[bold]/history[/bold]       what was said
[bold]/save FILE[/bold]     write the conversation
[bold]/load FILE[/bold]     go on with a saved one
[bold]/read FILE[/bold]     say what a text file holds
[bold]/clear[/bold]         start again
[bold]/quit[/bold]          or Ctrl-D; Ctrl-C stops an answer"""


class Chat:
    """Reads lines, answers them, and does what /commands say; a mistake costs a line, not the conversation."""

    def __init__(self, start: Callable[[], Conversation], max_new_tokens: int, temperature: float) -> None:
        self._start, self._max_new_tokens, self._temperature = start, max_new_tokens, temperature
        self.talk = start()
        self._commands: dict[str, Callable[[str], object]] = {
            "help": lambda rest: out.print(HELP), "report": self._report, "budget": self._budget, "undo": self._undo,
            "history": self._history, "save": lambda rest: self.talk.save(_file(rest)), "load": self.load,
            "read": self._read, "clear": self._clear, "quit": self._quit, "exit": self._quit,
        }  # fmt: skip
        self._over = False

    def run(self, lines: Iterator[str]) -> None:
        """Until the lines end or /quit."""
        for line in lines:
            try:
                self._take(line.strip())
            except KeepKVError as error:
                err.print(f"[red]{escape(str(error))}[/red]", soft_wrap=True)
            except KeyboardInterrupt:
                err.print("stopped; the turn is taken back")
            if self._over:
                break

    def _take(self, line: str) -> None:
        if not line:
            return None
        if not line.startswith("/"):
            return self.answer(line)
        name, _, rest = line[1:].partition(" ")
        if name not in self._commands:
            raise InputError(f"unknown command /{name}: {nearest(name, self._commands)} /help lists them")
        self._commands[name](rest.strip())
        return None

    def answer(self, text: str) -> None:
        """Says it and prints the answer as it comes; Ctrl-C ends the answer, a second one takes the turn back."""
        with _interruptible() as interrupted, bar("thinking") as line:

            def hear(piece: str) -> None:
                line.hide()
                sys.stdout.write(piece)
                sys.stdout.flush()

            turn = self.talk.say(text, hear, lambda: bool(interrupted), self._max_new_tokens, self._temperature, line.phase)
        sys.stdout.write("\n")
        if not turn.whole:
            err.print(
                f"[dim](stopped after {self._max_new_tokens} tokens)[/dim]" if not interrupted else "[dim](stopped)[/dim]"
            )

    def _report(self, rest: str) -> None:
        report = self.talk.cache.report()
        if not report.tokens:
            return out.print(report.note)
        seen = self.talk.cache.get_seq_length()
        out.print(f"{seen:,} tokens said and heard in {len(self.talk.turns)} turns")
        out.print(
            f"held: {report.slots_per_head:,.0f} slots per KV head of {report.tokens[0]:,} tokens, "
            f"and {report.tail:,} as they are"
        )
        out.print(f"cache {size(report.kv_bytes)}, the full cache would be {size(report.kv_bytes_full)}: {report.ratio:.1f}x")
        out.print(f"beside it {size(report.watch_bytes)} of queries for the next compression")
        out.print(f"compressed {report.compressions} times, the longest took {report.longest_pause:.1f} s")
        return None

    def _budget(self, rest: str) -> None:
        if not rest:
            return out.print(f"budget {self.talk.cache.policy.budget_text}")
        cache = self.talk.cache
        if cache.get_seq_length():
            with bar("compressing") as line:
                cache.compress(rest, progress=line)
        else:
            cache.policy = cache.policy.changed(rest)
        return None

    def _undo(self, rest: str) -> None:
        out.print(f"taken back: {escape(self.talk.undo().user)}")

    def _history(self, rest: str) -> None:
        for turn in self.talk.turns:
            out.print(f"[bold]{escape(turn.user)}[/bold]\n{escape(turn.answer)}")

    def load(self, rest: str) -> None:
        with bar("reading the conversation") as line:
            self.talk.load(_file(rest), line.phase)
        out.print(f"{len(self.talk.turns)} turns, {self.talk.ids.shape[1]:,} tokens")

    def _read(self, rest: str) -> None:
        from keepkv.text.file import read_text

        self.answer(read_text(str(_file(rest))))

    def _clear(self, rest: str) -> None:
        self.talk = self._start()

    def _quit(self, rest: str) -> None:
        self._over = True


def lines() -> Iterator[str]:
    """What a person types, with a prompt and arrow keys for what was typed before; or what comes through a pipe."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() uses it
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D ends the program)")


@contextlib.contextmanager
def _interruptible() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C is pressed; a second one interrupts at once."""
    pressed: list[int] = []

    def note(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _file(name: str) -> Path:
    if not name:
        raise InputError("which file? give its name after the command")
    return Path(name).expanduser()


def chat(
    budget: Annotated[
        str, typer.Option(help='Slots per KV head ("1024"), bytes ("64MB"), or a growing share ("10%").')
    ] = CONVERSATION.budget_text,
    method: Method = CONVERSATION.method_name,
    slot_dtype: SlotDtype = CONVERSATION.slot_dtype,
    system: Annotated[str, typer.Option(help="A system prompt; it stays verbatim.", show_default=False)] = "",
    load: Annotated[Path | None, typer.Option(help="Go on with a conversation that /save wrote.", show_default=False)] = None,
    period: Annotated[int, typer.Option(min=1, help="Compress whenever so many tokens have come.")] = CONVERSATION.period or 0,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest word.")] = 0.7,
    model: Model = "smollm2",
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = CONVERSATION.seed,
    debug: Debug = False,
) -> None:
    """Talk with a model for as long as you like, in memory that does not grow.

    What was said is compressed to the budget as the conversation goes on. /help lists what else can be done.

    [bold]keepkv chat --budget 512[/bold]

    [bold]echo "What is a whale?" | keepkv chat --system "Answer in one sentence."[/bold]
    """
    with bar(f"loading {model}"):
        import torch

        from keepkv.models import loading
        from keepkv.text.conversation import Conversation

        recipe = checked(replace(CONVERSATION, budget=budget, method=method, slot_dtype=slot_dtype, period=period, seed=seed))
        lm, tokenizer = loading.load(model, device, dtype)
        torch.manual_seed(seed)
        talk = Chat(lambda: Conversation(lm, tokenizer, recipe, system), max_new_tokens, temperature)
    if load is not None:
        talk.load(str(load))
    if sys.stdin.isatty():
        err.print("[dim]/help lists the commands, Ctrl-D ends[/dim]")
    talk.run(lines())
