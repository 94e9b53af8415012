"""Reference queries: which they are, and that their attention is exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers import observation, randn, randn64
from keepkv import score
from keepkv.methods import expected_attention, keepkv_paper
from keepkv.observe.references import attend_all, context, window
from keepkv.ops.rope import Rotation
from keepkv.types import Observation


@pytest.mark.parametrize("group", [1, 2, 3, 5])
def test_references_are_the_same_rows_for_any_number_of_query_heads(group: int) -> None:
    """At most two heads a position are answered, at most three score; the 64 newest of all heads come on top."""
    seen = observation(tokens_read=100)
    seen = replace(seen, queries=randn(2, group, 100, 16, seed=3))
    made = context(seen)
    assert made.queries.shape[1] == len(made.visible) == made.outputs.shape[1] == min(group, 2) * 100 + group * 64
    share = replace(seen, references=made).rows(1).share(torch.arange(100))
    torch.testing.assert_close(share.sum(1), torch.ones(len(share)), rtol=1e-4, atol=0)
    torch.testing.assert_close(share @ seen.values[1], made.outputs[1], rtol=1e-4, atol=1e-5)


def test_rows_see_only_what_was_visible_to_them() -> None:
    """A window row asked at p gives no share to later tokens, and its shares up to p sum to 1."""
    observation = Observation(randn64(2, 50, 8), randn64(2, 50, 4), randn64(2, 3, 50, 8), torch.arange(50), torch.ones(4), 0.5)
    rows = replace(observation, references=window(observation, 10)).rows(1)
    share = rows.share(torch.arange(50))
    assert rows.visible.tolist() == [*range(41, 51)] * 3
    torch.testing.assert_close(share.sum(1), torch.ones(30), rtol=1e-5, atol=0)
    for row, seen in zip(share, rows.visible.tolist(), strict=True):
        assert row[seen:].eq(0).all()
        assert row[:seen].gt(0).all()


def test_rows_that_are_only_counted_do_not_change_the_answered_ones() -> None:
    queries, keys, values = randn64(2, 900, 8), randn64(2, 5000, 8, seed=1), randn64(2, 5000, 5, seed=2)
    whole, part = attend_all(queries, keys, values), attend_all(queries, keys, values, answered=100)
    torch.testing.assert_close(part.outputs, whole.outputs[:, :100])
    torch.testing.assert_close(part.log_z, whole.log_z[:, :100])
    assert torch.equal(part.rms_share, whole.rms_share)
    assert len(part.visible) == part.queries.shape[1] == 100


def test_attend_all_is_exact_attention() -> None:
    queries, keys, values = randn64(2, 900, 8), randn64(2, 5000, 8, seed=1), randn64(2, 5000, 5, seed=2)  # three tiles
    reference = attend_all(queries, keys, values)
    share = (queries @ keys.transpose(1, 2)).softmax(-1)
    torch.testing.assert_close(reference.outputs, share @ values)
    torch.testing.assert_close(reference.log_z, (queries @ keys.transpose(1, 2)).logsumexp(-1))
    torch.testing.assert_close(reference.rms_share, share.square().mean(1).sqrt())


def test_an_entry_of_p_votes_is_p_copies_to_references_and_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values, queries = (torch.randn(2, n, 16, generator=generator) for n in (60, 60, 40 * 3))
    votes = torch.randint(1, 5, (60,), generator=generator)
    queries = queries.reshape(2, 40, 3, 16).transpose(1, 2)
    known = {"rotation": Rotation.halves(torch.ones(8)), "scale": 0.25, "query_positions": torch.arange(100, 140)}
    copies = torch.arange(60).repeat_interleave(votes)
    first = (copies[:, None] < torch.arange(60)).sum(0)
    places = torch.arange(60).expand(2, -1)
    one = Observation(
        keys, values, queries, bias=votes.float().log().expand(2, -1), key_positions=places, read=140, **known
    )  # fmt: skip
    other = Observation(keys[:, copies], values[:, copies], queries, bias=torch.zeros(2, len(copies)),
                        key_positions=places[:, copies], read=140, **known)  # fmt: skip
    ours, theirs = context(one), context(other)
    torch.testing.assert_close(ours.outputs, theirs.outputs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.log_z, theirs.log_z)
    torch.testing.assert_close(ours.rms_share, votes * theirs.rms_share[:, first], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        score.output_change(Observation(**{**vars(one), "references": ours})),
        votes * score.output_change(Observation(**{**vars(other), "references": theirs}))[:, first], rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    for rule in (expected_attention.expected_attention, keepkv_paper.weighted_window):
        torch.testing.assert_close(rule(one), votes * rule(other)[:, first], rtol=1e-4, atol=1e-6)
