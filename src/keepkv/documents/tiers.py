"""Tiers: documents of a store on the device, in the host's memory, or on disk, the most recently asked ones nearest."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch

from keepkv.cache.layer import KeepLayer
from keepkv.documents.document import Document
from keepkv.documents.store import Shelf
from keepkv.errors import InputError


class Tiers:
    """Documents of a shelf, at most `device_bytes` of them on the model's device and `host_bytes` in memory beside it.

    What has not been asked for longest moves one tier down; it is on disk too, so nothing is written. On a CPU the device
    is the host's memory: there is one tier. Safe for several threads. Close it, or use it in a with statement.
    """

    def __init__(self, shelf: Shelf, device_bytes: float, host_bytes: float = 0.0) -> None:
        self.shelf, self.device = shelf, shelf.model.device
        self._limits = {"device": device_bytes, "host": host_bytes if self.device.type != "cpu" else 0.0}
        self._held: dict[str, OrderedDict[str, Document]] = {"device": OrderedDict(), "host": OrderedDict()}
        self._coming: dict[str, Future[Document]] = {}
        self._lock = threading.RLock()
        self._reader = ThreadPoolExecutor(1, "keepkv-prefetch")

    def __enter__(self) -> Tiers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)

    def get(self, key: str) -> Document:
        """A document on the device, from wherever it is. Raises InputError if the store does not hold it (any more)."""
        with self._lock:
            coming = self._coming.get(key)
        if coming is not None:
            coming.result()
        with self._lock:
            held = self._held["device"].get(key)
            if held is None:
                held = self._held["host"].pop(key, None)
                held = self._read(key) if held is None else moved(held, self.device)
            self._hold("device", key, held)
            return held

    def prefetch(self, *keys: str) -> None:
        """Brings documents to the device in the background; `get` waits for one that is under way."""
        for key in keys:
            with self._lock:
                if key in self._held["device"] or key in self._coming:
                    continue
                self._coming[key] = self._reader.submit(self._fetch, key)

    def where(self, key: str) -> str:
        """ "device", "host" or "disk"."""
        with self._lock:
            return next((tier for tier, held in self._held.items() if key in held), "disk")

    def bytes(self, tier: str) -> int:
        """What a tier holds."""
        with self._lock:
            return sum(document.cache.report().kv_bytes for document in self._held[tier].values())

    def _fetch(self, key: str) -> Document:
        try:
            with self._lock:
                waiting = self._held["host"].pop(key, None)
            document = self._read(key) if waiting is None else moved(waiting, self.device)
            with self._lock:
                self._hold("device", key, document)
            return document
        finally:
            with self._lock:
                self._coming.pop(key, None)

    def _read(self, key: str) -> Document:
        document = self.shelf.get(key)
        if document is None:
            raise InputError(f"the store holds no {key[:12]!r}: it was removed, or never added")
        return document

    def _hold(self, tier: str, key: str, document: Document) -> None:
        """Puts a document into a tier, and what is too much there one tier down; the newest always stays."""
        held = self._held[tier]
        held[key] = document
        held.move_to_end(key)
        while len(held) > 1 and self.bytes(tier) > self._limits[tier]:
            old, last = held.popitem(last=False)
            if tier == "device" and self._limits["host"]:
                self._hold("host", old, moved(last, torch.device("cpu")))
        if tier == "host" and self.bytes(tier) > self._limits[tier]:
            held.clear()


def moved(document: Document, device: torch.device) -> Document:
    """A document whose cache is on another device."""
    cache = document.cache.fork()
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)
        if isinstance(layer, KeepLayer) and layer.slots is not None:
            layer.slots = layer.slots.to(device)
    ids = None if document.ids is None else document.ids.to(device)
    return replace(document, cache=cache, ids=ids)
