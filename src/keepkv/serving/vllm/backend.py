"""vLLM's attention over pages with votes, on any device, chosen by --attention-backend CUSTOM. On a CPU see cpu.py."""

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

from keepkv.errors import InputError, ModelError
from keepkv.methods import Method
from keepkv.models import families
from keepkv.models.rotation import Rotaries, candidates
from keepkv.observe.watch import Watch
from keepkv.ops.rope import Rotation
from keepkv.serving.paged import PagedConfig, Pages, new_watch, step
from keepkv.serving.settings import Settings
from keepkv.serving.vllm.kv_cache_spec import KeptSpec

logger = init_logger(__name__)

FAMILIES = ("gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")  # tried: all full layers of these rotate alike


class _CurrentEngine(NamedTuple):
    """keepkv's settings for the engine whose model was built last in this process, and its most tokens in flight.

    vLLM asks the backend's class for a page format without saying for which engine.
    """

    settings: Settings | None = None
    in_flight: int = 0


_current = [_CurrentEngine()]


def uses_keepkv() -> bool:
    """Whether the engine whose model is being built has settings for keepkv, which are noted. Raises InputError."""
    config = get_current_vllm_config_or_none()
    settings = Settings.read(config.additional_config) if config is not None else None
    if config is None or settings is None:
        _current[0] = _CurrentEngine()
        return False
    parallel = config.parallel_config
    for unsupported, name in (
        (config.speculative_config is not None, "speculative decoding"),
        (config.kv_transfer_config is not None, "a KV connector"),
        (parallel.decode_context_parallel_size > 1, "decode context parallelism"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism"),
        (config.cache_config.cache_dtype not in ("auto", "bfloat16", "float16", "float32"), "a quantized KV cache"),
    ):
        if unsupported:
            raise InputError(f"{name} is not supported together with keepkv: disable it, or remove the keepkv settings")
    in_flight = getattr(config, "max_in_flight_tokens", None) or 2 * config.scheduler_config.max_num_batched_tokens
    _current[0] = _CurrentEngine(settings, in_flight)
    return True


class RequestInBatch(NamedTuple):
    """One request's share of a step.

    Args:
        first: Its first token in the batch.
        last: The token after its last one.
        before: Tokens of the request that were computed earlier.
        table: Its pages.
    """

    first: int
    last: int
    before: int
    table: Tensor


class Batch(NamedTuple):
    """A step's requests, and what all layers have in common."""

    requests: list[RequestInBatch]
    settings: Settings
    method: Method
    rotation: Rotation

    @classmethod
    def of(cls, metadata: Any, settings: Settings, rotation: Rotation) -> Batch:
        """From vLLM's CommonAttentionMetadata."""
        bounds = metadata.query_start_loc_cpu.tolist()
        lengths = metadata.seq_lens.tolist()
        requests = [
            RequestInBatch(first, last, length - (last - first), table)
            for first, last, length, table in zip(bounds, bounds[1:], lengths, metadata.block_table_tensor, strict=False)
            if last > first
        ]
        return cls(requests, settings, settings.uniform_method(), rotation)


class KeepPages:
    """Part of a backend: keepkv's pages for layers of full attention, if there are settings. Other layers keep vLLM's."""

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return _current[0].settings is None

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        settings, in_flight = _current[0]
        if settings is None or type(spec) is not FullAttentionSpec or spec.sliding_window is not None:
            return spec
        return KeptSpec.of(spec, settings, in_flight)


class KeepAttention:
    """Part of a layer's attention: what it does over keepkv's pages.

    What it has observed of a request is stored under the request's first page, which belongs to the request as long as it runs.
    """

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
        config = PagedConfig(batch.settings, batch.method, self.scale, batch.rotation)
        pages = self._pages(kv_cache)
        layer = extract_layer_index(name)
        for first, last, before, table in batch.requests:
            request = int(table[0])
            watched, watch = self.watches.pop(request, (0, None)) if before else (0, None)
            if watch is None or watched != before:
                watch = new_watch(config, layer)
            result, watch = step(pages, table, query[first:last], before, config, watch)
            output[first:last] = result.reshape(output[first:last].shape)
            self.watches[request] = before + last - first, watch
        while len(self.watches) > self.most_watched:
            self.watches.popitem(last=False)
        return output

    def _pages(self, kv_cache: Tensor) -> Pages:
        return Pages.of(kv_cache, self.head_size, self.head_size)


def refuse(**features: object) -> None:
    """Raises InputError for a layer of full attention with a feature that votes do not work with."""
    used = [name.replace("_", " ") for name, value in features.items() if value]
    if used:
        raise InputError(f"keepkv cannot serve models with {used[0]}: remove the keepkv settings for this model")


def model_rotation(vllm_config: Any, device: torch.device) -> Rotation:
    """How the model's layers rotate, from its configuration. Raises ModelError for families that were not tried in vLLM."""
    config = vllm_config.model_config.hf_text_config
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ModelError(f"the model family {config.model_type!r} was not tried in vLLM: expected one of {known}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    decoder = model.get_decoder()
    with device:
        decoder.rotary_emb = type(decoder.rotary_emb)(config)  # that of the model has no numbers
    full = list(map(families.is_compressed, families.layer_kinds(model))).index(True)
    return Rotaries([candidates(model, families.key_shape(model)[1])[full][0]]).at(2)[0]


def log_settings(settings: Settings) -> None:
    """Logs what is kept of every request."""
    logger.info_once(
        "keepkv: %s keeps %d slots of every KV head and the newest %d to %d tokens of every request. These pages are not used "
        "for prefix caching.",
        settings.method,
        settings.budget,
        settings.window,
        settings.window + settings.step,
    )


class KeepBackend(KeepPages, AttentionBackend):
    """For models whose layers all have full attention. Slots are read by keepkv.attend's backend for the device."""

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
        if not uses_keepkv():
            raise InputError(
                "the attention backend CUSTOM is keepkv's, but there are no settings for it: add "
                """--additional-config '{"keepkv": {"budget": 1024}}', or choose another backend"""
            )
        return KeepImpl

    @staticmethod
    def get_builder_cls() -> type[KeepBuilder]:
        return KeepBuilder


class KeepBuilder(AttentionMetadataBuilder):
    """Makes a step's Batch."""

    def __init__(self, kv_cache_spec: KeptSpec, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.settings = kv_cache_spec.settings
        self.rotation = model_rotation(vllm_config, device)
        log_settings(self.settings)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Batch:
        return Batch.of(common_attn_metadata, self.settings, self.rotation)


class KeepImpl(KeepAttention, AttentionImpl):
    """One layer's attention."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: Any = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Any = None,
    ) -> None:
        refuse(
            sliding_windows=sliding_window is not None,
            ALiBi=alibi_slopes is not None,
            capped_logits=logits_soft_cap,
            learned_attention_sinks=sinks is not None,
            layers_that_share_a_cache=kv_sharing_target_layer_name is not None,
            other_than_causal_attention=attn_type != AttentionType.DECODER,
        )
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.start()

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        self.keep(key, value, kv_cache, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Batch | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if attn_metadata is None:  # vLLM measures memory
            return output.fill_(0)
        return self.attend(layer.layer_name, query, kv_cache, attn_metadata, output)
