"""What vLLM loads in every process: entry point `keepkv` of `vllm.general_plugins`. Changes nothing unless it is asked for.

vllm serve MODEL --additional-config '{"keepkv": {"budget": 1024}}'
"""

from __future__ import annotations


def register() -> None:
    """Puts keepkv's attention and page manager where vLLM looks for them. On its CPU platform only, so far."""
    from vllm.logger import init_logger
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not current_platform.is_cpu():
        init_logger(__name__).warning("keepkv serves on vLLM's CPU platform only, so far: its settings change nothing here")
        return
    from keepkv.serving import blocks

    register_backend(AttentionBackendEnum.CPU_ATTN, "keepkv.serving.backend.KeepBackend")
    blocks.register()
