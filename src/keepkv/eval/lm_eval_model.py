"""keepkv as a model of lm-evaluation-harness: a request's context is compressed, then its continuation is scored or written.

    python -m keepkv.eval.lm_eval_model --model keepkv --model_args model=smollm2,method=keepkv,budget=10% --tasks piqa

takes what the harness's own command takes (`pip install 'keepkv[lm-eval]'`); in Python, importing this module registers the
model. Contexts contain their questions, so that this is question-aware; those too short for the budget stay whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from torch import Tensor
from tqdm import tqdm

from keepkv.budget import Budget
from keepkv.cache import KeepCache
from keepkv.errors import BudgetError, InputError
from keepkv.methods import get
from keepkv.models import families, loading
from keepkv.text.ask import generation


@register_model("keepkv")
class KeepKV(TemplateLM):  # type: ignore[misc]
    """One request after the other, each with a cache of its own; requests with the same context share its compression.

    Args:
        model: As at keepkv's command line, and so are `method`, `budget`, `device` and `dtype`.
        seed: Of the compression.
        least: Contexts of fewer tokens stay whole.
        max_gen_toks: Tokens of an answer at most, where the task does not say.
        batch_size: 1; keepkv answers one request at a time.

    Raises:
        InputError: for an unknown argument, or another batch size.
        KeepKVError: for a method, a budget or a model that cannot be used.
    """

    def __init__(
        self,
        model: str = "smollm2",
        method: str = "keepkv",
        budget: str | float = "10%",
        device: str = "auto",
        dtype: str = "auto",
        seed: int = 0,
        least: int = 64,
        max_gen_toks: int = 256,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            known = "model, method, budget, device, dtype, seed, least, max_gen_toks"
            raise InputError(f"--model_args has an unknown argument {sorted(unknown)[0]!r}: expected some of {known}")
        if str(batch_size) not in ("1", "auto"):
            raise InputError(f"batch_size={batch_size} is not supported: keepkv answers one request at a time, use 1")
        self.method = get(method)
        self.budget = Budget.parse(budget)
        self.least = int(least)
        self.seed = int(seed)
        self.max_gen_toks = int(max_gen_toks)
        unset = device is None or (str(device).startswith("cuda") and not torch.cuda.is_available())  # its own default
        self.model, self._tokenizer = loading.load(model, "auto" if unset else str(device), dtype)
        self._name = model
        self._last: tuple[tuple[int, ...], KeepCache, Tensor] | None = None
        self.kept: list[float] = []  # for every context, the compressed cache's share of the full cache's bytes

    @property
    def eot_token_id(self) -> int:
        return int(self._tokenizer.eos_token_id)

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids: list[int] = self._tokenizer(string, add_special_tokens=bool(add_special_tokens), verbose=False)["input_ids"]
        return ids

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of each (context, continuation): Σ log p of the continuation, and whether greedy decoding would write it."""
        answers = []
        for (context, continuation), before, after in tqdm(requests, disable=disable_tqdm, desc="keepkv"):
            cache, first = self._read(before or [self.prefix_token_id])
            target = torch.tensor([after], device=self.model.device)
            logits = first
            if len(after) > 1:
                logits = torch.cat([first, self.model(target[:, :-1], past_key_values=cache).logits[0]])
            log_probs = logits.float().log_softmax(-1)
            total = float(log_probs.gather(1, target[0, :, None]).sum())
            is_greedy = bool((log_probs.argmax(-1) == target[0]).all())
            answers.append((total, is_greedy))
            self.cache_hook.add_partial("loglikelihood", (context, continuation), answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Σ log p of a whole text. There is no context to compress, so that a text longer than the model is refused."""
        texts = [request.args[0] for request in requests]
        whole_texts = [(("", text), [self.prefix_token_id], self.tok_encode(text)) for text in texts]
        limit = families.trained_length(self.model)
        if limit and any(len(tokens) >= limit for _, _, tokens in whole_texts):
            raise InputError(
                f"a text has more than the {limit:,} tokens that the model was trained for, and keepkv's harness model "
                "does not split texts into windows: give shorter texts, or a model with a longer context"
            )
        return [total for total, _ in self._loglikelihood_tokens(whole_texts, disable_tqdm)]

    @torch.inference_mode()
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, cut before the first of the task's stop words."""
        answers = []
        for request in tqdm(requests, disable=disable_tqdm, desc="keepkv"):
            context, settings = request.args
            stops = settings.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            if settings.get("do_sample") or (settings.get("temperature") or 0) > 0:
                raise InputError(
                    "the task samples its answers, and keepkv's harness model decodes greedily: "
                    "give --gen_kwargs do_sample=false,temperature=0, or leave the task out"
                )
            ids = self.tok_encode(context)
            cache, first = self._read(ids)
            eos = generation(self.model, self._tokenizer, 1).eos_token_id
            ends = {self.eot_token_id, *([eos] if isinstance(eos, int) else eos or [])}
            limit = int(settings.get("max_gen_toks") or self.max_gen_toks)
            words: list[int] = []
            text = ""
            logits = first
            while len(words) < limit:
                word = int(logits[-1].argmax())
                if word in ends:
                    break
                words.append(word)
                text = str(self._tokenizer.decode(words, skip_special_tokens=True))
                if any(stop and stop in text for stop in stops):
                    break
                logits = self.model(torch.tensor([[word]], device=self.model.device), past_key_values=cache).logits[0]
            for stop in stops:
                text = text.split(stop)[0] if stop else text
            answers.append(text)
            self.cache_hook.add_partial("generate_until", request.args, text)
        return answers

    def _read(self, ids: list[int]) -> tuple[KeepCache, Tensor]:
        """A compressed cache that has read the context, and the logits [1, vocabulary] of what comes next."""
        key = tuple(ids)
        if self._last is None or self._last[0] != key:
            tokens = torch.tensor([ids], device=self.model.device)
            cache = KeepCache(self.model, self.budget, self.method, seed=self.seed, auto=False)
            logits = self.model(tokens, past_key_values=cache, logits_to_keep=cache.last_logits).logits[0]
            if self.method.repeat is not None and self.method.repeat.needed:
                cache.repeat(self.model, tokens, None, self.method.repeat)
            try:
                cache.compress("100%" if len(ids) < self.least else self.budget)
            except BudgetError:
                cache.compress("100%")
            report = cache.report()
            self.kept.append(report.kv_bytes / max(1, report.kv_bytes_full))
            self._last = key, cache, logits
        _, cache, logits = self._last
        return cache.fork(), logits


def main() -> None:
    """The harness's own command, with the model keepkv known to it."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
