"""Writing: the answers to several questions about one text, greedily, in one batch.

A token that is written costs one pass over the model's weights, however many rows there are. So the questions of a text are
asked together: the cache is taken once for every question, and shorter questions are padded on the left. What a row sees, and
at which positions, is what it would be alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keepkv.cache import KeepCache
from keepkv.models.families import is_compressed, layer_kinds
from keepkv.text.prompt import NEXT_QUESTION

MOST_BYTES = 2 << 30  # of the caches of a batch
MOST_ROWS = 16


class Written(NamedTuple):
    """What a model wrote, and the mean log-probability per token, in nats, of the expected answer."""

    text: str
    loglik: float


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: KeepCache,
    questions: Sequence[Tensor],
    expected: Sequence[Tensor],
    limit: int,
) -> list[Written]:
    """Answers questions from a cache that has read a text. An answer ends where the model ends it, or asks the next question.

    Args:
        model: Any supported model.
        tokenizer: Its tokenizer.
        cache: Is not changed.
        questions: Token ids [1, n] of each.
        expected: Token ids [1, m] of what is expected to be answered to each.
        limit: Tokens of an answer, at most.

    Returns:
        One for each question, in their order.
    """
    written: dict[int, Written] = {}
    for rows in _batches(model, cache, questions):
        some = _write(model, tokenizer, cache, [questions[i][0] for i in rows], [expected[i][0] for i in rows], limit)
        written.update(zip(rows, some, strict=True))
    return [written[i] for i in range(len(questions))]


def _batches(model: PreTrainedModel, cache: KeepCache, questions: Sequence[Tensor]) -> Iterator[list[int]]:
    """Questions that are asked together.

    A live cache would fold the padding too, in a sliding window padding would take the place of tokens, and a recurrent state
    would take it in: there only questions of one length go together.
    """
    most = min(MOST_ROWS, max(1, MOST_BYTES // max(1, cache.report().kv_bytes)))
    lengths = [question.shape[1] for question in questions]
    order = sorted(range(len(questions)), key=lambda i: lengths[i])
    windows = not all(map(is_compressed, layer_kinds(model)))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) == most or cache.live or (windows and lengths[i] != lengths[batch[0]])):
            yield batch
            batch = []
        batch.append(i)
    yield batch


def _write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: KeepCache,
    questions: Sequence[Tensor],
    expected: Sequence[Tensor],
    limit: int,
) -> list[Written]:
    """As `write`, for one batch."""
    rows = len(questions)
    longest = max(map(len, questions))
    ids = torch.stack([pad(question, (longest - len(question), 0)) for question in questions])
    own = torch.stack([pad(torch.ones_like(question), (longest - len(question), 0)) for question in questions])
    state = _State(model, cache.fork(), rows)
    first = state.read(ids, own, logits=1)
    logliks = _logliks(state.fork(), first, expected)
    ends = _ends(model)
    stop = "" if tokenizer.chat_template else NEXT_QUESTION  # a base model that has answered writes the next question
    words: list[list[int]] = [[] for _ in questions]
    open_rows = set(range(rows))
    logits = first
    for _ in range(limit):
        newest = logits[:, -1].argmax(-1)
        for row, word in enumerate(newest.tolist()):
            if row in open_rows and word in ends:
                open_rows.discard(row)
            elif row in open_rows:
                words[row].append(word)
                if stop and stop in tokenizer.decode(words[row]):
                    open_rows.discard(row)
        if not open_rows or max(map(len, words)) == limit:
            break
        logits = state.read(newest[:, None], torch.ones_like(newest[:, None]))
    texts = (str(tokenizer.decode(row, skip_special_tokens=True)) for row in words)
    texts = (text.split(stop)[0].strip() if stop else text.strip() for text in texts)
    return [Written(text, loglik) for text, loglik in zip(texts, logliks, strict=True)]


def _logliks(state: _State, first: Tensor, expected: Sequence[Tensor]) -> list[float]:
    """Mean log-probability per token of each row's expected answer; first: the logits [rows, 1, vocabulary] before it."""
    longest = max(map(len, expected))
    answers = torch.stack([pad(answer, (0, longest - len(answer))) for answer in expected])
    logits = first if longest == 1 else torch.cat([first, state.read(answers[:, :-1], torch.ones_like(answers[:, :-1]))], 1)
    log_probs = logits.float().log_softmax(-1).gather(2, answers[..., None])[..., 0]
    return [round(float(row[: len(answer)].mean()), 6) for row, answer in zip(log_probs, expected, strict=True)]


class _State:
    """A cache with a row for every question, and which columns each row sees."""

    def __init__(self, model: PreTrainedModel, cache: KeepCache, rows: int) -> None:
        self.model = model
        self.cache = cache
        tokens = cache.get_seq_length()
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        self.mask = torch.ones(rows, tokens, dtype=torch.int64, device=model.device)

    def fork(self) -> _State:
        twin = object.__new__(_State)
        twin.model, twin.cache, twin.mask = self.model, self.cache.fork(), self.mask
        return twin

    def read(self, ids: Tensor, own: Tensor, logits: int = 0) -> Tensor:
        """Logits [rows, n, vocabulary] of new columns, or of the newest `logits`; own: 1 for a token, 0 for padding."""
        self.mask = torch.cat([self.mask, own], 1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        padded: Any = {} if bool(self.mask.all()) else {"attention_mask": self.mask}
        output = self.model(ids, past_key_values=self.cache, position_ids=positions, logits_to_keep=logits, **padded)
        return output.logits  # type: ignore[no-any-return]


def _ends(model: PreTrainedModel) -> set[int]:
    """The tokens that end an answer."""
    end: Any = model.generation_config.eos_token_id if model.generation_config else None
    return set(end if isinstance(end, list) else [] if end is None else [end])
