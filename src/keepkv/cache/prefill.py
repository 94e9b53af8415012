"""Prefill: a prompt read in chunks into a KeepCache, and repeated, so that its details are observed. Methods of the cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv import methods
from keepkv.cache.observations import Observations
from keepkv.compress import Progress, compress
from keepkv.errors import InputError, KeepKVError
from keepkv.models import families
from keepkv.observe.repetition import Piece, Repeat

if TYPE_CHECKING:
    from keepkv.cache.cache import KeepCache


OVERLAP = 8  # tokens of the previous chunk that a repetition starts from


@torch.no_grad()
def read(
    self: KeepCache,
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    repeat: Tensor | None = None,
    keep: Sequence[tuple[int, int]] = (),
    progress: Progress = lambda done, of: None,
) -> KeepCache:
    """Reads a prompt [B, T] of any length, `chunk` tokens at a time, and compresses whenever it outgrows the budget.

    A fraction is that of the whole prompt, so that its first chunks stay whole as long as there is room. The first chunk
    is the shortest: so a row of a left-padded batch is cut as if alone. repeat [1, n]: an instruction to repeat
    the text; each chunk is then rehearsed (see `rehearse`) before it is compressed, also without it for a method that needs
    it, and compressed with the method's `midway` merge until all has been read. keep: as in `compress`. Returns the cache
    itself.
    """
    batch, length = input_ids.shape
    size = self.chunk or max(1, length)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    before = self.get_seq_length()
    if mask.shape[1] not in (length, before + length):
        raise InputError(f"attention mask {list(mask.shape)}: expected [{batch}, {length}] or [{batch}, {before + length}]")
    seen = self._tokens() if before else (0,) * batch
    self._expected = tuple(a + b for a, b in zip(seen, mask[:, -length:].sum(1).tolist(), strict=True))
    if mask.shape[1] == length and before:
        starts = [before - count for count in seen]
        columns = torch.arange(before, device=mask.device).expand(batch, -1)
        mask = torch.cat([(columns >= torch.tensor(starts, device=mask.device)[:, None]).to(mask.dtype), mask], 1)
    padded = not bool(mask.all())
    if repeat is None and self.method.repeat is not None and self.method.repeat.needed:
        repeat = input_ids[:, :0]
    auto, self.auto, kept = self.auto, False, self._keep
    self._keep = (*kept, *keep)
    try:
        lo = 0
        while lo < length:
            hi = lo + ((length - lo) % size or size)
            self._ahead = 0 if repeat is None else length - hi
            model(
                input_ids[:, lo:hi], past_key_values=self, logits_to_keep=1,
                **({"attention_mask": mask[:, : before + hi], "position_ids": _positions(mask, before + lo, before + hi)}
                   if padded else {}),
            )  # fmt: skip
            if repeat is not None:
                self.rehearse(model, input_ids[:, lo:hi], repeat)
            if self.live and (self._due or hi < length or lo or (auto and before == 0)):
                self.compress()
            lo = hi
            progress(lo, length)
        if auto and not self.live:
            self.compress()
    except KeepKVError:
        self._keep = kept
        raise
    finally:
        self.auto, self._ahead = auto, 0
    return self


@torch.no_grad()
def rehearse(
    self: KeepCache,
    model: PreTrainedModel,
    input_ids: Tensor,
    lead: Tensor | None = None,
    how: Repeat | None = None,
    progress: Progress = lambda done, of: None,
) -> KeepCache:
    """Repeats the text that was just read over its own cache and observes what that asks for; then `compress`.

    What a model needs to repeat a text word for word is what it needs to answer about its details. input_ids [1, n]:
    the newest n tokens, not compressed yet; lead [1, m]: an instruction to repeat them, in the model's chat format. how: as
    the method has it if not given; by default each piece of 256 tokens sees itself exactly and the rest as in a draft, an
    eviction to 1/16: about one more reading, linear in n. In the middle of a prompt that `read` reads in chunks it is asked
    from where that will end, as questions will be. After KVzip, arXiv 2505.23416. Raises KeepKVError for a batch, and for
    another text than the newest.
    """
    tokens, tail = self.keep_layers[0].seen, self.keep_layers[0].tail
    wrong = input_ids.dim() != 2 or not 0 < input_ids.shape[1] <= tail or (self.compressed and not self.live)
    if wrong or len(input_ids) != 1 or self._tokens() != (tokens,) or (not self.live and input_ids.shape[1] != tail):
        raise KeepKVError(
            f"rehearse() repeats the text that was just read, before compression, one row: expected [1, {tail}] "
            f"token ids, got {list(input_ids.shape)}"
        )
    start = time.perf_counter()
    lead = input_ids[:, :0] if lead is None else lead.to(input_ids.device)
    self._bank()
    how = how or self.method.repeat or Repeat()
    seen = Observations(self.keep_layers, 0, families.frequencies(self._rotary), self._projections)
    begin, end = tokens - input_ids.shape[1], tokens + self._ahead
    room = self._entries(0) + self._tails()[0] * self._heads
    size = max(room // self._heads // how.draft, 2 * how.chunk)  # the draft has at least two pieces' worth
    drafts = compress(seen, methods.get("snapkv"), min(room, size * self._heads)).slots
    for lo in range(begin, tokens, how.chunk):
        first, last = max(begin, lo - OVERLAP), min(lo + how.chunk, tokens)
        fed = torch.cat([lead, input_ids[:, first - begin : last - begin]], dim=1)
        twin = self.fork()
        twin._piece = Piece(first, last, drafts, how)
        model(fed, past_key_values=twin, logits_to_keep=1, **(_far(tokens, end, fed) if end > tokens else {}))
        for ours, theirs in zip(self.keep_layers, twin.keep_layers, strict=True):
            ours.watch = theirs.watch
        progress(last - begin, tokens - begin)
    self._repeat_seconds += time.perf_counter() - start
    return self


def _far(tokens: int, end: int, fed: Tensor) -> dict[str, Tensor]:
    """Asks as after `end` tokens, of which `tokens` are read: sliding windows will have passed these by then."""
    own = torch.ones_like(fed)
    return {
        "position_ids": torch.arange(end, end + fed.shape[1], device=fed.device)[None],
        "attention_mask": torch.cat([own.new_zeros(1, tokens), own], dim=1),
    }


def _positions(mask: Tensor, lo: int, hi: int) -> Tensor:
    """Positions of columns lo..hi, counted from each row's first real token, as `generate` counts them."""
    return (mask.cumsum(1) - 1).clamp(min=0)[:, lo:hi]
