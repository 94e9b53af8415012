"""Documents: a text that was read and compressed once, as a value, as a file, and answering."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keepkv import __version__, methods
from keepkv.cache import KeepCache
from keepkv.documents import format, identity
from keepkv.documents.packing import pack, unpack
from keepkv.errors import InputError
from keepkv.models import families
from keepkv.recipe import Recipe
from keepkv.text.ask import Asked, greedy
from keepkv.text.prompt import Prompt, asked
from keepkv.text.reading import REPEAT, Phase, read, read_in_chunks, silent

Exact = Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Document:
    """A text's cache and what is needed to ask it.

    ids [1, T]: what was read, or None where a file leaves it out; lead: how many of them the chat template puts before the
    text; before, after: what stands around a question; source: where the text came from; model: the name it was loaded by.
    exact(i): keys and values [1, H, T, d] of all tokens in the i-th layer, as they were read; None where they were not kept.
    """

    cache: KeepCache
    ids: Tensor | None
    lead: int
    before: str
    after: str
    recipe: Recipe = field(default_factory=Recipe)
    source: str = ""
    model: str = ""
    reading_seconds: float = 0.0
    exact: Exact | None = None

    @property
    def tokens(self) -> int:
        return self.cache.get_seq_length()

    def question(self, tokenizer: PreTrainedTokenizerBase, question: str) -> Tensor:
        """Token ids [1, n] of a question, as it stands after the text."""
        if not question.strip():
            raise InputError("one of the questions is empty: write each in quotes, one after the other")
        return asked(tokenizer, question, self.before, self.after)


def key_of(recipe: Recipe, ids: Tensor, model: Mapping[str, Any]) -> str:
    """A digest of recipe, model identity and token ids: the same for the same cache, and only then."""
    told = [format.FORMAT, recipe.to_dict(), dict(model), ids.flatten().tolist()]
    return identity.digest(json.dumps(told, sort_keys=True).encode())


def shortened(document: Document, tokens: int) -> Document:
    """The document's first tokens: its exact tail must hold all others."""
    cache = document.cache.fork()
    if tokens < document.tokens:
        cache.crop(tokens - document.tokens)
    return replace(document, cache=cache, ids=None if document.ids is None else document.ids[:, :tokens])


def facts(document: Document) -> dict[str, Any]:
    """What a user wants to know of a compilation, for JSON."""
    report = document.cache.report()
    return {
        "source": document.source, "tokens": document.tokens, "method": report.method, "budget": report.budget,
        "slot_dtype": report.slot_dtype, "kv_bytes": report.kv_bytes, "kv_bytes_full": report.kv_bytes_full,
        "reading_seconds": document.reading_seconds, "repeat_seconds": report.repeat_seconds,
        "compress_seconds": report.compress_seconds, "note": report.note,
    }  # fmt: skip


@torch.inference_mode()
def compile_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, recipe: Recipe | None = None, source: str = "",
    name: str = "", phase: Phase = silent,
) -> Document:  # fmt: skip
    """Reads a text, compresses it as the recipe says, and returns the document. Raises BudgetError, MethodError, InputError."""
    prompt = Prompt(tokenizer, text)
    recipe = (recipe or Recipe()).settled(prompt.text.shape[1])
    ids, spans, method = prompt.text.to(model.device), prompt.spans(*recipe.keep), methods.get(recipe.method)
    lead = prompt.question(REPEAT).to(model.device)
    if recipe.exact and (recipe.chunk or any(kind is not None for kind in families.layer_kinds(model))):
        raise InputError(
            "every key and value is kept only of a text that is read at once (--chunk 0), by a model without sliding windows"
        )
    exact = None
    if recipe.chunk:
        reading = read_in_chunks(model, ids, method, recipe, lead, spans, phase)
        cache = reading.cache
    else:
        reading = read(model, ids, [method], recipe, lead, phase)
        cache = reading.of(method).compress(recipe.budget, method, phase(f"compressing ({method.name})"), spans)
        if recipe.exact:
            exact = [(layer.keys, layer.values) for layer in reading.cache.keep_layers].__getitem__
    return Document(cache, ids, prompt.lead, prompt.before, prompt.after, recipe, source, name, reading.seconds, exact)


def save(
    document: Document, file: Path | str, model: PreTrainedModel | Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | str,
    with_ids: bool = True,
) -> None:  # fmt: skip
    """Writes a .keep file, whole or not at all. with_ids=False leaves the token ids, and so the text, out.

    model and tokenizer, or their identities where they are known. Raises InputError.
    """
    header, tensors = pack(document.cache)
    header["keepkv"] = __version__
    header["model"] = {**_identity(model), "name": document.model}
    header["tokenizer"] = tokenizer if isinstance(tokenizer, str) else identity.of_tokenizer(tokenizer)
    header["template"] = {"lead": document.lead, "before": document.before, "after": document.after}
    header["recipe"], header["source"] = document.recipe.to_dict(), document.source
    header["reading_seconds"] = document.reading_seconds
    if with_ids and document.ids is not None:
        tensors["ids"] = document.ids.to(torch.int32)
    if document.exact is not None:
        if document.exact(0)[0].shape[2] != document.tokens:
            raise InputError("its exact keys and values are not those of all its tokens: replace(document, exact=None)")
        for index in range(len(document.cache.layers)):
            tensors[f"exact.{index}.keys"], tensors[f"exact.{index}.values"] = document.exact(index)
    format.write(Path(file), header, tensors)


def load(
    file: Path | str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | str, known: Mapping[str, Any] | None = None
) -> Document:  # fmt: skip
    """The document of a .keep file, mapped into memory; known: the model's identity where it is known already.

    Raises InputError for a file that is damaged, altered, of another model or tokenizer, or of a newer keepkv.
    """
    contents = format.Contents(Path(file))
    header = contents.header
    try:
        identity.check(str(file), header["model"], known or identity.of_model(model))
        cut = tokenizer if isinstance(tokenizer, str) else identity.of_tokenizer(tokenizer)
        if header["tokenizer"] != cut:
            raise InputError(f"{str(file)!r} was compiled with another tokenizer or chat template: compile the document again")
        recipe, place = Recipe.from_dict(header["recipe"]), header["template"]
        lead, before, after = int(place["lead"]), str(place.get("before", "")), str(place["after"])
        source, name = str(header["source"]), header["model"]["name"]
        seconds = float(header["reading_seconds"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise contents.broken("its header does not describe a document") from error
    cache = unpack(contents, model, model.device)
    ids = None
    if "ids" in contents:
        ids = contents.take("ids", 1, cache.get_seq_length(), dtype=torch.int32).long().to(model.device)
        if not 0 <= int(ids.min()) <= int(ids.max()) < model.config.get_text_config(decoder=True).vocab_size:
            raise contents.broken("its tokens are not the model's")
    exact = _Exact(contents, cache.get_seq_length(), model) if "exact.0.keys" in contents else None
    return Document(cache, ids, lead, before, after, recipe, source, name, seconds, exact)


@torch.inference_mode()
def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, document: Document, questions: Sequence[str],
    max_new_tokens: int = 64, loading_seconds: float = 0.0, phase: Phase = silent,
) -> Asked:  # fmt: skip
    """Answers questions about a document, each from its cache as it was compiled. Raises InputError for an empty question."""
    later = [document.question(tokenizer, question).to(model.device) for question in questions]
    ids = document.ids
    if ids is None:  # generate() wants ids for everything that was read, and looks only at their number
        ids = torch.zeros(1, document.tokens, dtype=torch.int64, device=model.device)
    tell, answers = phase("answering"), []
    report = document.cache.report()
    for number, (question, asks) in enumerate(zip(questions, later, strict=True)):
        answers.append(greedy(model, tokenizer, document.cache.fork(), ids, asks, question, max_new_tokens))
        tell(number + 1, len(questions))
    return Asked(report.method, report, loading_seconds, 0.0, tuple(answers), bool(report.repeat_seconds), loaded=True)


class _Exact:
    """Exact keys and values in a file, mapped and checked layer by layer when they are wanted."""

    def __init__(self, contents: format.Contents, tokens: int, model: PreTrainedModel) -> None:
        heads, width = families.key_shape(model)
        self._contents, self._shape = contents, (1, heads, tokens, width)
        self._device = model.device

    def __call__(self, index: int) -> tuple[Tensor, Tensor]:
        keys, values = (self._contents.take(f"exact.{index}.{part}", *self._shape) for part in ("keys", "values"))
        return keys.to(self._device), values.to(self._device)


def _identity(model: PreTrainedModel | Mapping[str, Any]) -> Mapping[str, Any]:
    return identity.of_model(model) if isinstance(model, PreTrainedModel) else model
