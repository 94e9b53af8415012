"""vLLM's attention over pages with votes, on any device: asked for by --attention-backend CUSTOM. On a CPU see cpu.py."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder, AttentionType, MultipleOf
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout

from keepkv.errors import InputError
from keepkv.methods import Method
from keepkv.models import families
from keepkv.observe.watch import Watch
from keepkv.serving.paged import Lot, Pages, step, watcher
from keepkv.serving.settings import Settings
from keepkv.serving.vllm.kv_cache_spec import KeptSpec

logger = init_logger(__name__)


class _Asked(NamedTuple):
    """Of the engine whose model was built last in this process: its settings, and its tokens in unsettled steps at most.

    vLLM asks the backend's class for a page format without saying for which engine.
    """

    settings: Settings | None = None
    in_flight: int = 0


_asked = [_Asked()]


def asked() -> bool:
    """Whether the engine whose model is being built asks for keepkv; notes its settings. Raises InputError."""
    config = get_current_vllm_config_or_none()
    settings = Settings.read(config.additional_config) if config is not None else None
    if config is None or settings is None:
        _asked[0] = _Asked()
        return False
    parallel = config.parallel_config
    for trouble, name in (
        (config.speculative_config is not None, "speculative decoding"),
        (config.kv_transfer_config is not None, "a KV connector"),
        (parallel.decode_context_parallel_size > 1, "decode context parallelism"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism"),
        (config.cache_config.cache_dtype not in ("auto", "bfloat16", "float16", "float32"), "a quantized KV cache"),
    ):
        if trouble:
            raise InputError(f"keepkv does not work with {name} yet: leave one of the two out")
    most = getattr(config, "max_in_flight_tokens", None) or 2 * config.scheduler_config.max_num_batched_tokens
    _asked[0] = _Asked(settings, most)
    return True


class Part(NamedTuple):
    """One request's share of a step: its tokens first to last of the batch, those computed before, its pages."""

    first: int
    last: int
    before: int
    table: Tensor


class Batch(NamedTuple):
    """A step's requests, and what all layers have in common."""

    parts: list[Part]
    settings: Settings
    row: Method
    inv_freq: Tensor

    @classmethod
    def of(cls, told: Any, settings: Settings, inv_freq: Tensor) -> Batch:
        """From vLLM's CommonAttentionMetadata."""
        bounds, seen = told.query_start_loc_cpu.tolist(), told.seq_lens.tolist()
        parts = [
            Part(first, last, length - (last - first), table)
            for first, last, length, table in zip(bounds, bounds[1:], seen, told.block_table_tensor, strict=False)
            if last > first
        ]
        return cls(parts, settings, settings.row, inv_freq)


class Pagewise:
    """Of a backend: keepkv's pages for layers of full attention, if they were asked for; others keep what they have."""

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return _asked[0].settings is None

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        settings, in_flight = _asked[0]
        if settings is None or type(spec) is not FullAttentionSpec or spec.sliding_window is not None:
            return spec
        return KeptSpec.of(spec, settings, in_flight)


class Keeping:
    """Of a layer's attention: what it does over keepkv's pages. What it has observed of a request is kept here, under the
    request's first page, which is the request's own as long as it runs."""

    head_size: int
    scale: float

    def start(self) -> None:
        config = get_current_vllm_config_or_none()
        assert config is not None, "vLLM builds models in a configuration"
        self.watches: OrderedDict[int, tuple[int, Watch]] = OrderedDict()
        self.most_watched = 2 * config.scheduler_config.max_num_seqs

    def keep(self, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """Writes new keys and values [n, H, d] to their cells."""
        count = min(len(slot_mapping), len(key))
        self._pages(kv_cache).write(slot_mapping[:count].long(), key[:count], value[:count])

    def attend(self, name: str, query: Tensor, kv_cache: Tensor, batch: Batch, output: Tensor) -> Tensor:
        """A step of every request: query [n, H_q, d] of all of them together, the output written into `output`."""
        lot = Lot(batch.settings, batch.row, self.scale, batch.inv_freq)
        pages, index = self._pages(kv_cache), extract_layer_index(name)
        for first, last, before, table in batch.parts:
            request = int(table[0])
            seen, watch = self.watches.pop(request, (0, None)) if before else (0, None)
            if watch is None or seen != before:
                watch = watcher(lot, index)
            made, watch = step(pages, table, query[first:last], before, lot, watch)
            output[first:last] = made.reshape(output[first:last].shape)
            self.watches[request] = before + last - first, watch
        while len(self.watches) > self.most_watched:
            self.watches.popitem(last=False)
        return output

    def _pages(self, kv_cache: Tensor) -> Pages:
        return Pages.of(kv_cache, self.head_size, self.head_size)


def refuse_odd(**features: object) -> None:
    """Raises InputError for a layer of full attention with something that a vote does not go with."""
    odd = [name.replace("_", " ") for name, has in features.items() if has]
    if odd:
        raise InputError(f"keepkv does not serve models with {odd[0]}")


def frequencies(vllm_config: Any, device: torch.device) -> Tensor:
    """Rotary frequencies float32 [r/2] of the model, from its configuration. Raises ModelError for families not supported."""
    config = vllm_config.model_config.hf_text_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    families.check_supported(model)
    return families.inv_freq(type(families.rotary(model))(config)).to(device)


def tell(settings: Settings) -> None:
    logger.info_once(
        "keepkv: %s keeps %d slots of every head and the newest %d to %d tokens; prefix caching does not apply to them",
        settings.method, settings.budget, settings.window, settings.window + settings.step,
    )  # fmt: skip


class KeepBackend(Pagewise, AttentionBackend):
    """For models whose layers all have full attention. The compact part is read by attention.py's kernel for the device."""

    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_impl_cls() -> type[KeepImpl]:
        if not asked():
            raise InputError("the attention backend is keepkv's, but additional_config has no settings for it")
        return KeepImpl

    @staticmethod
    def get_builder_cls() -> type[KeepBuilder]:
        return KeepBuilder


class KeepBuilder(AttentionMetadataBuilder):
    """Makes a step's Batch."""

    def __init__(self, kv_cache_spec: KeptSpec, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.settings, self.inv_freq = kv_cache_spec.settings, frequencies(vllm_config, device)
        tell(self.settings)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Batch:
        return Batch.of(common_attn_metadata, self.settings, self.inv_freq)


class KeepImpl(Keeping, AttentionImpl):
    """One layer's attention."""

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None, alibi_slopes: Any = None,
        sliding_window: int | None = None, kv_cache_dtype: str = "auto", logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER, kv_sharing_target_layer_name: str | None = None, sinks: Any = None,
    ) -> None:  # fmt: skip
        refuse_odd(
            sliding_windows=sliding_window is not None, ALiBi=alibi_slopes is not None, capped_logits=logits_soft_cap,
            attention_sinks=sinks is not None, shared_layers=kv_sharing_target_layer_name is not None,
            other_than_causal_attention=attn_type != AttentionType.DECODER,
        )  # fmt: skip
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype
        self.start()

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        self.keep(key, value, kv_cache, slot_mapping)

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Batch | None,
        output: Tensor, output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if attn_metadata is None:  # vLLM measures memory
            return output.fill_(0)
        return self.attend(layer.layer_name, query, kv_cache, attn_metadata, output)
