"""Softmax: what a layer's softmax has beside scaled products and biases: capped logits, and sinks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Softmax:
    """How a layer makes shares A of the logits l = scale q·k and biases b, which are logarithms of votes, or masks.

        l' = c tanh(l / c)    A_j = exp(l'_j + b_j) / (exp(a) + sum_i exp(l'_i + b_i))

    The bias comes after the cap, so that a slot of w votes is w copies of its token here too. A sink is an entry without a key
    and a value, which all queries of a head see, and which no compression drops. `docs/theory.md 1.7`.

    Args:
        cap: c. None: l' = l. Gemma 2, arXiv 2408.00118, section 2.
        sinks: [H × G], the logit a of every query head's sink. None: there is none. gpt-oss, arXiv 2508.10925, section 2.2.
    """

    cap: float | None = None
    sinks: Tensor | None = None

    @classmethod
    def together(cls, several: Sequence[Softmax], heads: int) -> Softmax:
        """That of several layers that share keys, whose query heads of one KV head are one group. They have the same cap."""
        groups = [sinks for softmax in several if (sinks := softmax.of_groups(heads)) is not None]
        return cls(several[0].cap, torch.cat(groups, 1).flatten() if groups else None)

    @property
    def plain(self) -> bool:
        """Whether there is neither a cap nor a sink."""
        return self.cap is None and self.sinks is None

    def capped(self, logits: Tensor) -> Tensor:
        """l' of l."""
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap

    def of_groups(self, heads: int) -> Tensor | None:
        """The sinks of the query heads of every KV head, float32 or better [H, G]; None without sinks."""
        if self.sinks is None:
            return None
        return self.sinks.detach().to(torch.promote_types(self.sinks.dtype, torch.float32)).view(heads, -1)

    def of_head(self, heads: int, head: int, query: int) -> Softmax:
        """That of one query head, the `query`-th of a KV head's group."""
        sinks = self.of_groups(heads)
        return Softmax(self.cap, None if sinks is None else sinks[head, query])

    def of_rows(self, heads: int, rows: int) -> Tensor | None:
        """The sinks of the rows of every KV head, [H, R], where R = G × new rows stand query head by query head."""
        sinks = self.of_groups(heads)
        return None if sinks is None else sinks.repeat_interleave(rows // sinks.shape[1], 1)


PLAIN = Softmax()


def log_total(logits: Tensor, sinks: Tensor | None = None) -> Tensor:
    """ln(exp(a) + sum_i exp(l_i)) of logits [..., T] and sinks [...], which broadcast to it."""
    total = logits.logsumexp(-1)
    return total if sinks is None else torch.logaddexp(total, sinks.to(total.dtype).expand_as(total))


def shares(logits: Tensor, sinks: Tensor | None = None) -> Tensor:
    """exp(l_j) / (exp(a) + sum_i exp(l_i)) of logits [..., T] and sinks [...], which broadcast to them but for T."""
    return logits.softmax(-1) if sinks is None else (logits - log_total(logits, sinks)[..., None]).exp_()
