"""Many documents compiled: one after the other here, or side by side by Ray Data. What is made already is not made again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from keepkv.documents import identity
from keepkv.documents.document import Document, compile_text, facts, load, save
from keepkv.errors import InputError, KeepKVError
from keepkv.models import families, loading
from keepkv.recipe import Recipe
from keepkv.text import file
from keepkv.text.prompt import Prompt
from keepkv.text.reading import Phase, silent


@dataclass(frozen=True)
class Order:
    """What was asked for: a model and how every text is compiled.

    ids: whether files hold their text's tokens. resume: whether a file that was made of the same text, by the same model, in
    the same way, is left as it is.
    """

    recipe: Recipe = field(default_factory=Recipe)
    ids: bool = True
    resume: bool = False
    model: str = "smollm2"
    device: str = "auto"
    dtype: str = "auto"


class Compiler:
    """Compiles file after file with one model, loaded when it is made."""

    def __init__(self, order: Order) -> None:
        """Raises ModelError."""
        self.order = order
        self.model, self.tokenizer = loading.load(self.order.model, self.order.device, self.order.dtype)
        self.known, self.cut = identity.of_model(self.model), identity.of_tokenizer(self.tokenizer)

    def compile(self, doc: str, target: Path, phase: Phase = silent) -> dict[str, Any]:
        """Compiles one file; returns its facts, with "made": whether it was not there already. Raises what compiling raises."""
        order, text = self.order, file.read_text(doc)
        recipe = order.recipe.settled(Prompt(self.tokenizer, text).text.shape[1])
        if order.resume and (found := self._found(target, text, recipe)) is not None:
            return {**facts(found), "file": str(target), "bytes": target.stat().st_size, "made": False, "warning": ""}
        document = compile_text(self.model, self.tokenizer, text, recipe, doc, order.model, phase)
        save(document, target, self.known, self.cut, with_ids=order.ids)
        made = {**facts(document), "file": str(target), "bytes": target.stat().st_size, "made": True}
        return {**made, "warning": families.too_long(self.model, document.tokens)}

    def _found(self, target: Path, text: str, recipe: Recipe) -> Document | None:
        """The document of a file that is what would be made; None for any other, or none. A damaged file is made again."""
        try:
            found = load(target, self.model, self.cut, self.known)
        except KeepKVError:
            return None
        if found.ids is None or not self.order.ids or found.recipe != recipe:
            return None
        return found if torch.equal(found.ids, Prompt(self.tokenizer, text).text.to(found.ids.device)) else None

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        """For Ray Data: {"doc", "target"} gets "facts" as JSON, or "failed", why it could not be compiled."""
        try:
            return {**row, "facts": json.dumps(self.compile(row["doc"], Path(row["target"]))), "failed": ""}
        except (KeepKVError, OSError) as error:
            return {**row, "facts": "", "failed": str(error)}


def with_ray(
    docs: Sequence[str], targets: Sequence[Path], order: Order, workers: int, gpus: float = 0.0
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Compiles on a Ray cluster ($RAY_ADDRESS, or one of this machine), `workers` at once; yields (doc, facts or why not).

    Paths must mean the same on every node. A worker that dies is replaced and its documents are compiled by another.
    Raises InputError without Ray.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError("--ray needs Ray: pip install 'keepkv[ray]'") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [
        {"doc": str(Path(doc).resolve()), "target": str(target.resolve()), "named": doc}
        for doc, target in zip(docs, targets, strict=True)
    ]
    made = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        Compiler, fn_constructor_args=(order,), compute=ray.data.ActorPoolStrategy(size=min(workers, len(rows))), num_cpus=1,
        num_gpus=gpus,
    )  # fmt: skip  # an actor that dies is started again and given its row again: Ray Data's default
    for row in made.iter_rows():
        yield row["named"], row["failed"] or json.loads(row["facts"])
