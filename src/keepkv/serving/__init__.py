"""keepkv inside the servers people run: a vLLM plugin, and Hugging Face's `transformers serve` with a KeepCache.

settings.py says what is kept of every request, and paged.py is one step of a request over paged memory; neither knows an
engine. vllm/ is the plugin, and transformers_server.py is what `keepkv serve` runs.
"""

from __future__ import annotations
