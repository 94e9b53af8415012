"""Compactor: unusual keys, and keys that their neighborhood attends to. arXiv 2507.08143."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import avg_pool1d

from keepkv.methods.base import Method
from keepkv.types import Observation

FIRST, NEWEST = 8, 4  # tokens that are always kept, and left out of all statistics


def leverage(observation: Observation, counted: Tensor, sketch: int = 48, ridge: float = 1e-2) -> Tensor:
    """l_i = x_i (XᵀX + .01 I)⁻¹ x_iᵀ, X the centered keys without their rotation, times a Gaussian matrix. [H, T].

    It is the leverage of token i: how badly the other keys could replace its key. The matrix is [d, 48], with a variance of
    1/48; keys of 48 dimensions or fewer are taken as they are. Compactor, arXiv 2507.08143.

    Args:
        observation: What the layer showed.
        counted: bool [H, T], the entries that count. What the others get means nothing.
        sketch: Columns of the Gaussian matrix.
        ridge: What is added to the diagonal.
    """
    heads, _, size = observation.keys.shape
    pairs = zip(observation.keys.float(), observation.positions, strict=True)
    plain = torch.stack([observation.rotation.rotate(keys, -positions) for keys, positions in pairs])
    mean = (plain * counted[..., None]).sum(1, keepdim=True) / counted.sum(1).clamp(min=1)[:, None, None]
    x = (plain - mean) * counted[..., None]
    if sketch < size:
        gaussian = torch.randn(heads, size, sketch, generator=observation.generator) / sketch**0.5
        x = x @ gaussian.to(x.device)
    gram = (x.mT @ x).double()
    gram.diagonal(dim1=-2, dim2=-1).add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(gram)
    x = x.double()
    if bool(failed.any()):  # keys so large that the ridge is lost beside them: the scores do not depend on the scale
        x = x / x.abs().amax((1, 2), keepdim=True).clamp(min=1e-300)
        gram = x.mT @ x
        gram.diagonal(dim1=-2, dim2=-1).add_(1e-9 * gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True) + 1e-300)
        factor = torch.linalg.cholesky(gram)
    solved: Tensor = torch.linalg.solve_triangular(factor, x.mT, upper=False)
    return solved.square().sum(1).float()


def neighborhood(observation: Observation, counted: Tensor, chunk: int = 256) -> Tensor:
    """c_i ||v_i||, mean over 3 neighbors, where c_i is the attention on token i within its chunk of 256, not causal. [H, T].

    c_i is the sum over the queries of the chunk of softmax(q·k) over its keys, also those behind the query; mean over the
    group.
    There is no factor on q·k, as in the authors' code, so the softmax is sharp. Where only a sample of a chunk's queries was
    kept, it stands for all: the keys of a chunk have a mean c of 1. Compactor, arXiv 2507.08143.

    Args:
        observation: What the layer showed.
        counted: bool [H, T], the entries that count; the others get 0.
        chunk: Tokens of a chunk; the first one starts behind the first tokens that are always kept.
    """
    end = observation.tokens - NEWEST
    edges = torch.tensor([*range(FIRST, end, chunk), end], device=observation.keys.device)
    asked = torch.searchsorted(observation.query_positions, edges).tolist()
    attention = torch.ones(observation.keys.shape[:2], device=observation.keys.device)
    for head, positions in enumerate(observation.positions):
        queries, keys = observation.queries[head].float(), observation.keys[head].float()
        bias = observation.head_bias(head)
        held = torch.searchsorted(positions.contiguous(), edges).tolist()
        for lo, hi, first, last in zip(held, held[1:], asked, asked[1:], strict=False):
            if lo == hi or first == last:  # where no query was kept, all keys count the same
                continue
            logits = queries[:, first:last] @ keys[lo:hi].T
            if bias is not None:
                logits += bias[lo:hi]
            attention[head, lo:hi] = logits.softmax(-1).mean((0, 1)) * (hi - lo)
    size: Tensor = vector_norm(observation.values.float(), dim=-1)
    return avg_pool1d((attention * size).where(counted, 0), 3, 1, 1).where(counted, 0)


def blended(observation: Observation, sketch: int = 48, blend: float | None = None) -> Tensor:
    """λ z(leverage) + z(attention within chunks); the first 8 tokens and the newest 4 get the best score. [H, T].

    Leverage is that of a key without its rotation among all keys, seen through a random matrix of 48 columns: how badly the
    other keys could replace it. Attention is what the tokens of a chunk of 256 pay each other, not causally, times the norm of
    the value, mean over 3 neighbors. z subtracts the mean over all heads and tokens of the layer, and divides by the standard
    deviation. λ is the share of the entries that the compression drops, as in kvpress' CompactorPress, which the paper's author
    wrote; .35 where that is not decided. Compactor, arXiv 2507.08143.

    Where this differs from that press: a last chunk that is not full is a softmax over its own keys only, and the Gaussian
    matrix is drawn from this library's seed. The author's engine, compactor-vllm, differs from his press: there leverage is
    computed for a chunk at a time, chunks of attention have 128 tokens, values do not count, and λ is .5.

    Args:
        observation: What the layer showed.
        sketch: As in `leverage`.
        blend: λ. None: see above.
    """
    positions = observation.positions
    counted = observation.present & (positions >= FIRST) & (positions < observation.tokens - NEWEST)
    if counted.sum() < 2:
        return torch.zeros(counted.shape, device=counted.device)
    if blend is None:
        held = sum(observation.counts) / observation.heads
        blend = 0.35 if observation.slots is None else max(0.0, 1 - observation.slots / held)

    def normal(x: Tensor) -> Tensor:
        own = x[counted]
        return (x - own.mean()) / own.std().clamp(min=1e-6)

    score = blend * normal(leverage(observation, counted, sketch)) + normal(neighborhood(observation, counted))
    return score.where(counted, score[counted].amax())


METHODS = (
    Method(
        name="compactor",
        summary="unusual keys, and keys that their neighborhood attends to",
        paper="Compactor, arXiv 2507.08143",
        score=blended,
        sinks=FIRST,
        recent=NEWEST,
        cost="attention within chunks of 256 tokens, and a 48 × 48 matrix per head",
        good="questions that come after the compression, without a repetition",
        bad="small budgets",
    ),
)
