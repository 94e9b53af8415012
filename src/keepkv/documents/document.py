"""Document: a text that was read and compressed once: compiled, saved as a .keep file, loaded, and asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keepkv import __version__, methods, schema
from keepkv.cache import KeepCache
from keepkv.documents.format import FORMAT, Contents, write
from keepkv.documents.packing import pack, unpack
from keepkv.errors import InputError
from keepkv.models import families, identity
from keepkv.recipe import Recipe
from keepkv.text.ask import AskResult, greedy
from keepkv.text.prompt import Prompt, question_ids
from keepkv.text.reading import REPEAT, Phase, read, read_in_chunks, silent

ExactLayers = Callable[[int], tuple[Tensor, Tensor]]  # of a layer's index: keys and values [1, H, T, d] of all tokens


@dataclass(frozen=True)
class Document:
    r"""A text's compact cache and what is needed to ask it questions.

    Attributes:
        cache: Has read the text.
        ids: Token ids [1, T] of what was read, or None where a file leaves them out.
        lead: How many of them the chat template puts before the text.
        before, after: What stands around a question.
        recipe: How the text was compiled.
        source: Where the text came from.
        model: The name by which the model was loaded.
        reading_seconds: Of reading the text.
        exact: exact(i) is keys and values [1, H, T, d] of all tokens in layer i, as they were read; None where they were not
            kept (`Recipe.exact`).

    Examples:
        >>> from keepkv.models import loading
        >>> model, tokenizer = loading.load("smollm2")
        >>> document = compile_text(model, tokenizer, "The ship Aurora left Bergen in May.", Recipe("50%", "snapkv"))
        >>> tokenizer.decode(document.question(tokenizer, "When?")[0])
        '\nWhen?<|im_end|>\n<|im_start|>assistant\n'
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
    exact: ExactLayers | None = None

    @property
    def tokens(self) -> int:
        """Tokens read."""
        return self.cache.get_seq_length()

    def question(self, tokenizer: PreTrainedTokenizerBase, question: str) -> Tensor:
        """Token ids [1, n] of a question, as it stands after the text.

        Raises:
            InputError: for an empty question.
        """
        if not question.strip():
            raise InputError("one of the questions is empty: write each in quotes, one after the other")
        return question_ids(tokenizer, question, self.before, self.after)


def key_of(recipe: Recipe, ids: Tensor, model: Mapping[str, Any]) -> str:
    """A digest of recipe, model identity and token ids: the same for the same cache, and only then."""
    fields = [FORMAT, recipe.to_dict(), dict(model), ids.flatten().tolist()]
    return identity.digest(json.dumps(fields, sort_keys=True).encode())


def shortened(document: Document, tokens: int) -> Document:
    """The document's first `tokens` tokens. Raises KeepKVError unless its exact tail holds all others."""
    if tokens >= document.tokens:
        return replace(document, cache=document.cache.fork())
    cache = document.cache.fork()
    cache.crop(tokens - document.tokens)
    ids = None if document.ids is None else document.ids[:, :tokens]
    exact = None if document.exact is None else partial(_first_tokens, document.exact, tokens)
    return replace(document, cache=cache, ids=ids, exact=exact)


def facts(document: Document) -> dict[str, Any]:
    """What a user wants to know of a compiled document, for JSON."""
    report = document.cache.report()
    return {
        "source": document.source,
        "tokens": document.tokens,
        "method": report.method,
        "budget": report.budget,
        "slot_dtype": report.slot_dtype,
        "kv_bytes": report.kv_bytes,
        "kv_bytes_full": report.kv_bytes_full,
        "reading_seconds": document.reading_seconds,
        "repeat_seconds": report.repeat_seconds,
        "compress_seconds": report.compress_seconds,
        "note": report.note,
    }


@torch.inference_mode()
def compile_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    recipe: Recipe | None = None,
    source: str = "",
    name: str = "",
    phase: Phase = silent,
) -> Document:
    """Reads a text once and compresses it: a document that can be asked at any time, and saved.

    Args:
        model: Any supported model.
        tokenizer: Its tokenizer.
        text: The text.
        recipe: How it is compressed; by default as `Recipe` has it.
        source: Where the text comes from, to be remembered.
        name: The name by which the model was loaded, to be remembered.
        phase: phase(title) starts a phase and returns what is called with its progress.

    Raises:
        BudgetError, MethodError, InputError: for a recipe that this text cannot be compressed with.

    Examples:
        >>> from keepkv.models import loading
        >>> model, tokenizer = loading.load("smollm2")
        >>> text = "The ship Aurora left Bergen in May, with a crew of twelve and a cargo of salt. " * 3
        >>> document = compile_text(model, tokenizer, text, Recipe("40", "snapkv"))
        >>> document.tokens, document.cache.report().slots_per_head
        (85, 40.0)
    """
    prompt = Prompt(tokenizer, text)
    recipe = (recipe or Recipe()).settled(prompt.text.shape[1])
    recipe.refuse("a document", "lookback")
    ids = prompt.text.to(model.device)
    spans = prompt.spans(*recipe.keep)
    method = methods.get(recipe.method)
    lead = prompt.question(REPEAT).to(model.device)
    if recipe.exact and (recipe.chunk or not all(map(families.is_compressed, families.layer_kinds(model)))):
        raise InputError(
            "every key and value is kept only of a text that is read at once (--chunk 0), by a model with full attention in "
            "all layers"
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
    return Document(
        cache=cache,
        ids=ids,
        lead=prompt.lead,
        before=prompt.before,
        after=prompt.after,
        recipe=recipe,
        source=source,
        model=name,
        reading_seconds=reading.seconds,
        exact=exact,
    )


def save(
    document: Document,
    file: Path | str,
    model: PreTrainedModel | Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | str,
    with_ids: bool = True,
) -> None:
    """Writes a document to a .keep file, whole or not at all.

    Args:
        document: What to save. It must hold one text, without padding.
        file: Where to.
        model: The model, or its identity (`identity.of_model`) if that is there already.
        tokenizer: The tokenizer, or its identity (`identity.of_tokenizer`).
        with_ids: False leaves the token ids out, and so the text. The file can be asked, but it cannot be repaired when it is
            joined, or found in a store.

    Raises:
        InputError: if the file cannot be written, or the cache cannot be saved.

    Examples:
        >>> import tempfile
        >>> from keepkv.models import loading
        >>> model, tokenizer = loading.load("smollm2")
        >>> document = compile_text(model, tokenizer, "The ship Aurora left Bergen in May.", Recipe("50%", "snapkv"))
        >>> file = Path(tempfile.mkdtemp()) / "aurora.keep"
        >>> save(document, file, model, tokenizer)
        >>> load(file, model, tokenizer).recipe
        Recipe(budget='50%', method='snapkv', chunk=0)
    """
    header, tensors = pack(document.cache)
    header["keepkv"] = __version__
    header["model"] = {**_model_id(model), "name": document.model}
    header["tokenizer"] = _tokenizer_id(tokenizer)
    header["template"] = {"lead": document.lead, "before": document.before, "after": document.after}
    header["recipe"] = replace(document.recipe, exact=document.recipe.exact and document.exact is not None).to_dict()
    header["source"] = document.source
    header["reading_seconds"] = document.reading_seconds
    if with_ids and document.ids is not None:
        tensors["ids"] = document.ids.to(torch.int32)
    if document.exact is not None:
        if document.exact(0)[0].shape[2] != document.tokens:
            raise InputError("its exact keys and values are not those of all its tokens: replace(document, exact=None)")
        for index in range(len(document.cache.layers)):
            tensors[f"exact.{index}.keys"], tensors[f"exact.{index}.values"] = document.exact(index)
    write(Path(file), header, tensors)


def load(
    file: Path | str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | str,
    model_id: Mapping[str, Any] | None = None,
) -> Document:
    """The document of a .keep file, checked. Its cache is not live: what it reads from now on stays exact.

    Args:
        file: The file.
        model: The model that it was compiled with.
        tokenizer: Its tokenizer, or the tokenizer's identity (`identity.of_tokenizer`).
        model_id: The model's identity (`identity.of_model`) if that is there already; it costs a pass over the weights.

    Raises:
        InputError: for a file that is damaged, altered, of another model or tokenizer, or of a newer keepkv.

    Examples:
        >>> from keepkv.models import loading
        >>> model, tokenizer = loading.load("smollm2")
        >>> load("nowhere.keep", model, tokenizer)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        keepkv.errors.InputError: 'nowhere.keep' cannot be read (No such file or directory): ...
    """
    contents = Contents(Path(file))
    header = contents.header
    try:
        made_by = schema.mapping(header["model"])
        identity.check(str(file), made_by, model_id or identity.of_model(model))
        if header["tokenizer"] != _tokenizer_id(tokenizer):
            raise InputError(f"{str(file)!r} was compiled with another tokenizer or chat template: compile the document again")
        template = schema.mapping(header["template"])
        fields: dict[str, Any] = {
            "lead": schema.whole(template["lead"], 0, schema.whole(header["seen"])),
            "before": schema.text(template.get("before", "")),
            "after": schema.text(template["after"]),
            "recipe": Recipe.from_dict(schema.mapping(header["recipe"])),
            "source": schema.text(header["source"]),
            "model": schema.text(made_by["name"]),
            "reading_seconds": schema.number(header["reading_seconds"], 0),
        }
    except (KeyError, ValueError) as error:
        raise contents.broken("its header does not describe a document") from error
    cache = unpack(contents, model, model.device)
    ids = None
    if "ids" in contents:
        ids = contents.take("ids", 1, cache.get_seq_length(), dtype=torch.int32).long().to(model.device)
        if not 0 <= int(ids.min()) <= int(ids.max()) < model.config.get_text_config(decoder=True).vocab_size:
            raise contents.broken("its tokens are not the model's")
    exact = _ExactInFile(contents, cache, model) if "exact.0.keys" in contents else None
    return Document(cache, ids, exact=exact, **fields)


def model_of(file: Path) -> str:
    """The name by which the model was loaded that a file was compiled with; "" where it does not say so. Raises InputError."""
    contents = Contents(file)
    try:
        return schema.text(schema.mapping(contents.header["model"]).get("name", ""))
    except (KeyError, ValueError) as error:
        raise contents.broken("its header does not describe a document") from error


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    document: Document,
    questions: Sequence[str],
    max_new_tokens: int = 64,
    loading_seconds: float = 0.0,
    phase: Phase = silent,
) -> AskResult:
    """Answers questions about a document, each from its cache as it was compiled.

    Args:
        model: The model that it was compiled with.
        tokenizer: Its tokenizer.
        document: What is asked about; its cache stays as it is.
        questions: Each is asked on its own.
        max_new_tokens: Of each answer, at most.
        loading_seconds: To be reported as the time that loading took.
        phase: Told what is under way.

    Raises:
        InputError: for an empty question.

    Examples:
        >>> from keepkv.models import loading
        >>> model, tokenizer = loading.load("smollm2")
        >>> document = compile_text(model, tokenizer, "The ship Aurora left Bergen in May.", Recipe("50%", "snapkv"))
        >>> result = answer(model, tokenizer, document, ["Which ship?", "When?"], max_new_tokens=4)
        >>> [each.question for each in result.answers]
        ['Which ship?', 'When?']
    """
    later = [document.question(tokenizer, question).to(model.device) for question in questions]
    ids = document.ids
    if ids is None:  # generate() wants ids for everything that was read, and looks only at their number
        ids = torch.zeros(1, document.tokens, dtype=torch.int64, device=model.device)
    report = document.cache.report()
    progress = phase("answering")
    answers = []
    for question, tokens in zip(questions, later, strict=True):
        answers.append(greedy(model, tokenizer, document.cache.fork(), ids, tokens, question, max_new_tokens))
        progress(len(answers), len(questions))
    return AskResult(
        method=report.method,
        report=report,
        prefill_seconds=loading_seconds,
        compress_seconds=0.0,
        answers=tuple(answers),
        repeated=bool(report.repeat_seconds),
        loaded=True,
    )


class _ExactInFile:
    """Exact keys and values in a file, read and checked layer by layer when they are wanted."""

    def __init__(self, contents: Contents, cache: KeepCache, model: PreTrainedModel) -> None:
        heads, width = families.key_shape(model)
        self._contents = contents
        self._shape = (1, heads, cache.get_seq_length(), width)
        self._device = model.device
        self._dtypes = [layer.keys.dtype for layer in cache.layers]

    def __call__(self, index: int) -> tuple[Tensor, Tensor]:
        keys = self._contents.take(f"exact.{index}.keys", *self._shape, dtype=self._dtypes[index])
        values = self._contents.take(f"exact.{index}.values", *self._shape, dtype=self._dtypes[index])
        return keys.to(self._device), values.to(self._device)


def _first_tokens(exact: ExactLayers, tokens: int, index: int) -> tuple[Tensor, Tensor]:
    """A layer's exact keys and values, of the first tokens."""
    keys, values = exact(index)
    return keys[:, :, :tokens], values[:, :, :tokens]


def _tokenizer_id(tokenizer: PreTrainedTokenizerBase | str) -> str:
    return tokenizer if isinstance(tokenizer, str) else identity.of_tokenizer(tokenizer)


def _model_id(model: PreTrainedModel | Mapping[str, Any]) -> Mapping[str, Any]:
    return identity.of_model(model) if isinstance(model, PreTrainedModel) else model
