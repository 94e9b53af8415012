"""Batches: many documents compiled, one after the other here, or side by side by Ray Data.

With `Order.resume` a document that is compiled already is not compiled again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keepkv.documents.document import Document, compile_text, facts, load, save
from keepkv.errors import InputError, KeepKVError
from keepkv.models import families, identity, loading
from keepkv.recipe import Recipe
from keepkv.text import file
from keepkv.text.prompt import Prompt
from keepkv.text.reading import Phase, silent


@dataclass(frozen=True)
class Order:
    """What is to be done with every document.

    Attributes:
        recipe: How it is compiled.
        ids: Whether files hold their text's tokens.
        resume: Whether a file that was made of the same text, with the same model, in the same way, is left as it is.
        model, device, dtype: What to compile with, see `loading.load`.
    """

    recipe: Recipe = field(default_factory=Recipe)
    ids: bool = True
    resume: bool = False
    model: str = "smollm2"
    device: str = "auto"
    dtype: str = "auto"


class Compiler:
    """Compiles file after file with one model, which is loaded when the compiler is made. Raises ModelError."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.model, self.tokenizer = loading.load(order.model, order.device, order.dtype)
        self.model_id = identity.of_model(self.model)
        self.tokenizer_id = identity.of_tokenizer(self.tokenizer)

    def compile(self, doc: str, target: Path, phase: Phase = silent) -> dict[str, Any]:
        """Compiles one file.

        Args:
            doc: The text's file, or "-" for standard input.
            target: The .keep file to write.
            phase: Told what is under way.

        Returns:
            The document's facts, the file and its bytes, a warning or "", and as "made" whether it was not there already.

        Raises:
            KeepKVError: as `compile_text` and `save` do.
        """
        text = file.read_text(doc)
        ids = Prompt(self.tokenizer, text).text
        recipe = self.order.recipe.settled(ids.shape[1])
        document = self._compiled(target, ids, recipe) if self.order.resume else None
        new = document is None
        if document is None:
            document = compile_text(self.model, self.tokenizer, text, recipe, doc, self.order.model, phase)
            save(document, target, self.model_id, self.tokenizer_id, with_ids=self.order.ids)
        warning = families.length_warning(self.model, document.tokens) if new else ""
        size = target.stat().st_size
        return {**facts(document), "file": str(target), "bytes": size, "made": new, "warning": warning}

    def _compiled(self, target: Path, ids: Tensor, recipe: Recipe) -> Document | None:
        """The document of a file, if it is what would be made; a damaged file is made again."""
        try:
            document = load(target, self.model, self.tokenizer_id, self.model_id)
        except KeepKVError:
            return None
        same_recipe = document.recipe.to_dict() == recipe.to_dict()
        if document.ids is None or not self.order.ids or not same_recipe:
            return None
        return document if torch.equal(document.ids, ids.to(document.ids.device)) else None

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        """For Ray Data: a row with "doc" and "target" gets "facts" as JSON, or "failed", why it could not be compiled."""
        try:
            return {**row, "facts": json.dumps(self.compile(row["doc"], Path(row["target"]))), "failed": ""}
        except (KeepKVError, OSError) as error:
            return {**row, "facts": "", "failed": str(error)}


def with_ray(
    docs: Sequence[str], targets: Sequence[Path], order: Order, workers: int, gpus: float = 0.0
) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """Compiles on a Ray cluster: that of $RAY_ADDRESS, or a new one on this machine.

    Paths must mean the same on every node. A worker that dies is replaced, and its documents are compiled by another.

    Args:
        docs: Text files.
        targets: The .keep files to write.
        order: How.
        workers: How many compile at once, each with the model in memory.
        gpus: For each worker.

    Yields:
        A document's name and its facts (see `Compiler.compile`), or why it could not be compiled.

    Raises:
        InputError: if Ray is not installed.
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
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        Compiler,  # an actor that dies is started again and given its row again: Ray Data's default
        fn_constructor_args=(order,),
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(rows))),
        num_cpus=1,
        num_gpus=gpus,
    )
    for row in results.iter_rows():
        yield row["named"], row["failed"] or json.loads(row["facts"])
