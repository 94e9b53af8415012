"""What the commands have in common: their options, and checks of what was typed. Heavy imports happen in the functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from keepkv.cli.progress import err
from keepkv.errors import BudgetError, InputError
from keepkv.recipe import Recipe, RepeatMode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT = Recipe()


def share(text: str | float) -> float:
    """A share from "15%" or "0.15", 0 to 1. Raises InputError."""
    from keepkv.budget import Budget as Limit

    if str(text) in ("0", "0.0", "0%"):
        return 0.0
    try:
        budget = Limit.parse(text)
    except BudgetError:
        budget = None
    if budget is None or budget.kind != "fraction":
        raise InputError(f'{text!r} is not a share: expected "15%" or "0.15", at most 100%')
    return budget.amount


File = Annotated[str, typer.Argument(help="A text file, or - for standard input.", show_default=False)]
Budget = Annotated[str, typer.Option(help='Share of the tokens ("0.1", "10%"), slots per KV head ("512") or bytes ("64MB").')]
Method = Annotated[str, typer.Option(help="How to compress: see keepkv methods; your own as FILE.py:NAME.")]
SlotDtype = Annotated[str, typer.Option(help="How slots are stored: float (as the model has them), int8 or int4.")]
Model = Annotated[str, typer.Option(help="smollm2 (embedded, no network), a folder, or a Hugging Face id.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16; auto is float32 on a CPU, else as saved.")]
Seed = Annotated[int, typer.Option(help="Same seed, same input: same result.")]
Repeat = Annotated[
    RepeatMode,
    typer.Option(help="Repeat the text before compressing, so that details survive (slower); auto: where that fits."),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(metavar="REGEX", help="What it matches stays verbatim; may be given more than once.", show_default=False),
]
Chunk = Annotated[
    int | None,
    typer.Option(
        min=0, show_default=False,
        help="Read so many tokens at a time and compress on the way: memory does not grow with the text. 0: all at once. "
        "Default: 2048 for texts of more than 8,192 tokens, otherwise 0.",
    ),
]  # fmt: skip
Repair = Annotated[
    float,
    typer.Option(
        parser=share, metavar="SHARE",
        help='Of joined documents: the share of tokens ("15%") read again with the others in view; needs compile --exact.',
    ),
]  # fmt: skip
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Maximum number of tokens in an answer.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output, nothing else there.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the stack trace of an error.")]


def checked(recipe: Recipe) -> Recipe:
    """The recipe, whose method, budget and storage are known and readable. Raises MethodError, BudgetError, InputError."""
    from keepkv.cache.policy import Policy

    Policy.of("100%" if recipe.auto_budget else recipe.budget, recipe.method, recipe.slot_dtype)
    return recipe


def listed(text: str, option: str, check: Callable[[str], object]) -> list[str]:
    """What stands between commas, each once, and each known. Raises InputError for nothing, and what `check` raises."""
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise InputError(f"{option}: nothing to do: give at least one, or several separated by commas")
    for part in parts:
        check(part)
    return parts


def warn_if_long(model: PreTrainedModel, tokens: int) -> None:
    """Says on standard error when a model is asked for more tokens than it was trained for."""
    from keepkv.models.families import length_warning

    if warning := length_warning(model, tokens):
        err.print(f"[yellow]warning:[/yellow] {warning}")


def was_typed(context: typer.Context, name: str) -> bool:
    """Whether an option was given, rather than left to its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
