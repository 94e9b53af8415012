"""Conversation: turns of a user and a model over one live cache, so that memory does not grow with what was said."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, TextStreamer

from keepkv.cache import KeepCache
from keepkv.compress import Progress
from keepkv.errors import InputError
from keepkv.recipe import CONVERSATION, Recipe
from keepkv.text.ask import generation
from keepkv.text.reading import Phase, silent

FORMAT = "keepkv conversation 1"
_MARKS = ("\u2402keepkv-0\u2403", "\u2402keepkv-1\u2403", "\u2402keepkv-2\u2403")


@dataclass(frozen=True)
class Turn:
    """What a user said and what the model answered; whole is False where the answer was cut off."""

    user: str
    answer: str
    whole: bool = True


class Conversation:
    """Says and hears one turn after the other; `cache` holds budget + period tokens at most, however long it gets.

    system: a system prompt, which stays verbatim in every head. Every turn starts from a checkpoint, so that `undo` takes
    it back exactly. Raises what KeepCache raises.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe = CONVERSATION, system: str = ""
    ) -> None:
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.cache = KeepCache.of(model, recipe)
        self.turns: list[Turn] = []
        self.ids = torch.empty(1, 0, dtype=torch.int64, device=model.device)  # all that was said, in tokens
        self._before: tuple[KeepCache, Tensor] | None = None
        self._head, self._between, self._after = pieces(tokenizer, system)

    @torch.no_grad()
    def say(
        self,
        text: str,
        hear: Callable[[str], None] = lambda piece: None,
        stop: Callable[[], bool] = lambda: False,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        phase: Phase = silent,
    ) -> Turn:
        """One turn: hear(piece) is told the answer as it comes, stop() is asked after every token whether to end it.

        temperature 0 is greedy. If anything goes wrong, the conversation is as it was before. Raises InputError for no text.
        """
        if not text.strip():
            raise InputError("nothing was said: give some text")
        checkpoint = self.cache.fork(), self.ids
        try:
            turn = self._say(text.strip(), hear, stop, max_new_tokens, temperature, phase)
        except BaseException:
            self.cache, self.ids = checkpoint
            raise
        self._before = checkpoint
        self.turns.append(turn)
        return turn

    def _say(
        self, text: str, hear: Callable[[str], None], stop: Callable[[], bool], max_new_tokens: int, temperature: float,
        phase: Phase,
    ) -> Turn:  # fmt: skip
        head = self._between if self.turns else self._head
        new = self._tokens(head + text + self._after, special=not self.turns)
        self.ids = torch.cat([self.ids, new], dim=1)
        self._read(self.ids[:, self.cache.get_seq_length() : -1], phase("reading"))
        own, generate = self.model.generation_config, self.model.generate
        config = generation(self.model, self.tokenizer, max_new_tokens, temperature)
        speaker = _Speaker(self.tokenizer, hear)
        output = generate(
            self.ids, attention_mask=torch.ones_like(self.ids), past_key_values=self.cache, generation_config=config,
            streamer=speaker, stopping_criteria=[_Stop(stop)],
        )  # type: ignore[operator]  # fmt: skip
        answer = output[:, self.ids.shape[1] :]
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        whole = answer.shape[1] > 0 and int(answer[0, -1]) in ends
        if whole:  # the template ends the answer itself, when the next turn begins
            answer = answer[:, :-1]
        self.ids = torch.cat([self.ids, answer], dim=1)
        return Turn(text, str(self.tokenizer.decode(answer[0], skip_special_tokens=True)).strip(), whole)

    def _read(self, ids: Tensor, progress: Progress) -> None:
        if ids.shape[1] == 0:
            return
        first = self.cache.get_seq_length() == 0
        stay = [(0, self._tokens(self._head, special=True).shape[1])] if first and self.system else []
        self.cache.read(self.model, ids, keep=stay, progress=progress)

    def _tokens(self, text: str, special: bool) -> Tensor:
        special = special and not self.tokenizer.chat_template
        ids: Tensor = self.tokenizer(text, add_special_tokens=special, return_tensors="pt", verbose=False)["input_ids"]
        return ids.to(self.model.device)

    def undo(self) -> Turn:
        """Takes the last turn back; the cache is exactly as it was before. Raises InputError if there is none to take back."""
        if self._before is None:
            raise InputError("there is no turn to take back: only the last one can be, once")
        (self.cache, self.ids), self._before = self._before, None
        return self.turns.pop()

    def save(self, file: Path) -> None:
        """Writes what was said as JSON: words and tokens, not the cache. Raises InputError if it cannot be written."""
        turns = [asdict(turn) for turn in self.turns]
        told = {"format": FORMAT, "system": self.system, "turns": turns, "tokens": self.ids[0].tolist()}
        try:
            file.write_text(json.dumps(told, ensure_ascii=False, indent=1), encoding="utf-8")
        except OSError as error:
            raise InputError(f"{str(file)!r} cannot be written ({error.strerror})") from error

    def load(self, file: Path, phase: Phase = silent) -> None:
        """Goes on where a saved conversation ended: its tokens are read again, in chunks. Raises InputError if it is none."""
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            if told["format"] != FORMAT:
                raise KeyError("format")
            turns, tokens, system = (
                [Turn(**turn) for turn in told["turns"]],
                torch.tensor([told["tokens"]]),
                str(told["system"]),
            )
        except OSError as error:
            raise InputError(f"{str(file)!r} cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{str(file)!r} is not a conversation saved by keepkv") from error
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        if tokens.numel() == 0 or tokens.dtype != torch.int64 or int(tokens.max()) >= vocabulary or int(tokens.min()) < 0:
            raise InputError(f"{str(file)!r} was saved with another model: its tokens are not this one's")
        old = self.cache, self.ids, self.turns, self.system, self._head, self._between, self._after
        self.cache = self.cache.fork()
        self.cache.reset()
        try:
            self.system = system
            self._head, self._between, self._after = pieces(self.tokenizer, system)
            self._read(tokens[:, :-1].to(self.model.device), phase("reading the conversation"))
        except BaseException:
            self.cache, self.ids, self.turns, self.system, self._head, self._between, self._after = old
            raise
        self.ids, self.turns, self._before = tokens.to(self.model.device), turns, None


def pieces(tokenizer: PreTrainedTokenizerBase, system: str = "") -> tuple[str, str, str]:
    """What stands before the first user's text, between an answer and the next one's, and between text and answer."""
    if not tokenizer.chat_template:
        return f"{system}\n\nQuestion: ".lstrip() if system else "Question: ", "\n\nQuestion: ", "\nAnswer:"
    first, answer, second = _MARKS
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": role, "content": mark} for role, mark in zip(("user", "assistant", "user"), _MARKS, strict=True)]
    try:
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:
        raise InputError(
            f"this model's chat template takes no {'system prompt' if system else 'conversation'}: {error}"
        ) from error
    head, rest = whole.split(first)
    between, after = rest.split(answer)[1].split(second)
    return head, between, after


class _Speaker(TextStreamer):
    """Tells the words of an answer as they become certain."""

    def __init__(self, tokenizer: Any, hear: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._hear = hear

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._hear(text)


class _Stop(StoppingCriteria):
    def __init__(self, stop: Callable[[], bool]) -> None:
        self._stop = stop

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self._stop(), dtype=torch.bool, device=input_ids.device)
