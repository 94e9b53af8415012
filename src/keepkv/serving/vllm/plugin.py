"""What vLLM loads in every process (entry point `keepkv` of `vllm.general_plugins`). It changes nothing without settings.

vllm serve MODEL --additional-config '{"keepkv": {"budget": 1024}}'
"""

from __future__ import annotations


def register() -> None:
    """Registers keepkv's attention and page manager with vLLM.

    On the CPU platform they take the place of CPU_ATTN, the only backend there. Elsewhere they are CUSTOM, which has to be
    asked for with --attention-backend CUSTOM.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from keepkv.serving.vllm import kv_cache_spec

    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, "keepkv.serving.vllm.cpu.CpuBackend")
    else:
        register_backend(AttentionBackendEnum.CUSTOM, "keepkv.serving.vllm.backend.KeepBackend")
    kv_cache_spec.register()
