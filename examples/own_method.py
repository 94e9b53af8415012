"""A method of your own: one function for what is new, and a row that takes the rest from keepkv.

    keepkv fidelity book.txt --methods examples/own_method.py:LOUD,snapkv,keepkv --budgets 10%
    python examples/own_method.py examples/expedition-log.txt

LOUD keeps what the newest queries attend to, weighed by the size of its value, and shares a layer's slots among its heads.
"""

import sys

from keepkv import KeepCache, Method, allot, register
from keepkv.models import loading
from keepkv.observe.references import window_logits
from keepkv.text import file
from keepkv.types import Observation


def loud_share(observation: Observation, window: int = 32):
    """Mean share of the last 32 queries × ||v_i||_1, [H, T]."""
    share = window_logits(observation, window).softmax(-1).mean((1, 2))
    return share * observation.values.float().abs().sum(-1)


LOUD = register(
    Method("loud", "what the newest queries attend to × value size", "yours", loud_share, allot.within_layers, recent=32)
)


if __name__ == "__main__":
    model, tokenizer = loading.load()
    inputs = tokenizer(file.read_text(sys.argv[1]), return_tensors="pt")
    cache = KeepCache(model, budget="10%", method="loud")
    print(tokenizer.decode(model.generate(**inputs, past_key_values=cache, max_new_tokens=20)[0, -20:]))
    print(cache.report())
