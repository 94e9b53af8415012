"""Copying heads: the KV heads whose keys say where in a text a question's answer stands, found without training.

A head that copies attends from a token to what came after the same token before: it knows where to look (Olsson et al., arXiv
2209.11895, "Induction heads"). On random tokens there is nothing else to know, so a random sequence that stands there twice
tells these heads apart. RTPurbo (arXiv 2605.16928) finds its retrieval heads with a needle that is placed twice.
"""

from __future__ import annotations

import contextlib
import json

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keepkv import paths, schema
from keepkv.cache import KeepCache
from keepkv.models import identity
from keepkv.ops.softmax import shares
from keepkv.types import CopyingHead, Observation

TOKENS = 256  # of the sequence
_VERSION = 1  # of what is remembered: raise it when the same model gets other shares


def copying_heads(model: PreTrainedModel, seed: int = 0) -> tuple[CopyingHead, ...]:
    """Every KV head of the layers with full attention, by how much it copies, the most first.

    A KV head counts as its best query head does. Its keys are what is looked up, and one query head that knows where to look is
    enough for that; a mean over the group would rank a head lower because others of its group do something else.

    The same model and seed give the same heads. What was found is remembered in the cache folder by the model's identity, so
    that a model is asked once. Where that folder cannot be written to, it is asked again.

    Args:
        model: Any supported model.
        seed: Of the random sequence.

    Returns:
        One for each KV head, sorted by share.

    Raises:
        ModelError: for a model that is not supported.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3)).eval()
        >>> len(copying_heads(model))
        6
    """
    whose = json.dumps([_VERSION, TOKENS, seed, identity.of_model(model)], sort_keys=True)
    file = paths.cache_folder() / "copying-heads" / f"{identity.digest(whose.encode())}.json"
    with contextlib.suppress(OSError, ValueError):
        return tuple(_head(values) for values in json.loads(paths.read_file(file)))
    heads = measure_heads(model, seed)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        paths.write_file(file, json.dumps(heads))
    return heads


def _head(values: object) -> CopyingHead:
    """A head as it is remembered. Raises ValueError."""
    layer, head, share, query = schema.sequence(values, len(CopyingHead._fields))
    return CopyingHead(schema.whole(layer), schema.whole(head), schema.number(share), schema.whole(query))


@torch.no_grad()
def measure_heads(model: PreTrainedModel, seed: int = 0) -> tuple[CopyingHead, ...]:
    """As `copying_heads`, but nothing is remembered."""
    ids = twice(model, seed).to(model.device)
    cache = KeepCache(model, "100%", "full", auto=False, references=ids.shape[1])
    model(ids, past_key_values=cache, logits_to_keep=cache.last_logits)
    heads = []
    for layer, observation in enumerate(cache.observations()):
        shares = copied(observation)
        best = shares.max(1)
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        heads += [CopyingHead(layer, head, round(share, 6), query) for head, (share, query) in enumerate(pairs)]
    return tuple(sorted(heads, key=lambda head: (-head.share, head.layer, head.head)))


def twice(model: PreTrainedModel, seed: int = 0) -> Tensor:
    """A random sequence of token ids that stands there twice, int64 [1, 1 + 2 TOKENS].

    Before it stands the token that a text begins with, or another one: what has nothing to attend to attends to the first
    token. Special tokens are not drawn.
    """
    config = model.config.get_text_config(decoder=True)
    special: set[int] = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        special.update(value if isinstance(value, list) else [] if value is None else [value])
    ordinary = torch.tensor([token for token in range(config.vocab_size) if token not in special])
    drawn = torch.randint(len(ordinary), (1 + TOKENS,), generator=torch.Generator().manual_seed(seed))
    first, sequence = ordinary[drawn[:1]], ordinary[drawn[1:]]
    if isinstance(config.bos_token_id, int):
        first = torch.tensor([config.bos_token_id])
    return torch.cat([first, sequence, sequence])[None]


def copied(observation: Observation) -> Tensor:
    """The mean share that the second half's queries pay to the token after their own one's earlier place, [H, G]."""
    size = (observation.tokens - 1) // 2
    asking = torch.arange(size + 1, observation.tokens - 1, device=observation.keys.device)  # the last token has no next one
    queries = observation.queries[:, :, asking].float() * observation.scale
    logits = observation.softmax.capped(queries @ observation.keys.float()[:, None].mT)  # [H, G, n, T]
    sinks = observation.softmax.of_groups(observation.heads)
    later = torch.arange(observation.tokens, device=asking.device) > asking[:, None]
    paid = shares(logits.masked_fill_(later, -torch.inf), None if sinks is None else sinks[..., None])
    target = (asking - size + 1)[:, None].expand(*paid.shape[:2], -1, 1)
    return paid.gather(-1, target)[..., 0].mean(-1)
