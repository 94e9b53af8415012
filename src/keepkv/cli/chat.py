"""`keepkv chat`: a conversation at a terminal."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.markup import escape

from keepkv.cli.options import (
    COMPRESSION,
    OUTPUT,
    Debug,
    Device,
    Dtype,
    MaxNewTokens,
    Method,
    Model,
    Seed,
    SlotDtype,
    checked,
    option,
)
from keepkv.cli.progress import bar, err, out
from keepkv.errors import InputError, KeepKVError, nearest
from keepkv.recipe import CONVERSATION
from keepkv.render import size

if TYPE_CHECKING:
    from keepkv.text.conversation import Conversation

CONVERSATION_PANEL = "Conversation"
HELP = """[bold]/report[/bold]        show what the cache holds
[bold]/budget 512[/bold]    change the budget: slots per KV head (512), bytes (64MB) or a share (10%)
[bold]/undo[/bold]          take back the last turn
[bold]/history[/bold]       show the conversation
[bold]/save FILE[/bold]     save the conversation
[bold]/load FILE[/bold]     continue a saved conversation
[bold]/read FILE[/bold]     send the contents of a text file
[bold]/clear[/bold]         start again
[bold]/quit[/bold]          end, as Ctrl-D does (Ctrl-C stops an answer)"""


class Chat:
    """Answers lines, and does what /commands say. A mistake ends a line, not the conversation."""

    def __init__(self, start: Callable[[], Conversation], max_new_tokens: int, temperature: float) -> None:
        self._start = start
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self.talk = start()
        self._commands: dict[str, Callable[[str], object]] = {
            "help": lambda argument: out.print(HELP),
            "report": self._report,
            "budget": self._budget,
            "undo": self._undo,
            "history": self._history,
            "save": lambda argument: self.talk.save(_file(argument)),
            "load": self.load,
            "read": self._read,
            "clear": self._clear,
            "quit": self._quit,
            "exit": self._quit,
        }
        self._over = False

    def run(self, lines: Iterator[str]) -> None:
        """Until the lines end or /quit."""
        for line in lines:
            try:
                self._take(line.strip())
            except KeepKVError as error:
                err.print(f"[red]{escape(str(error))}[/red]", soft_wrap=True)
            except KeyboardInterrupt:
                err.print("stopped: the turn was taken back")
            except UnicodeError:
                err.print(
                    "[red]this line is not UTF-8 text: set the terminal, or the file that the lines come from, to UTF-8[/red]"
                )
            if self._over:
                break

    def _take(self, line: str) -> None:
        line.encode()  # UnicodeError for what was no UTF-8
        if not line:
            return None
        if not line.startswith("/"):
            return self.answer(line)
        name, _, argument = line[1:].partition(" ")
        if name not in self._commands:
            raise InputError(f"unknown command /{name}: {nearest(name, self._commands)} /help explains the commands")
        self._commands[name](argument.strip())
        return None

    def answer(self, text: str) -> None:
        """Prints the answer as it comes. Ctrl-C ends the answer, a second one takes the turn back."""
        with _interruptible() as interrupted, bar("thinking") as line:

            def hear(piece: str) -> None:
                line.hide()
                sys.stdout.write(piece)
                sys.stdout.flush()

            turn = self.talk.say(text, hear, lambda: bool(interrupted), self._max_new_tokens, self._temperature, line.phase)
        sys.stdout.write("\n")
        if interrupted and not turn.whole:
            err.print("[dim](stopped)[/dim]")
        elif not turn.whole:
            err.print(f"[dim](stopped after {self._max_new_tokens} tokens: --max-new-tokens allows more)[/dim]")

    def _report(self, argument: str) -> None:
        report = self.talk.cache.report()
        if not report.tokens:
            return out.print(report.note)
        tokens = self.talk.cache.get_seq_length()
        out.print(f"conversation: {tokens:,} tokens in {len(self.talk.turns)} turns")
        out.print(
            f"held: {report.slots_per_head:,.0f} slots per KV head for {report.tokens[0]:,} tokens, "
            f"and the newest {report.tail:,} tokens uncompressed"
        )
        out.print(
            f"cache: {size(report.kv_bytes)} instead of {size(report.kv_bytes_full)} ({report.ratio:.1f} times smaller), and "
            f"{size(report.watch_bytes)} of queries for the next compression"
        )
        out.print(f"compressions: {report.compressions}, the longest took {report.longest_pause:.1f} s")
        return None

    def _budget(self, argument: str) -> None:
        if not argument:
            return out.print(f"budget {self.talk.cache.policy.budget_text}")
        cache = self.talk.cache
        if cache.get_seq_length():
            with bar("compressing") as line:
                cache.compress(argument, progress=line)
        else:
            cache.policy = cache.policy.changed(argument)
        return None

    def _undo(self, argument: str) -> None:
        out.print(f"taken back: {escape(self.talk.undo().user)}")

    def _history(self, argument: str) -> None:
        for turn in self.talk.turns:
            out.print(f"[bold]{escape(turn.user)}[/bold]\n{escape(turn.answer)}")

    def load(self, argument: str) -> None:
        with bar("reading the conversation") as line:
            self.talk.load(_file(argument), line.phase)
        out.print(f"{len(self.talk.turns)} turns, {self.talk.ids.shape[1]:,} tokens")

    def _read(self, argument: str) -> None:
        from keepkv.text.file import read_text

        self.answer(read_text(str(_file(argument))))

    def _clear(self, argument: str) -> None:
        self.talk = self._start()

    def _quit(self, argument: str) -> None:
        self._over = True


def lines() -> Iterator[str]:
    """What a person types, with a prompt and arrow keys for what was typed before; or what comes through a pipe."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no UTF-8 is refused line by line
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
        raise InputError("the file name is missing: give it after the command, as in /save talk.json")
    return Path(name).expanduser()


def chat(
    budget: Annotated[
        str,
        option(
            'How much of the cache to keep: slots per KV head ("1024"), bytes ("64MB"), or a share of its bytes ("10%"), '
            "which grows with the conversation.",
            "BUDGET",
            COMPRESSION,
        ),
    ] = CONVERSATION.budget_text,
    method: Method = CONVERSATION.method_name,
    slot_dtype: SlotDtype = CONVERSATION.slot_dtype,
    period: Annotated[
        int, option("Compress again whenever this many tokens have come.", "TOKENS", COMPRESSION, min=1)
    ] = CONVERSATION.period or 0,
    system: Annotated[
        str, option("A system prompt. It is kept as it is in every head.", "TEXT", CONVERSATION_PANEL, show_default=False)
    ] = "",
    load: Annotated[
        Path | None, option("Continue a conversation that /save wrote.", "FILE", CONVERSATION_PANEL, show_default=False)
    ] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Annotated[
        float, option("Sampling temperature. 0 always takes the most likely token.", "T", OUTPUT, min=0)
    ] = 0.7,
    model: Model = "smollm2",
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = CONVERSATION.seed,
    debug: Debug = False,
) -> None:
    """Talk with a model for as long as you like, in memory that does not grow.

    The conversation is compressed to the budget as it goes on. Type /help for the commands.

    $ keepkv chat --budget 512
    $ keepkv chat --load talk.json
    $ echo "What is a whale?" | keepkv chat --system "Answer in one sentence."
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
        err.print("[dim]Type /help for the commands, Ctrl-D to end.[/dim]")
    talk.run(lines())
