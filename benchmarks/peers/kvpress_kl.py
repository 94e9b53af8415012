"""Fidelity of NVIDIA kvpress's presses on the stretches of `keepkv fidelity`: KL(full || compressed) on true text.

A stretch's context is read once. Each press then compresses that reading, by its own hook on every layer (or its own
scoring passes: KVzip, KVgrad, KVCompose), and the true continuation is fed in one pass at its true positions, under a
mask by order: every kept slot is visible, new tokens are causal among themselves. Slots that a press only marks
(`masked_key_indices`) are masked exactly, head by head; --check compares this with kvpress's own fake keys. Runs in
the environment of README.md. One JSON row per text, budget and press is appended to --output.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import kvpress as kp
import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

PRESSES = {
    "kvzip": kp.KVzipPress,
    "kvgrad": kp.KVgradPress,
    "kvcompose": kp.KVComposePress,
    "expected": kp.ExpectedAttentionPress,
    "adakv_expected": lambda: kp.AdaKVPress(kp.ExpectedAttentionPress()),
    "critical_adakv_expected": lambda: kp.CriticalAdaKVPress(kp.ExpectedAttentionPress(use_vnorm=False)),
    "adakv_snapkv": lambda: kp.AdaKVPress(kp.SnapKVPress()),
    "snapkv": kp.SnapKVPress,
    "adakv_snapkv_w16": lambda: kp.AdaKVPress(kp.SnapKVPress(window_size=16)),
    "snapkv_w16": lambda: kp.SnapKVPress(window_size=16),
    "pyramidkv": kp.PyramidKVPress,
    "compactor": kp.CompactorPress,
    "tova": kp.TOVAPress,
    "keydiff": kp.KeyDiffPress,
    "streaming_llm": kp.StreamingLLMPress,
}
OWN_PASSES = (kp.KVzipPress, kp.KVComposePress)  # KVgrad is a KVzipPress


class Bench:
    """One model, and the reading of one context at a time."""

    def __init__(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
        self.model.requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.modules = [layer.self_attn for layer in self.model.model.layers]
        self.explicit, self.fake_keys = False, False
        for module in self.modules:
            module.rotary_emb, module.masked_key_indices = self.model.model.rotary_emb, None
            module.register_forward_pre_hook(self._mask, with_kwargs=True)

    def _mask(self, module, args, kwargs):
        if not self.explicit:
            return None
        new, slots = kwargs["hidden_states"].shape[1], kwargs["past_key_values"].layers[module.layer_idx].keys.shape[2]
        mask = torch.full((1, 1, new, slots + new), -torch.inf).triu(slots + 1)
        if module.masked_key_indices is not None and not self.fake_keys:
            (rows, heads, masked), module.masked_key_indices = module.masked_key_indices, None
            mask = mask.repeat(1, module.config.num_key_value_heads, 1, 1)
            mask[rows, heads, :, masked] = -torch.inf
            mask = mask.repeat_interleave(module.num_key_value_groups, dim=1)
        return args, {**kwargs, "attention_mask": mask}

    def read(self, context: torch.Tensor) -> None:
        """Prefills once, and keeps what the presses' hooks get."""
        self.context, self.full, self.calls = context, DynamicCache(), {}
        keep = lambda module, args, kwargs, output: self.calls.update({module.layer_idx: kwargs})  # noqa: E731
        hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in self.modules]
        self.model.model(input_ids=context, past_key_values=self.full)
        [hook.remove() for hook in hooks]

    def fresh(self) -> DynamicCache:
        """A copy of the full cache, with no slot masked."""
        cache = DynamicCache()
        for module, layer in zip(self.modules, self.full.layers, strict=True):
            module.masked_key_indices = None
            cache.update(layer.keys, layer.values, module.layer_idx)
        return cache

    def prepare(self, name: str):
        """The press, having made its scoring passes if it has any (they depend on no budget)."""
        torch.manual_seed(0)
        press = PRESSES[name]()
        if isinstance(press, kp.KVzipPress):  # what its context manager does, for a context without a chat prefix
            press.prefix_length, press._context_ids, press._cache = 0, self.context, self.fresh()
            press._suffix_ids = self.tokenizer.encode("\n", return_tensors="pt", add_special_tokens=False)
            press.compress_post = lambda model: None
            press._perform_kvzip_compression(self.model, self.tokenizer)
        elif isinstance(press, kp.KVComposePress):
            press._reset_state = press.prepare_important_masks = lambda: None
            press.compress_cache = lambda model: None  # done by `compress`, once per budget
            with press(self.model):
                self.model.model(input_ids=self.context, past_key_values=DynamicCache())
        return press

    def compress(self, press, ratio: float) -> DynamicCache:
        torch.manual_seed(0)
        cache, press = self.fresh(), copy.copy(press)
        press.compression_ratio = ratio
        if isinstance(press, kp.KVzipPress):
            type(press).compress_post(press, self.model)
        elif isinstance(press, kp.KVComposePress):
            press.cache = cache
            type(press).prepare_important_masks(press)
            type(press).compress_cache(press, self.model)
        else:
            press.post_init_from_model(self.model)
            for module in self.modules:
                press.forward_hook(module, [], {**self.calls[module.layer_idx], "past_key_values": cache}, [None, None])
        return cache

    def share_kept(self, cache: DynamicCache) -> float:
        """Share of the context's slots that are visible."""
        slots = sum(layer.keys.shape[1] * layer.keys.shape[2] for layer in cache.layers)
        masked = sum(len(m.masked_key_indices[0]) for m in self.modules if m.masked_key_indices is not None)
        return (slots - masked) / sum(layer.keys.shape[1] * layer.keys.shape[2] for layer in self.full.layers)

    def logits(self, cache: DynamicCache, future: torch.Tensor, fake_keys: bool = False) -> torch.Tensor:
        """Logits after each new token. The cache is used up."""
        positions = torch.arange(future.shape[1])[None] + self.context.shape[1]
        any_mask = torch.zeros(1, 1, future.shape[1], 1)  # so that transformers makes none; `_mask` replaces it
        self.explicit, self.fake_keys = True, fake_keys
        try:
            return self.model(future, attention_mask=any_mask, past_key_values=cache, position_ids=positions).logits[0]
        finally:
            self.explicit = False


def check(bench: Bench, stretch: torch.Tensor, size: int, names: list[str]) -> None:
    """Prints how far the continuation is from a plain reading, and what later tokens change in earlier logits."""
    context, future = stretch[:, :-size], stretch[:, -size:]
    bench.read(context)
    error = bench.logits(bench.fresh(), future) - bench.model(stretch, logits_to_keep=size, use_cache=False).logits[0]
    print(f"no compression, against one pass: largest difference of a logit {float(error.abs().max()):.1e}")
    altered, half = torch.cat([future[:, : size // 2], future[:, size // 2 :].flip(1).roll(7)], dim=1), size // 2
    for name in names:
        press = bench.prepare(name)
        logits_of_press = bench.logits(bench.compress(press, 0.9), future)
        differences = {"leak": bench.logits(bench.compress(press, 0.9), altered)[:half] - logits_of_press[:half]}
        differences["fake keys"] = bench.logits(bench.compress(press, 0.9), future, fake_keys=True) - logits_of_press
        if not isinstance(press, OWN_PASSES):
            again, press.compression_ratio = DynamicCache(), 0.9
            torch.manual_seed(0)
            with press(bench.model):
                bench.model.model(input_ids=context, past_key_values=again)
            differences["context manager"] = bench.logits(again, future) - logits_of_press
        print(name, {key: f"{float(x.abs().max()):.1e}" for key, x in differences.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--segments", type=Path, required=True, help="what dump_segments.py wrote")
    parser.add_argument("--output", type=Path, help="JSON lines, appended to")
    parser.add_argument("--budgets", type=float, nargs="+", default=[10, 5, 2], help="percent of slots kept")
    parser.add_argument("--presses", nargs="+", default=list(PRESSES), choices=list(PRESSES))
    parser.add_argument("--check", action="store_true", help="check the first stretch instead of measuring")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    bench, data = Bench(args.model), json.loads(args.segments.read_text())
    size = data["continuation"]
    if args.check:
        check(bench, torch.tensor(next(iter(data["texts"].values()))[:1]), size, args.presses)
    for text, stretches in ({} if args.check else data["texts"]).items():
        rows: dict = {}
        for stretch in torch.tensor(stretches)[:, None]:
            future, truth = stretch[:, -size:], stretch[0, 1 - size :]
            bench.read(stretch[:, :-size])
            full = bench.logits(bench.fresh(), future)[:-1].log_softmax(-1)
            for name in args.presses:
                try:
                    start = time.perf_counter()
                    press, prepared = bench.prepare(name), time.perf_counter() - start
                    for budget in args.budgets:
                        start = time.perf_counter()
                        cache = bench.compress(press, 1 - budget / 100)
                        seconds, share_kept = prepared + time.perf_counter() - start, bench.kept(cache)
                        logits_of_press = bench.logits(cache, future)[:-1].log_softmax(-1)
                        kl = float(kl_div(logits_of_press.double(), full.double(), reduction="batchmean", log_target=True))
                        delta = float(cross_entropy(logits_of_press, truth) - cross_entropy(full, truth))
                        top1 = float((logits_of_press.argmax(-1) == full.argmax(-1)).float().mean())
                        rows.setdefault((name, budget), []).append((kl, delta, top1, seconds, share_kept))
                        print(f"{text}: {name} at {budget:g}%: KL {kl:.3f}", flush=True)
                except Exception as error:  # one press's failure is recorded, and the others go on
                    print(f"{text}: {name} failed: {error!r}", flush=True)
        with args.output.open("a") as file:
            for (name, budget), samples in rows.items():
                row = {"text": text, "context": data["context"], "budget": f"{budget:g}%", "press": name}
                for key, column in zip(("kl", "delta_nll", "top1", "seconds", "kept"), zip(*samples, strict=True), strict=True):
                    row[key] = statistics.fmean(column)
                file.write(json.dumps(row | {"kl_per_segment": [sample[0] for sample in samples]}) + "\n")


if __name__ == "__main__":
    main()
