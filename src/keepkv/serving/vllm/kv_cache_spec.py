"""vLLM's side of the pages: their format, and the manager that frees a running request's pages between slots and tail."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from keepkv.serving.paged import CELL
from keepkv.serving.settings import Settings


@dataclass(frozen=True, kw_only=True)
class KeptSpec(FullAttentionSpec):
    """Full attention in pages whose cells end with a vote and a position.

    Args:
        settings: What is kept of every request.
        in_flight: The most tokens of steps that have been scheduled and have not ended.
    """

    settings: Settings
    in_flight: int

    @classmethod
    def of(cls, spec: FullAttentionSpec, settings: Settings, in_flight: int) -> KeptSpec:
        """vLLM's own format, with room for votes and positions. Raises InputError if the settings are not whole blocks."""
        settings.check_blocks(spec.block_size)
        values = {field.name: getattr(spec, field.name) for field in fields(spec)}
        values["state_content_bytes"] = (spec.head_size + spec.head_size_v) * spec.dtype.itemsize + CELL
        return cls(**values, settings=settings, in_flight=in_flight)

    @property
    def prefix_cacheable(self) -> bool:
        """No: what a page holds depends on what came after it."""
        return False

    @property
    def most_blocks(self) -> int:
        """Pages of a request at most, whatever its length."""
        return -(-self.settings.peak(self.in_flight) // self.block_size) + 1

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        longest: int = vllm_config.model_config.max_model_len
        return min(-(-longest // self.block_size), self.most_blocks) * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list[KeptSpec]) -> KeptSpec:
        if any(spec != specs[0] for spec in specs):
            raise ValueError(
                "keepkv needs layers of full attention with equal heads and sizes, and those of this model differ: "
                "remove keepkv's settings for it"
            )
        return specs[0]


class KeptManager(FullAttentionManager):
    """Frees the pages between slots and tail, once the step has ended that made them useless."""

    def __init__(self, kv_cache_spec: KeptSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.kept = kv_cache_spec
        self.max_admission_blocks_per_request = kv_cache_spec.most_blocks

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        settings = self.kept.settings
        covered = settings.covered(processed_computed_tokens)
        self._remove_blocks_in_range(request_id, settings.budget // self.block_size, covered // self.block_size)


def register() -> None:
    """Registers the format and the manager with vLLM, in this process. May be called again."""
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})  # registers vLLM's own first, which it does only while it is empty
    KVCacheSpecRegistry.register(KeptSpec, KeptManager, uniform_type_base_spec=FullAttentionSpec)
