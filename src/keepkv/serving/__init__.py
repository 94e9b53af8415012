"""keepkv inside the servers people run: a vLLM plugin, and Hugging Face's `transformers serve` with a KeepCache.

settings, paged: what is kept, and one step of a request over paged memory; pure, no engine. backend, blocks, plugin: vLLM's
worker side, its scheduler side, and what registers both. transformers_serve, commands: `keepkv serve`.
"""

from __future__ import annotations
