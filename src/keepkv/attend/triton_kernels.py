"""The kernels of the `triton` backend: attention over ragged slots with votes on CUDA, split over the keys.

Two passes, as in flash-decoding. In the first, every program attends a block of rows to one stretch of a head's slots and
writes output and log-sum-exp. The second merges the stretches in order, so that results are the same each time. The R rows of
the query heads that share a KV head are one block, so that a key is loaded once for all of them. Sums are float32. Quantized
keys and values are loaded as they are stored, and become numbers of the query's dtype in registers. Where they are stored in a
rotated basis, query and output are in that basis too.
"""

from __future__ import annotations

from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from keepkv.attend.states import AttentionState, exact
from keepkv.slots.by_channel import TILE, QuantizedByChannel, tile_starts
from keepkv.slots.by_vector import QuantizedByVector
from keepkv.slots.slot_dtype import SLOT_DTYPES
from keepkv.slots.slots import Slots
from keepkv.slots.vectors import Stack


class Schedule(NamedTuple):
    """How the work is cut.

    Attributes:
        block_rows: Rows of one program.
        block_keys: Keys of one step.
        splits: Stretches that a head's slots are cut into.
        warps: Of a program.
    """

    block_rows: int
    block_keys: int
    splits: int
    warps: int


def schedule(heads: int, rows: int, longest: int, size: int, processors: int) -> Schedule:
    """The schedule for a layer.

    A program has at least 16 rows, which is what a matrix unit takes, and fewer keys at once where heads are large. There are
    as many stretches as give every multiprocessor two programs, but none of under four steps of keys, and 64 at most.

    Args:
        heads: Rows of the batch × KV heads.
        rows: R.
        longest: The most slots that a head has.
        size: The larger one of d and d_v.
        processors: Multiprocessors of the device.
    """
    block_rows = min(64 if size <= 128 else 32, max(16, triton.next_power_of_2(rows)))
    block_keys = 64 if size <= 128 else 32
    programs = heads * triton.cdiv(rows, block_rows)
    wanted = triton.cdiv(2 * processors, max(1, programs))
    splits = max(1, min(wanted, triton.cdiv(longest, 4 * block_keys), 64))
    return Schedule(block_rows, block_keys, splits, 4 if block_rows <= 32 else 8)


def attend_slots(query: Tensor, slots: Slots, scale: float, plan: Schedule | None = None) -> AttentionState:
    """See `dispatch.attend_slots`. query [B, H, R, d], float32, bfloat16 or float16, any strides; d and d_v up to 256."""
    batch, heads, rows, size = query.shape
    value_size = slots.values.shape[1]
    longest = max(slots.counts, default=0)
    device = query.device
    if plan is None:
        on_cuda = device.type == "cuda"
        processors = torch.cuda.get_device_properties(device).multi_processor_count if on_cuda else 1
        plan = schedule(batch * heads, rows, longest, max(size, value_size), processors)
    parts = torch.empty(plan.splits, batch * heads, rows, value_size, dtype=torch.float32, device=device)
    masses = torch.empty(plan.splits, batch * heads, rows, dtype=torch.float32, device=device)
    output = torch.empty(batch, heads, rows, value_size, dtype=torch.float32, device=device)
    log_mass = torch.empty(batch, heads, rows, dtype=torch.float32, device=device)
    if not output.numel():
        return output, log_mass
    keys, key_steps, key_lows, key_bits, first_tiles = _stored_keys(slots)
    values, value_steps, value_bits = _stored(slots.values)
    tiles = triton.cdiv(rows, plan.block_rows)
    wide_values = max(16, triton.next_power_of_2(value_size))
    _attend[(batch * heads, tiles, plan.splits)](
        query, keys, values, key_steps, key_lows, value_steps, slots.bias, slots.bounds, first_tiles, parts, masses, scale,
        heads, rows, size, value_size, *query.stride(), *keys.stride(), *values.stride(),
        BLOCK_R=plan.block_rows, BLOCK_N=plan.block_keys, BLOCK_D=max(16, triton.next_power_of_2(size)), BLOCK_V=wide_values,
        KEY_BITS=key_bits, BY_CHANNEL=key_lows is not key_steps, TILE=TILE, VALUE_BITS=value_bits,
        WIDEN=device.type != "cuda", num_warps=plan.warps,
    )  # fmt: skip
    _join[(batch * heads, tiles)](
        parts, masses, output, log_mass, rows, value_size, batch * heads, plan.splits,
        BLOCK_R=plan.block_rows, BLOCK_V=wide_values, num_warps=plan.warps,
    )  # fmt: skip
    return output, log_mass


def _stored_keys(slots: Slots) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """As `_stored`, with the lows of keys by channel beside their steps (otherwise both are the same), and first tiles."""
    stack = slots.keys
    if isinstance(stack, QuantizedByChannel) and stack.starts == tile_starts(slots.counts):
        return stack.codes, stack.steps, stack.lows, stack.bits, slots.first_tiles
    keys, steps, bits = _stored(stack)
    return keys, steps, steps, bits, slots.bounds


def _stored(stack: Stack) -> tuple[Tensor, Tensor, int]:
    """What the kernel reads of a stack: vectors, or integers and their steps; and the bits of an integer (0: vectors)."""
    if isinstance(stack, QuantizedByVector):
        return stack.codes, stack.steps, stack.bits
    plain = stack[:]
    return plain, plain, 0


@cache
def trial(device: torch.device, dtype: torch.dtype, size: int, value_size: int) -> str:
    """What is wrong with the kernel on a device for such queries and slots, tried once for every slot dtype; "" if nothing."""
    generator, counts = torch.Generator().manual_seed(0), (0, 3, 70, 200)
    query, keys, values = (
        torch.randn(*shape, generator=generator).to(device, dtype)
        for shape in ((1, 4, 5, size), (sum(counts), size), (sum(counts), value_size))
    )
    bias = torch.rand(len(keys), generator=generator).to(device)
    for slot_dtype in SLOT_DTYPES.values():
        positions = torch.arange(len(keys), device=device).int()
        slots = slot_dtype.stored(Slots(keys, values, bias, positions, (0, *accumulate(counts))))
        case = f"on {device} for {dtype}, sizes {size} and {value_size}, and {slot_dtype.name} slots"
        try:
            output, log_mass = attend_slots(query, slots, size**-0.5)
        except Exception as error:  # a compiler has many
            return f"does not work {case} ({type(error).__name__}: {error})"
        for head, tensors in enumerate(slots.unrotated().per_head):
            plain_keys, plain_values, plain_bias = (x.double() for x in tensors)
            wanted, wanted_mass = exact(query[0, head].double(), plain_keys, plain_values, plain_bias, size**-0.5)
            same_output = torch.allclose(output[0, head].double(), wanted.nan_to_num(), atol=0.02, rtol=0.02)
            if not same_output or not torch.allclose(log_mass[0, head].double(), wanted_mass, atol=0.02, rtol=0.02):
                return f"computes something else {case}"
    return ""


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    query, keys, values, key_steps, key_lows, value_steps, bias, bounds, first_tiles, parts, masses, scale,
    heads, rows, size, value_size,
    query_b, query_h, query_r, query_d, key_n, key_d, value_n, value_d,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    KEY_BITS: tl.constexpr, BY_CHANNEL: tl.constexpr, TILE: tl.constexpr, VALUE_BITS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One head, BLOCK_R rows, one stretch of its slots. WIDEN: products of float32, as the interpreter has none of bfloat16."""
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    column, value_column = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    real_row, real_column, real_value = row < rows, column < size, value_column < value_size

    start, end = tl.load(bounds + head), tl.load(bounds + head + 1)
    origin, first_tile = start, tl.load(first_tiles + head)
    stretch = tl.cdiv(tl.cdiv(end - start, BLOCK_N), tl.num_programs(2)) * BLOCK_N
    start += split * stretch
    end = tl.minimum(end, start + stretch)

    base = query + head // heads * query_b + head % heads * query_h
    q = tl.load(
        base + row[:, None].to(tl.int64) * query_r + column[None, :] * query_d,
        mask=real_row[:, None] & real_column[None, :], other=0.0,
    )  # fmt: skip
    if WIDEN:
        q = q.to(tl.float32)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    summed = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    for first in range(start, end, BLOCK_N):
        slot = first + tl.arange(0, BLOCK_N).to(tl.int64)
        real = slot < end
        k = _tile(
            keys, key_steps, slot[None, :], column[:, None], real[None, :], real_column[:, None], key_n, key_d, size, KEY_BITS,
            key_lows, first_tile + (slot[None, :] - origin) // TILE, BY_CHANNEL,
        ).to(q.dtype)  # fmt: skip
        logits = tl.dot(q, k, input_precision="ieee") * scale
        logits += tl.load(bias + slot, mask=real, other=float("-inf"))[None, :]
        higher = tl.maximum(top, tl.max(logits, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # rows that have seen nothing yet
        share = tl.exp(logits - level[:, None])
        fade = tl.exp(top - level)
        v = _tile(
            values, value_steps, slot[:, None], value_column[None, :], real[:, None], real_value[None, :], value_n, value_d,
            value_size, VALUE_BITS, value_steps, slot[:, None], False,
        ).to(q.dtype)  # fmt: skip
        summed = summed * fade[:, None] + tl.dot(share.to(v.dtype), v, input_precision="ieee")
        total = total * fade + tl.sum(share, 1)
        top = higher
    saw = total > 0
    divisor = tl.where(saw, total, 1.0)
    place = (split * tl.num_programs(0) + head) * rows + row
    tl.store(masses + place, tl.where(saw, top + tl.log(divisor), float("-inf")), mask=real_row)
    tl.store(
        parts + place[:, None] * value_size + value_column[None, :], summed / divisor[:, None],
        mask=real_row[:, None] & real_value[None, :],
    )  # fmt: skip


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    stack, steps, slot, column, real_slot, real_column, stride_n, stride_d, size, BITS: tl.constexpr,
    lows, grid, BY_CHANNEL: tl.constexpr,
):  # fmt: skip
    """Vectors of some slots, as a tile that slot and column broadcast to.

    Quantized ones: see `QuantizedByVector.unrotated` and `QuantizedByChannel.unrotated`; there `grid` says which grids.
    """
    if BITS == 0:
        tile = tl.load(stack + slot * stride_n + column * stride_d, mask=real_slot & real_column, other=0.0)
    else:
        width = (size * BITS + 7) // 8
        code = tl.load(stack + slot * stride_n + column % width * stride_d, mask=real_slot & real_column, other=0).to(tl.int32)
        code = (code >> (column // width * BITS)) & (2**BITS - 1)
        if BY_CHANNEL:
            place = grid * size + column
            step = tl.load(steps + place, mask=real_slot & real_column, other=0.0).to(tl.float32)
            tile = code.to(tl.float32) * step + tl.load(lows + place, mask=real_slot & real_column, other=0.0).to(tl.float32)
        else:
            step = tl.load(steps + slot, mask=real_slot, other=0.0).to(tl.float32)
            tile = (code.to(tl.float32) - (2**BITS - 1) / 2) * step
    return tile  # one return: Triton wants one type of a function, also where only one branch is compiled


@triton.jit
def _join(  # type: ignore[no-untyped-def]
    parts, masses, output, log_mass, rows, value_size, all_heads, splits, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr
):
    """One head, BLOCK_R rows: the stretches in order, weighed by the exponentials of their log-sum-exps."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_V)
    real_row = row < rows
    real = real_row[:, None] & (column < value_size)[None, :]
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    summed = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    for split in range(splits):
        place = (split * all_heads + head) * rows + row
        mass = tl.load(masses + place, mask=real_row, other=float("-inf"))
        higher = tl.maximum(top, mass)
        level = tl.where(higher == float("-inf"), 0.0, higher)
        fade, weight = tl.exp(top - level), tl.exp(mass - level)
        part = tl.load(parts + place[:, None] * value_size + column[None, :], mask=real, other=0.0)
        summed = summed * fade[:, None] + part * weight[:, None]
        total = total * fade + weight
        top = higher
    saw = total > 0
    divisor = tl.where(saw, total, 1.0)
    place = head * rows + row
    tl.store(log_mass + place, tl.where(saw, top + tl.log(divisor), float("-inf")), mask=real_row)
    tl.store(output + place[:, None] * value_size + column[None, :], summed / divisor[:, None], mask=real)
