"""vLLM's CPU attention with keepkv's pages. It replaces CPU_ATTN, and without settings for keepkv does the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionMetadataBuilder, AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl, CPUAttentionMetadataBuilder

from keepkv.serving.vllm.backend import (
    Batch,
    KeepAttention,
    KeepPages,
    log_settings,
    model_rotation,
    refuse,
    uses_keepkv,
)
from keepkv.serving.vllm.kv_cache_spec import KeptSpec


class CpuBackend(KeepPages, CPUAttentionBackend):
    """CPU attention, with keepkv's pages for layers of full attention if `additional_config` has settings for keepkv."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """Called where a model is built, in its engine's configuration. Raises InputError for what cannot be served."""
        return CpuImpl if uses_keepkv() else CPUAttentionBackendImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return CpuBuilder


class CpuBuilder(CPUAttentionMetadataBuilder):
    """Makes a Batch for layers with keepkv's pages, and vLLM's own metadata for others."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        self.kept = kv_cache_spec if isinstance(kv_cache_spec, KeptSpec) else None
        if self.kept is None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            return
        AttentionMetadataBuilder.__init__(self, kv_cache_spec, layer_names, vllm_config, device)
        self.rotation = model_rotation(vllm_config, device)
        log_settings(self.kept.settings)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        if self.kept is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        return Batch.of(common_attn_metadata, self.kept.settings, self.rotation)


class CpuImpl(KeepAttention, CPUAttentionBackendImpl):
    """One layer's attention: keepkv's for full attention, vLLM's own for sliding windows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept = self.sliding_window == -1 and self.attn_type == AttentionType.DECODER
        if self.kept:
            refuse(
                ALiBi=self.alibi_slopes is not None,
                capped_logits=self.logits_soft_cap,
                learned_attention_sinks=self.sinks is not None,
            )
        self.start()

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        if self.kept:
            self.keep(key, value, kv_cache, slot_mapping)
        else:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if isinstance(attn_metadata, Batch):
            return self.attend(layer.layer_name, query, kv_cache, attn_metadata, output)
        return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
