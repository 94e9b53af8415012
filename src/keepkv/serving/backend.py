"""vLLM's attention over pages with votes. On its CPU platform this stands in for CPU_ATTN, and is that unless asked for."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionMetadataBuilder, AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec

from keepkv import hosts
from keepkv.errors import InputError
from keepkv.observe import Watch
from keepkv.serving.blocks import KeptSpec
from keepkv.serving.paged import Lot, Pages, step, watcher
from keepkv.serving.settings import Settings

logger = init_logger(__name__)


class _Asked(NamedTuple):
    """Of the engine whose model was built last in this process: its settings, and its tokens in unsettled steps at most.

    vLLM asks the backend's class for a page format without saying for which engine.
    """

    settings: Settings | None = None
    in_flight: int = 0


_asked = [_Asked()]


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
    inv_freq: Tensor


class KeepBackend(CPUAttentionBackend):
    """CPU attention, with keepkv's pages for layers of full attention where `additional_config` asks for them."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """Called where a model is built, in its engine's configuration. Raises InputError for what cannot be served yet."""
        config = get_current_vllm_config_or_none()
        settings = Settings.read(config.additional_config) if config is not None else None
        if config is None or settings is None:
            _asked[0] = _Asked()
            return CPUAttentionBackendImpl
        _refuse(config)
        most = getattr(config, "max_in_flight_tokens", None) or 2 * config.scheduler_config.max_num_batched_tokens
        _asked[0] = _Asked(settings, most)
        return KeepImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return KeepBuilder

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return _asked[0].settings is None

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Own pages for full attention; sliding windows and everything else keep vLLM's."""
        settings, in_flight = _asked[0]
        if settings is None or type(spec) is not FullAttentionSpec or spec.sliding_window is not None:
            return spec
        return KeptSpec.of(spec, settings, in_flight)


def _refuse(config: Any) -> None:
    """Raises InputError for what would need pages that do not change."""
    parallel = config.parallel_config
    for trouble, name in (
        (config.speculative_config is not None, "speculative decoding"),
        (config.kv_transfer_config is not None, "a KV connector"),
        (parallel.decode_context_parallel_size > 1, "decode context parallelism"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism"),
        (config.cache_config.cache_dtype not in ("auto", "bfloat16", "float16", "float32"), "a quantised KV cache"),
    ):
        if trouble:
            raise InputError(f"keepkv does not work with {name} yet: leave one of the two out")


class KeepBuilder(CPUAttentionMetadataBuilder):
    """Makes a Batch for layers with keepkv's pages, and vLLM's own metadata for others."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        self.kept = kv_cache_spec if isinstance(kv_cache_spec, KeptSpec) else None
        if self.kept is None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            return
        AttentionMetadataBuilder.__init__(self, kv_cache_spec, layer_names, vllm_config, device)
        self.inv_freq = _frequencies(vllm_config.model_config.hf_text_config).to(device)
        logger.info_once(
            "keepkv: %s keeps %d slots of every head and the newest %d to %d tokens; prefix caching does not apply to them",
            self.kept.settings.method, self.kept.settings.budget, self.kept.settings.window,
            self.kept.settings.window + self.kept.settings.step,
        )  # fmt: skip

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        if self.kept is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        told = common_attn_metadata
        bounds, seen = told.query_start_loc_cpu.tolist(), told.seq_lens.tolist()
        parts = [
            Part(first, last, length - (last - first), table)
            for first, last, length, table in zip(bounds, bounds[1:], seen, told.block_table_tensor, strict=False)
            if last > first
        ]
        return Batch(parts, self.kept.settings, self.inv_freq)


class KeepImpl(CPUAttentionBackendImpl):
    """One layer's attention; what a layer has observed of a request is kept here, under the request's first page."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept = self.sliding_window == -1 and self.attn_type == AttentionType.DECODER
        odd = self.alibi_slopes is not None or self.logits_soft_cap or self.sinks is not None
        if self.kept and odd:
            raise InputError("keepkv does not serve models with ALiBi, capped logits or attention sinks of their own")
        config = get_current_vllm_config_or_none()
        assert config is not None, "vLLM builds models in a configuration"
        self.watches: OrderedDict[int, tuple[int, Watch]] = OrderedDict()
        self.most_watched = 2 * config.scheduler_config.max_num_seqs

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        if not self.kept:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        count = min(len(slot_mapping), len(key))
        self._pages(kv_cache).write(slot_mapping[:count].long(), key[:count], value[:count])

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any, output: Tensor,
        output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if not isinstance(attn_metadata, Batch):
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        lot = Lot(attn_metadata.settings, attn_metadata.settings.row, self.scale, attn_metadata.inv_freq)
        pages, index = self._pages(kv_cache), extract_layer_index(layer.layer_name)
        for first, last, before, table in attn_metadata.parts:
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


def _frequencies(config: Any) -> Tensor:
    """Rotary frequencies float32 [r/2] of a model, from its configuration. Raises ModelError for families not supported."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    hosts.check(model)
    return hosts.frequencies(type(hosts.rotary(model))(config))
