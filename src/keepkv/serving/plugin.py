"""What vLLM loads in every process: entry point `keepkv` of `vllm.general_plugins`. Changes nothing unless it is asked for.

vllm serve MODEL --additional-config '{"keepkv": {"budget": 1024}}'
"""

from __future__ import annotations


def register() -> None:
    """Puts keepkv's attention and page manager where vLLM looks for them."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from keepkv.serving import blocks

    place = AttentionBackendEnum.CPU_ATTN if current_platform.is_cpu() else AttentionBackendEnum.CUSTOM
    register_backend(place, "keepkv.serving.backend.KeepBackend")
    blocks.register()
