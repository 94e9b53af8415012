"""A method of your own: one function for what is new, and the rest from keepkv.

    python examples/own_method.py examples/expedition-log.txt
    keepkv fidelity book.txt --methods examples/own_method.py:LOUD,snapkv,keepkv --budgets 10%

LOUD keeps what the newest queries attend to, weighted by the size of its value, and shares each layer's slots among its heads.
"""

import sys

from torch import Tensor

from keepkv import KeepCache, Method, allot, register
from keepkv.models import loading
from keepkv.observe.references import window_logits
from keepkv.text import file
from keepkv.types import Observation


def loud_share(observation: Observation) -> Tensor:
    """Mean share of the last 32 queries times ||v_i||_1, [heads, tokens]: the more, the rather it is kept."""
    share = window_logits(observation, 32).softmax(-1).mean((1, 2))
    return share * observation.values.float().abs().sum(-1)


LOUD = register(  # so that its name can stand for it
    Method(
        name="loud",
        summary="what the newest queries attend to × value size",
        paper="yours",
        score=loud_share,
        allot=allot.within_layers,
        recent=32,  # the newest tokens are kept whatever they score
    )
)


if __name__ == "__main__":
    model, tokenizer = loading.load()
    inputs = tokenizer(file.read_text(sys.argv[1]), return_tensors="pt")
    cache = KeepCache(model, budget="10%", method="loud")
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=20)
    print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :]))
    print(cache.report())
