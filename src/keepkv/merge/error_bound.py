"""Error bound: how far merging by predicted scores can move an output, and how far it does. KeepKV, arXiv 2504.09936.

A set C merges into slot r with v_r = sum ŝ_i v_i / Ŵ, P votes, and a key k_r such that P exp(q·k_r) = Ŵ = sum ŝ_i for the query
that was predicted. For any other query the true scores are s_i = exp(q·k_i) and s_r = exp(q·k_r), and ŝ_r = Ŵ/P. Then the merge
is exactly a reweighting of the tokens (`docs/theory.md 3.2`): o' = sum ρ_i s_i v_i / sum ρ_i s_i with

    ln ρ_i = δ_i - D_r,  δ_i = ln(ŝ_i/s_i) the source's log error,  D_r = ln(ŝ_r/s_r) the slot's own;  ρ = 1 elsewhere.

Every bound here follows from that, so it holds for all disjoint sets of one step together, not only for one merge. It needs
one step (sources with one vote each), exact scores of all that is not merged, and nothing dropped. What is dropped changes the
output by up to its share of the attention × γ more, γ then reaching its values too. A prediction is one per KV head, while
scores are each query head's own: the differences within a group are part of δ.

D = λ sum π̂_i δ_i for ZIP, and D = sum θ_i δ_i for the convex-exact key (π̂ and θ are convex weights). Hence the paper's ε, which
is taken over the sources, covers the slot too if 0 <= λ <= 1 or the key is convex-exact. Near λ's pole it does not
(`docs/theory.md 3.3`). For ε < 1 the change is at most γ tanh(h/4), where h is the span of ln ρ (`docs/theory.md 3.4`):

    convex-exact, or 0 <= λ <= 1                            h <= 4 artanh ε:            ε γ
    guarded ZIP, 1/2 <= λ <= 3/2                            h <= 5 artanh ε:            γ tanh(1.25 artanh ε)
    0 <= λ <= 3 in all sets, or -3 <= λ <= 0 in all sets    h <= 8 artanh ε:            2ε/(1+ε²) γ
    -3 <= λ <= 3, signs mixed                               h <= ln(1+ε) - 7 ln(1-ε):   γ tanh(h/4)

All of these are less than the paper states. So the stated bound holds for `methods.keepkv_paper.zip_merge` and for
`convex_exact_merge`, though its proof has a gap.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from keepkv.attend.states import exact
from keepkv.merge.merged import Merged


class Bounds(NamedTuple):
    """Upper bounds on ||o' - o|| for every query, [R]: inf where there is none. Only `paper` can be wrong.

    Attributes:
        paper: With ε over the sources, as stated. See `stated`.
        corrected: With ε over the sources and their slots.
        reweighted: From ρ itself; always finite, and at most γ. See `reweighted`.
    """

    paper: Tensor
    corrected: Tensor
    reweighted: Tensor


def bounds(queries: Tensor, keys: Tensor, values: Tensor, merged: Merged, predicted: Tensor, target: Tensor) -> Bounds:
    """The three bounds on what a merge changes.

    Args:
        queries: [R, d], scaled.
        keys: [T, d].
        values: [T, d_v].
        merged: What the merge made of them.
        predicted: [T], ln ŝ.
        target: int64 [T], every token's slot; see `change`.
    """
    tokens = (target >= 0).nonzero().flatten()
    several = torch.bincount(target[tokens], minlength=len(merged.keys)) > 1
    sources = tokens[several[target[tokens]]]
    if not len(sources):
        return Bounds(*queries.new_zeros(3, len(queries)))
    error = predicted[sources] - queries @ keys[sources].T  # δ [R, m]
    own = deviation(queries, merged, predicted, target)[:, target[sources]]  # D [R, m]
    gamma = reach(values[sources], values[tokens])
    epsilon, own_epsilon = (x.expm1().abs().amax(1) for x in (error, own))
    ratio = error - own  # ln ρ
    if len(sources) < len(tokens):
        ratio = torch.cat([ratio, ratio.new_zeros(len(queries), 1)], 1)
    return Bounds(
        stated(epsilon, gamma),
        stated(torch.maximum(epsilon, own_epsilon), gamma),
        reweighted(ratio.amax(1) - ratio.amin(1), gamma),
    )


def stated(epsilon: Tensor, gamma: Tensor) -> Tensor:
    """2 ε (1 + ε) γ / (1 - ε)², inf unless ε < 1: |1 - ŝ/s| <= ε over sources and slots. `docs/theory.md 3.3`.

    It follows from |ρ - 1| <= 2ε/(1-ε), ρ >= (1-ε)/(1+ε) and, A the true shares,
    o' - o = sum A_i (ρ_i - 1)(v_i - o) / sum A_i ρ_i.
    """
    return torch.where(epsilon < 1, 2 * epsilon * (1 + epsilon) * gamma / (1 - epsilon) ** 2, torch.inf)


def reweighted(spread: Tensor, gamma: Tensor) -> Tensor:
    """γ tanh(h/4), h = max ln ρ - min ln ρ over all tokens: the most that such weights can move a mean. `docs/theory.md 3.4`.

    It is tight: reached where a share 1/(1 + e^(h/2)) of the attention is multiplied by e^h.
    """
    return gamma * (spread / 4).tanh()


def reach(sources: Tensor, values: Tensor) -> Tensor:
    """γ, the largest ||v_j - v_i|| with v_i [m, d_v] of a merged token and v_j [t, d_v] of any."""
    return torch.cdist(sources, values, compute_mode="donot_use_mm_for_euclid_dist").max()


def deviation(queries: Tensor, merged: Merged, predicted: Tensor, target: Tensor) -> Tensor:
    """D_r = ln(ŝ_r/s_r) = ln(Ŵ/P) - q·k_r of every slot, [R, n], ŝ_r what the merge was made for. `docs/theory.md 3.2`."""
    tokens = (target >= 0).nonzero().flatten()
    slot = target[tokens]
    score = predicted[tokens]
    top = score.new_full((len(merged.keys),), -torch.inf).scatter_reduce(0, slot, score, "amax")
    log_mass = top + score.new_zeros(len(top)).index_add(0, slot, (score - top[slot]).exp()).log()  # ln Ŵ
    return (log_mass - merged.bias) - queries @ merged.keys.T


def change(queries: Tensor, keys: Tensor, values: Tensor, merged: Merged, target: Tensor) -> Tensor:
    """How far a merge moves the outputs: ||o' - o||, o over the tokens and o' over the slots and their votes.

    `docs/theory.md 3.2`.

    Args:
        queries: [R, d], scaled.
        keys: [T, d].
        values: [T, d_v].
        merged: What the merge made of them.
        target: int64 [T], every token's slot, as `merge.similarity.nearest_kept` gives it. Tokens of -1, which are dropped,
            are not part of o.

    Returns:
        [R].
    """
    stay = target >= 0
    before, _ = exact(queries, keys[stay], values[stay], keys.new_zeros(int(stay.sum())), 1.0)
    after, _ = exact(queries, merged.keys, merged.values, merged.bias, 1.0)
    norm: Tensor = vector_norm(after - before, dim=-1)
    return norm
