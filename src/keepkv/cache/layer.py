"""KeepLayer: what one layer with full attention holds, and attention over it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import CacheLayerMixin

from keepkv.attend.dispatch import Backend, attend, backend_for
from keepkv.cache.backing import Backing
from keepkv.cache.proxies import Call
from keepkv.errors import KeepKVError, ModelError
from keepkv.observe.repetition import Piece, attend_piece
from keepkv.observe.watch import LayerState, Watch
from keepkv.ops.softmax import PLAIN, Softmax
from keepkv.slots.slot_dtype import FLOAT, Price, SlotDtype
from keepkv.slots.slots import Slots


class Asked(NamedTuple):
    """What layers asked of the keys that they share, or one layer of its own.

    Attributes:
        queries: [B, H, G, new, d], of the newest tokens.
        scale: The factor on q·k.
        softmax: The cap and sinks.
    """

    queries: Tensor
    scale: float
    softmax: Softmax


class KeepLayer(CacheLayerMixin):
    """One layer's state: the compact part, and beside it the newest tokens, exactly (the tail).

    Attributes:
        slots: The compact part; None until something was compressed.
        keys, values: The tail, [B, H, n, d] and [B, H, n, d_v].
        seen: Columns read, padding included. It alone decides positions and masks.
        watch: What was observed of the layer's attention, as long as there is more to compress; otherwise None.
        backing: The exact keys and values of what the slots stand for; None unless that is wanted.
        users: How many layers of the model attend to these keys: more than one where layers share them.
        asked: What those of them asked that have attended to the newest tokens, until all have.
        group: Query heads of each of them that share a KV head; 0 until the first one has asked.
    """

    is_sliding = False
    is_croppable = True
    keys: Tensor  # None until the first token is read, as in transformers' own layers
    values: Tensor

    def __init__(self, users: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.users = users
        self.asked: tuple[Asked, ...] = ()
        self.group = 0
        self.slots: Slots | None = None
        self.seen = 0
        self.watch: Watch | None = None
        self.backing: Backing | None = None

    @property
    def tail(self) -> int:
        """Tokens held exactly."""
        return self.keys.shape[2] if self.is_initialized else 0

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.keys.shape[1] if self.is_initialized else 0

    @property
    def backend(self) -> Backend:
        """What attends to the slots."""
        return backend_for(self.keys.device, self.keys.dtype, self.keys.shape[3], self.values.shape[3])

    @property
    def state(self) -> LayerState:
        """What the layer holds, as a value."""
        return LayerState(self.slots, self.keys, self.values, self.seen)

    def price(self, slot_dtype: SlotDtype = FLOAT, full_dtype: torch.dtype | None = None) -> Price:
        """What slots cost, and tokens of a full cache in `full_dtype`, or in the dtype that the layer holds."""
        element = self.keys.element_size()
        full_element = element if full_dtype is None else full_dtype.itemsize
        return slot_dtype.price(self.keys.shape[3], self.values.shape[3], element, full_element)

    def entries(self, row: int, start: int, tail: int) -> int:
        """Slots and tail tokens of one batch row that starts at column `start`, over all heads, without its newest `tail`."""
        slots = sum(self.slots.counts[row * self.heads : (row + 1) * self.heads]) if self.slots else 0
        return slots + self.heads * max(0, self.seen - self.state.first(start) - tail)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = key_states[:, :, :0]
        self.values = value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([self.keys, key_states], dim=2)
        self.values = torch.cat([self.values, value_states], dim=2)
        self.seen += key_states.shape[2]
        self.asked = ()
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Size and offset of attention masks: as if nothing had been compressed, but only for tokens held one by one."""
        held = self.seen if self.slots is None else self.tail
        return held + query_length, self.seen - held

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.21

    def _tail_repeat_peak(self) -> Tensor | None:
        """The largest share of attention that a repetition paid each of the tail's tokens, [H, n]."""
        if self.watch is None or self.watch.repeat_peak is None:
            return None
        width = self.state.width
        missing = max(0, width - self.watch.repeat_peak.shape[1])  # tokens that came after the repetition
        return pad(self.watch.repeat_peak, (0, missing))[:, width - self.tail :]

    def exact_repeat_peak(self) -> Tensor | None:
        """The same of all tokens read, [H, T], from backing and tail; None unless it is known of all of them."""
        repeat_peak = self._tail_repeat_peak()
        if repeat_peak is None or self.backing is None or len(self.backing.repeat_peak) < len(self.backing.parts):
            return None
        return torch.cat([*(part.to(repeat_peak.device) for part in self.backing.repeat_peak), repeat_peak], dim=1)

    def compact(self, slots: Slots, tail: int) -> None:
        """All but the newest `tail` tokens become the compact part; the dense tensors are released."""
        size = self.tail - tail
        if self.backing is not None:
            repeat_peak = self._tail_repeat_peak()
            repeat_peak = None if repeat_peak is None else repeat_peak[:, :size]
            self.backing = self.backing.add(self.keys[:, :, :size], self.values[:, :, :size], repeat_peak)
        self.slots = slots
        self.keys = self.keys[:, :, size:].clone()  # a view would hold the compressed tokens' memory
        self.values = self.values[:, :, size:].clone()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest -tokens_to_remove tokens, exactly. They must not have been compressed.

        A positive number is how many columns stay: so transformers before 5.16 asks for it.
        """
        if tokens_to_remove > 0:
            tokens_to_remove = min(0, tokens_to_remove - self.seen)
        if not -self.tail <= tokens_to_remove <= 0:
            raise KeepKVError(
                f"crop({tokens_to_remove}): tokens that are compressed cannot be forgotten one by one: "
                f"expected a number from -{self.tail} to 0; KeepCache(..., tail=n) leaves the newest n out of every compression"
            )
        if tokens_to_remove:
            self.watch = self.watch and self.watch.cropped(self.state, -tokens_to_remove)
            self.keys = self.keys[:, :, :tokens_to_remove]
            self.values = self.values[:, :, :tokens_to_remove]
            self.seen += tokens_to_remove

    def reset(self) -> None:
        backing = self.backing and Backing(self.backing.kind)
        self.__init__(self.users)  # type: ignore[misc]
        self.backing = backing

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.is_initialized:
            rows = beam_idx.to(self.keys.device)
            heads = self.heads
            if self.backing is not None and self.backing.parts:
                if rows.tolist() == list(range(len(self.keys))):
                    return
                raise KeepKVError("rows cannot be moved (beam search, batch selection) in a cache that has a backing")
            self.keys = self.keys.index_select(0, rows)
            self.values = self.values.index_select(0, rows)
            self.slots = self.slots and self.slots.rows(rows.tolist(), heads)
            self.watch = self.watch and self.watch.rows(rows)

    def asking(self, query: Tensor, new: int) -> int:
        """How many of the `new` newest tokens a query [B, H*G, n, d], or [B, H, G, d] of one token, is of: the last n of them.

        The layer itself asks for all. Layers that share its keys and come later may only be run for the tokens whose logits are
        wanted.
        """
        rows = query.shape[1] * query.shape[2] // self.heads
        self.group = self.group or rows // new
        return rows // self.group

    def ask(self, call: Call, new: int) -> Asked | None:
        """Notes what one layer asks of these keys. Returns what all their users asked, when the last of them has.

        The query heads of all users that share a KV head are one group, in the order of the layers. Where one of them did not
        ask for a token, the layer's own queries stand in.

        Raises:
            ModelError: for users whose logits are not made alike.
        """
        queries = call.query.detach().reshape(len(call.query), self.heads, self.group, -1, call.query.shape[-1])
        if queries.shape[3] < new:
            queries = torch.cat([self.asked[0].queries[:, :, :, : new - queries.shape[3]], queries], 3)
        self.asked = (*self.asked, Asked(queries, call.scale, call.softmax))
        if len(self.asked) < self.users:
            return None
        asked, self.asked = self.asked, ()
        if len(asked) == 1:
            return asked[0]
        if len({(each.scale, each.softmax.cap) for each in asked}) > 1:
            raise ModelError(
                "layers that share keys make logits of other scales or caps: use the model with transformers' own cache"
            )
        softmax = Softmax.together([each.softmax for each in asked], self.heads)
        return Asked(torch.cat([each.queries for each in asked], 2), call.scale, softmax)

    def repeat(self, call: Call, piece: Piece, draft: Slots) -> Tensor:
        """Attention while a piece of the text is repeated, of one row; the watch notes what it attends to."""
        assert self.watch is not None
        query = call.query
        new = query.shape[2]
        wide = torch.promote_types(query.dtype, torch.float32)
        rows = query[0].reshape(self.heads, -1, query.shape[-1]).to(wide) * call.scale  # [H, G*new, d]
        keys = self.keys[0].to(wide)
        values = self.values[0].to(wide)
        first, last, _, how = piece
        before_tail = self.seen - self.tail
        output, peak = attend_piece(rows, keys, values, new, draft, first, last, before_tail, how, call.softmax)
        before = LayerState(self.slots, self.keys[:, :, :-new], self.values[:, :, :-new], self.seen - new)
        self.watch = self.watch.repeat(peak.float(), before)
        if how.queries and (asked := self.ask(call, new)) is not None:
            queries = asked.queries[0][:, :, first - last :]  # without the instruction before the piece
            self.watch = self.watch.keep_repeated(queries, torch.arange(first, last, device=query.device))
        return output.to(query.dtype).reshape(query.shape[:-1] + output.shape[-1:])

    def attend(self, query: Tensor, mask: Tensor | None, scale: float, new: int, softmax: Softmax = PLAIN) -> Tensor:
        """Attention of the `new` newest tokens, query [B, H*G, new, d], over compact part and tail together."""
        assert self.slots is not None
        rows = query.reshape(len(query), self.heads, -1, query.shape[-1])  # [B, H, G*new, d]
        if mask is None and new > 1:
            mask = torch.ones(new, self.tail, dtype=torch.bool, device=query.device).tril(self.tail - new)[None, None]
        if mask is not None:
            mask = mask[..., mask.shape[-1] - self.tail :]
        output = attend(rows, self.slots, self.keys, self.values, mask, scale, softmax=softmax)
        return output.to(query.dtype).reshape(*query.shape[:-1], -1)
