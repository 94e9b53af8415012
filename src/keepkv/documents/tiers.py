"""Tiers: documents of a store on the device, in main memory, or on disk; the most recently used ones are nearest."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from keepkv.cache import other_layers
from keepkv.cache.layer import KeepLayer
from keepkv.documents.document import Document
from keepkv.documents.store import Shelf
from keepkv.errors import InputError


class Tiers:
    """Documents of a store, as many as fit on the model's device and in main memory.

    The least recently used document moves one tier down. All documents are on disk, so nothing has to be written. On a CPU, the
    device's memory is main memory, and there is one tier. Safe for several threads. `close` it, or use it in a with statement.

    Args:
        shelf: One model's view of a store (`Store.for_model`).
        device_bytes: What documents on the device may take.
        host_bytes: What documents in main memory beside it may take.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from keepkv import Recipe, Store
        >>> from keepkv.models import loading
        >>> shelf = Store(Path(tempfile.mkdtemp())).for_model(*loading.load("smollm2"))
        >>> entry, new = shelf.add("The ship Aurora left Bergen in May.", Recipe("50%", "snapkv"))
        >>> with Tiers(shelf, device_bytes=1e9) as tiers:
        ...     document = tiers.get(entry.key)
        ...     tiers.where(entry.key)
        'device'
    """

    def __init__(self, shelf: Shelf, device_bytes: float, host_bytes: float = 0.0) -> None:
        self.shelf = shelf
        self.device = shelf.model.device
        self._limits = {"device": device_bytes, "host": host_bytes if self.device.type != "cpu" else 0.0}
        self._documents: dict[str, OrderedDict[str, Document]] = {"device": OrderedDict(), "host": OrderedDict()}
        self._futures: dict[str, Future[Document]] = {}  # of what is being fetched in the background
        self._lock = threading.RLock()
        self._reader = ThreadPoolExecutor(1, "keepkv-prefetch")

    def __enter__(self) -> Tiers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops fetching in the background; what is under way is finished."""
        self._reader.shutdown(cancel_futures=True)

    def get(self, key: str) -> Document:
        """A document on the device, from wherever it is.

        Raises:
            InputError: if the store does not hold it (any more).
        """
        with self._lock:
            future = self._futures.get(key)
        if future is not None:
            future.result()
        with self._lock:
            document = self._documents["device"].get(key)
            if document is None:
                document = self._documents["host"].pop(key, None)
                document = self._read(key) if document is None else on_device(document, self.device)
            self._put("device", key, document)
            return document

    def prefetch(self, *keys: str) -> None:
        """Brings documents to the device in the background; `get` waits for one that is under way."""
        for key in keys:
            with self._lock:
                if key in self._documents["device"] or key in self._futures:
                    continue
                self._futures[key] = self._reader.submit(self._fetch, key)

    def where(self, key: str) -> str:
        """The tier of a document: "device", "host" or "disk"."""
        with self._lock:
            return next((tier for tier, documents in self._documents.items() if key in documents), "disk")

    def bytes(self, tier: str) -> int:
        """Bytes of the documents in a tier."""
        with self._lock:
            return sum(document.cache.report().kv_bytes for document in self._documents[tier].values())

    def _fetch(self, key: str) -> Document:
        try:
            with self._lock:
                in_memory = self._documents["host"].pop(key, None)
            document = self._read(key) if in_memory is None else on_device(in_memory, self.device)
            with self._lock:
                self._put("device", key, document)
            return document
        finally:
            with self._lock:
                self._futures.pop(key, None)

    def _read(self, key: str) -> Document:
        document = self.shelf.get(key)
        if document is None:
            raise InputError(f"the store holds no {key[:12]!r}: it was removed, or never added")
        return document

    def _put(self, tier: str, key: str, document: Document) -> None:
        """Puts a document into a tier, and what is too much there one tier down. The newest always stays on the device."""
        documents = self._documents[tier]
        documents[key] = document
        documents.move_to_end(key)
        while len(documents) > 1 and self.bytes(tier) > self._limits[tier]:
            oldest_key, oldest = documents.popitem(last=False)
            if tier == "device" and self._limits["host"]:
                self._put("host", oldest_key, on_device(oldest, torch.device("cpu")))
        if tier == "host" and self.bytes(tier) > self._limits[tier]:
            documents.clear()


def on_device(document: Document, device: torch.device) -> Document:
    """A document whose cache is on another device."""
    cache = document.cache.fork()
    for layer in cache.layers:
        other_layers.moved(layer, device)
        if isinstance(layer, KeepLayer) and layer.slots is not None:
            layer.slots = layer.slots.to(device)
    ids = None if document.ids is None else document.ids.to(device)
    return replace(document, cache=cache, ids=ids)
