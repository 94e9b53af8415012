"""Conversation: turns of a user and a model over one live cache, so that memory does not grow with what was said."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, TextStreamer

from keepkv import schema
from keepkv.cache import KeepCache
from keepkv.compress import Progress
from keepkv.errors import InputError
from keepkv.models import identity
from keepkv.paths import read_file, write_file
from keepkv.recipe import CONVERSATION, Recipe
from keepkv.text.ask import generation
from keepkv.text.prompt import marks, shown
from keepkv.text.reading import Phase, silent

FORMAT = "keepkv conversation 2"
_OLDER = "keepkv conversation 1"  # without the tokenizer's identity
_MOST_BYTES = 256 << 20  # of a file: some ten million words


@dataclass(frozen=True)
class Turn:
    """What a user said and what the model answered; `whole` is False where the answer was cut off."""

    user: str
    answer: str
    whole: bool = True


class Conversation:
    """One turn after the other over a live cache, which holds budget + period tokens at most, however long it gets.

    Every turn starts from a checkpoint, so that `undo` takes it back exactly.

    Args:
        model: Any supported model.
        tokenizer: Its tokenizer. Without a chat template, turns are "Question: ..." and "Answer: ...".
        recipe: The cache's settings.
        system: A system prompt; it stays verbatim in every head.

    Attributes:
        cache: What has been read and written so far.
        turns: What was said.
        ids: The same as token ids [1, T].

    Raises:
        InputError: for a chat template that takes no system prompt, or no conversation.
        KeepKVError: as `KeepCache` does.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, recipe: Recipe = CONVERSATION, system: str = ""
    ) -> None:
        recipe.refuse(
            "a conversation", "keep", "tolerance", "exact", "lookback", *(["repeat"] if recipe.repeat == "always" else [])
        )
        self.model = model
        self.tokenizer = tokenizer
        self.system = system
        self.cache = KeepCache.of(model, recipe)
        self.turns: list[Turn] = []
        self.ids = torch.empty(1, 0, dtype=torch.int64, device=model.device)
        self._before: tuple[KeepCache, Tensor] | None = None  # the last turn's checkpoint
        self._template = turn_template(tokenizer, system)

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
        """One turn. If anything goes wrong, or is interrupted, the conversation is as it was before.

        Args:
            text: What the user says.
            hear: Called with the pieces of the answer as they come.
            stop: Called after every token; the answer ends where it returns True.
            max_new_tokens: Of the answer, at most.
            temperature: 0 is greedy decoding.
            phase: Told what is under way.

        Raises:
            InputError: if there is no text.
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
        self,
        text: str,
        hear: Callable[[str], None],
        stop: Callable[[], bool],
        max_new_tokens: int,
        temperature: float,
        phase: Phase,
    ) -> Turn:
        opening = self._template.between if self.turns else self._template.head
        new = self._tokenize(opening + text + self._template.after, special=not self.turns)
        self.ids = torch.cat([self.ids, new], dim=1)
        self._read(self.ids[:, self.cache.get_seq_length() : -1], phase("reading"))
        generate: Any = self.model.generate
        output = generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            past_key_values=self.cache,
            generation_config=generation(self.model, self.tokenizer, max_new_tokens, temperature),
            streamer=_Speaker(self.tokenizer, hear),
            stopping_criteria=[_Stop(stop)],
        )
        answer = output[:, self.ids.shape[1] :]
        end: Any = self.model.generation_config.eos_token_id
        ends = end if isinstance(end, list) else [end]
        whole = answer.shape[1] > 0 and int(answer[0, -1]) in ends
        if whole:  # the template ends the answer itself, when the next turn begins
            answer = answer[:, :-1]
        self.ids = torch.cat([self.ids, answer], dim=1)
        return Turn(text, str(self.tokenizer.decode(answer[0], skip_special_tokens=True)).strip(), whole)

    def _read(self, ids: Tensor, progress: Progress) -> None:
        """Reads tokens into the cache; a system prompt at their beginning is kept verbatim."""
        if ids.shape[1] == 0:
            return
        first = self.cache.get_seq_length() == 0
        keep = [(0, self._tokenize(self._template.head, special=True).shape[1])] if first and self.system else []
        self.cache.read(self.model, ids, keep=keep, progress=progress)

    def _tokenize(self, text: str, special: bool) -> Tensor:
        special = special and not self.tokenizer.chat_template
        ids: Tensor = self.tokenizer(text, add_special_tokens=special, return_tensors="pt", verbose=False)["input_ids"]
        return ids.to(self.model.device)

    def undo(self) -> Turn:
        """Takes the last turn back: the cache is exactly as it was before it.

        Raises:
            InputError: if there is none to take back.
        """
        if self._before is None:
            raise InputError("there is no turn to take back: only the last one can be, once")
        self.cache, self.ids = self._before
        self._before = None
        return self.turns.pop()

    def save(self, file: Path) -> None:
        """Writes what was said as JSON, whole or not at all: words and tokens, not the cache and its settings.

        A new file is its owner's only.

        Raises:
            InputError: if the file cannot be written.
        """
        fields = {
            "format": FORMAT,
            "tokenizer": identity.of_tokenizer(self.tokenizer),
            "system": self.system,
            "turns": [asdict(turn) for turn in self.turns],
            "tokens": self.ids[0].tolist(),
        }
        try:
            write_file(file, json.dumps(fields, indent=1), private=True)
        except OSError as error:
            raise InputError(f"{str(file)!r} cannot be written ({error.strerror})") from error

    def load(self, file: Path, phase: Phase = silent) -> None:
        """Goes on where a saved conversation ended: its tokens are read again, with this conversation's settings.

        Raises:
            InputError: for a file that is no saved conversation, or one with another tokenizer or chat template. Nothing has
                changed then.
        """
        try:
            saved = _saved(read_file(file, limit=_MOST_BYTES))
        except OSError as error:
            raise InputError(f"{str(file)!r} cannot be read ({error.strerror})") from error
        except (ValueError, KeyError) as error:
            raise InputError(f"{str(file)!r} is not a conversation saved by keepkv ({error})") from error
        if not self._is_ours(saved):
            raise InputError(
                f"{str(file)!r} was saved with another tokenizer or chat template: load the model that it was saved with"
            )
        loaded = copy.copy(self)
        loaded.cache = self.cache.fork()
        loaded.cache.reset()
        loaded.ids = torch.tensor([saved.tokens], device=self.model.device)
        loaded.turns = list(saved.turns)
        loaded.system = saved.system
        loaded._before = None
        loaded._template = turn_template(self.tokenizer, saved.system)
        loaded._read(loaded.ids[:, :-1], phase("reading the conversation"))
        vars(self).update(vars(loaded))

    def _is_ours(self, saved: _Saved) -> bool:
        """Whether a saved conversation's tokens mean here what they meant there."""
        if max(saved.tokens) >= self.model.config.get_text_config(decoder=True).vocab_size:
            return False
        if saved.tokenizer is not None:
            return saved.tokenizer == identity.of_tokenizer(self.tokenizer)
        words = "".join(str(self.tokenizer.decode(saved.tokens)).split())
        return all("".join(turn.user.split()) in words for turn in saved.turns[:1])


class _Saved(NamedTuple):
    """What a file holds of a conversation; the tokenizer's identity is None in older ones."""

    system: str
    turns: tuple[Turn, ...]
    tokens: list[int]
    tokenizer: str | None


def _saved(data: bytes) -> _Saved:
    """What a file holds. Raises ValueError, KeyError for what is not the JSON that `Conversation.save` writes."""
    fields = schema.parse(data)
    if fields["format"] not in (FORMAT, _OLDER):
        raise ValueError("it is of another format")
    tokens = [schema.whole(token) for token in schema.sequence(fields["tokens"])]
    if not tokens:
        raise ValueError("it holds no tokens")
    turns = tuple(schema.dataclass_of(Turn, schema.mapping(turn)) for turn in schema.sequence(fields["turns"]))
    tokenizer = schema.text(fields["tokenizer"]) if fields["format"] == FORMAT else None
    return _Saved(schema.text(fields["system"]), turns, tokens, tokenizer)


class TurnTemplate(NamedTuple):
    """What a chat template puts around the turns of a conversation.

    Attributes:
        head: Before the first user's text, a system prompt included.
        between: Between an answer and the next user's text.
        after: Between a user's text and the answer.
    """

    head: str
    between: str
    after: str


def turn_template(tokenizer: PreTrainedTokenizerBase, system: str = "") -> TurnTemplate:
    """What a tokenizer's chat template puts around turns, after a system prompt; without a template, plain words.

    Raises:
        InputError: for a template that takes no system prompt, or no conversation.
    """
    if not tokenizer.chat_template:
        head = f"{system}\n\nQuestion: ".lstrip() if system else "Question: "
        return TurnTemplate(head, between="\n\nQuestion: ", after="\nAnswer:")
    found = marks(6, system, str(tokenizer.chat_template))
    kind = "system prompt" if system else "conversation"
    try:
        template = _between(tokenizer, system, found[:3])
        if template != _between(tokenizer, system, found[3:]):
            raise ValueError("what stands around the messages depends on them")
    except ValueError as error:
        raise InputError(f"this model's chat template takes no {kind}: {error}") from error
    return template


def _between(tokenizer: PreTrainedTokenizerBase, system: str, said: Sequence[str]) -> TurnTemplate:
    """What stands around a question, an answer and the next question. Raises ValueError where that cannot be told."""
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": content} for role, content in zip(roles, said, strict=True)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    whole = shown(tokenizer, messages, dict.fromkeys(said, 1))
    if system.strip() not in whole:
        raise ValueError("it does not show it as it is")
    question, answer, next_question = said
    head, rest = whole.split(question)
    between, after = rest.split(answer)[1].split(next_question)
    return TurnTemplate(head, between, after)


class _Speaker(TextStreamer):
    """Hands on the words of an answer as they become certain."""

    def __init__(self, tokenizer: Any, hear: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._hear = hear

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._hear(text)


class _Stop(StoppingCriteria):
    """Ends an answer where a function says so."""

    def __init__(self, stop: Callable[[], bool]) -> None:
        self._stop = stop

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self._stop(), dtype=torch.bool, device=input_ids.device)
