"""Expected Attention against sampling."""

from __future__ import annotations

import torch

from helpers import observation
from keepkv.methods import expected_attention


def test_expected_attention_is_the_mean_over_gaussian_queries() -> None:
    """Against sampling: queries drawn from the fitted Gaussian, rotated by the mean rotation, attention averaged."""
    seen = observation(tokens_read=40)
    got = expected_attention.expected_attention(seen) / seen.values.norm(dim=-1)
    plain = seen.rotation.rotate(seen.queries, -seen.query_positions)[:, :, 4:] * seen.scale
    ahead = torch.arange(40, 40 + 512).double()[:, None] * seen.rotation.frequencies.double()
    cos, sin = ahead.cos().mean(0).float(), ahead.sin().mean(0).float()
    for head in range(2):
        share = torch.zeros(40)
        for group in range(3):
            sample = plain[head, group]
            normal = torch.distributions.MultivariateNormal(
                sample.mean(0), torch.cov(sample.T, correction=0) + 1e-6 * torch.eye(16)
            )
            torch.manual_seed(0)
            drawn = normal.sample((200_000,))
            turned = torch.cat((drawn[:, :8] * cos - drawn[:, 8:] * sin, drawn[:, 8:] * cos + drawn[:, :8] * sin), -1)
            share[4:] += (turned @ seen.keys[head, 4:].T).exp().mean(0).log().softmax(0) / 3
        torch.testing.assert_close(got[head], share, rtol=0.05, atol=1e-3)
