"""What the commands have in common: their options, and checks of what was typed. Heavy imports happen in the functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.markup import escape

from keepkv.cli.progress import err
from keepkv.errors import BudgetError, InputError
from keepkv.recipe import Recipe, RepeatMode, lookback_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT = Recipe()

COMPRESSION = "Compression"
MODEL = "Model"
OUTPUT = "Output"


def shown_default(default: str) -> str:
    """A default in words, as typer shows the others."""
    return escape(f"[default: {default}]")


def option(help: str, metavar: str, panel: str, *names: str, **settings: Any) -> Any:
    """An option in a panel of the help. Only defaults worth reading are shown: not those of empty values."""
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, **settings)


def flag(help: str, name: str, panel: str | None = None) -> Any:
    """An option without a value."""
    return typer.Option(name, help=help, metavar="", rich_help_panel=panel, show_default=False)


def argument(help: str, metavar: str) -> Any:
    """What stands at the command line without a name."""
    return typer.Argument(help=help, metavar=metavar, show_default=False)


F = TypeVar("F", bound=Callable[..., Any])


def command(group: typer.Typer, name: str | None = None, panel: str | None = None) -> Callable[[F], F]:
    """Adds a function to a group of commands; its docstring is the help text.

    In a docstring, lines that begin with "$ " are examples. Other lines are wrapped to the terminal.
    """

    def add(function: F) -> F:
        group.command(name, help=help_text(function.__doc__ or ""), rich_help_panel=panel)(function)
        return function

    return add


def help_text(docstring: str) -> str:
    """A docstring as typer shows it: prose without line breaks, examples in bold."""
    paragraphs = []
    for paragraph in inspect.cleandoc(docstring).split("\n\n"):
        if paragraph.startswith("$ "):
            examples = "\n".join(line.removeprefix("$ ") for line in paragraph.splitlines())
            paragraphs.append(f"\b[bold]{escape(examples)}[/bold]")
        else:
            paragraphs.append(" ".join(paragraph.split()))
    return "\n\n".join(paragraphs)


File = Annotated[str, argument("A text file, or - for standard input.", "FILE")]
Budget = Annotated[
    str,
    option(
        'How much of the cache to keep: a share of its bytes ("10%"), slots per KV head ("512"), or bytes ("64MB").',
        "BUDGET",
        COMPRESSION,
    ),
]
Method = Annotated[
    str, option("Compression method: see keepkv methods, or give your own as FILE.py:NAME.", "NAME", COMPRESSION)
]
SlotDtype = Annotated[
    str,
    option(
        'How the kept keys and values are stored: "float" is the dtype of the model, and "auto" tries int8 and int4.',
        "[auto|float|bfloat16|int8|int4|int2]",
        COMPRESSION,
    ),
]
Repeat = Annotated[
    RepeatMode,
    option(
        "Whether to feed the text a second time before it is compressed: details survive better, and reading takes about "
        'twice as long. "auto" does it if that fits into the length that the model was trained for.',
        "[auto|always|never]",
        COMPRESSION,
    ),
]
Keep = Annotated[
    list[str] | None,
    option(
        "Regular expression: what it matches is kept as it is in every head. May be given several times.",
        "REGEX",
        COMPRESSION,
        show_default=False,
    ),
]
Chunk = Annotated[
    int | None,
    option(
        "Read this many tokens at a time and compress in between, so that memory does not grow with the text. 0 reads "
        f"everything at once. {shown_default('2048 for texts of more than 8,192 tokens, otherwise 0')}",
        "TOKENS",
        COMPRESSION,
        min=0,
        show_default=False,
    ),
]
Lookback = Annotated[
    Any,
    option(
        "For each question, bring back so many tokens of the text, word for word, beside the compressed cache: 64 or more. "
        '"auto" is 256, or 512 for texts of more than 4,000 tokens. Passages are found by attention and, with '
        "pip install 'keepkv\\[eval]', by words, too.",
        "[auto|off|TOKENS]",
        COMPRESSION,
        parser=lookback_of,
    ),
]
Model = Annotated[str, option('"smollm2" (embedded, no network), a model folder, or a Hugging Face id.', "MODEL", MODEL)]
Device = Annotated[str, option('"cpu", "cuda", "cuda:1", "mps"; "auto" takes a GPU if there is one.', "DEVICE", MODEL)]
Dtype = Annotated[
    str,
    option(
        '"float32", "bfloat16" or "float16"; "auto" is float32 on a CPU, and elsewhere the dtype of the checkpoint.',
        "DTYPE",
        MODEL,
    ),
]
Seed = Annotated[int, option("Random seed: the same seed and the same input give the same result.", "N", MODEL)]
Repair = Annotated[
    float,
    option(
        'With several .keep files: the share of tokens ("15%") that is computed again with the other documents in view. '
        "Needs documents that were compiled with --exact.",
        "SHARE",
        COMPRESSION,
        parser=lambda text: share(text),
        show_default=False,
    ),
]
MaxNewTokens = Annotated[int, option("Maximum number of tokens in an answer.", "N", OUTPUT, min=1)]
Json = Annotated[bool, flag("Print JSON to standard output, and nothing else.", "--json", OUTPUT)]
Debug = Annotated[bool, flag("Show the stack trace of an error.", "--debug")]


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


def checked(recipe: Recipe, auto: bool = False) -> Recipe:
    """The recipe, whose method, budget and slot dtype can be used. auto: whether the command can find a budget.

    Raises:
        MethodError: for an unknown method.
        BudgetError: for a budget that cannot be read, or is too small for any text.
        InputError: for an unknown slot dtype.
    """
    from keepkv.budget import MIN_SLOTS
    from keepkv.cache.policy import Policy

    if recipe.auto_budget and not auto:
        raise BudgetError("--budget auto is only for keepkv ask, which tries several budgets on the whole text: give a budget")
    policy = Policy.of("100%" if recipe.auto_budget else recipe.budget, recipe.method, recipe.slot_dtype)
    for budget in policy.budgets:
        if budget.kind == "count" and budget.amount < MIN_SLOTS:
            raise BudgetError(
                f"budget {budget.text!r} is {budget.amount:g} slots per KV head, fewer than the {MIN_SLOTS} that must be kept: "
                f'give at least {MIN_SLOTS}, or a share such as "10%"'
            )
    return recipe


def listed(text: str, option: str, check: Callable[[str], object]) -> list[str]:
    """What stands between commas, each once, and each known. Raises InputError for nothing, and what `check` raises."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise InputError(f"{option} is empty: give at least one name, or several separated by commas")
    for name in names:
        check(name)
    return names


def warn_if_long(model: PreTrainedModel, tokens: int) -> None:
    """Says on standard error when a model is asked for more tokens than it was trained for."""
    from keepkv.models.families import length_warning

    if warning := length_warning(model, tokens):
        err.print(f"[yellow]warning:[/yellow] {escape(warning)}")


def was_typed(context: typer.Context, name: str) -> bool:
    """Whether an option was given, rather than left to its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
