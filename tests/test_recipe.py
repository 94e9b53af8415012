"""Recipe: one value with every setting, whose defaults are everybody's."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields, replace

import pytest
import torch

from helpers import FOX, make_model
from keepkv import InputError, KeepCache, Method, Recipe
from keepkv.cli.app import app
from keepkv.documents.document import compile_text
from keepkv.inspection.anatomy import inspect as inspection
from keepkv.methods import METHODS
from keepkv.recipe import CONVERSATION, SERVER
from keepkv.serving.transformers_server import PromptCaches
from keepkv.text.ask import ask
from keepkv.text.conversation import Conversation
from keepkv.text.prompt import Prompt

SETTINGS = {field.name: field.default for field in fields(Recipe)}


def test_the_cache_has_the_recipes_defaults() -> None:
    for name, parameter in inspect.signature(KeepCache).parameters.items():
        if name in SETTINGS:
            assert parameter.default == SETTINGS[name], name


def test_every_option_of_the_command_line_has_the_recipes_default() -> None:
    """But for chat and serve, which have named recipes of their own, and fidelity, which never repeats unless asked to."""
    for command in app.registered_commands:
        name = command.callback.__name__
        for option, parameter in inspect.signature(command.callback).parameters.items():
            if option in SETTINGS and name in ("ask", "compile", "add", "inspect"):
                default = () if parameter.default is None and option == "keep" else parameter.default
                assert default == SETTINGS[option], (name, option)


def test_it_goes_through_json_and_back() -> None:
    recipe = Recipe("5%", "snapkv", "int4", "always", ("a+", "b"), chunk=64, seed=3, exact=True)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert Recipe(method=METHODS["snapkv"]).to_dict()["method"] == "snapkv"


def test_it_says_what_is_not_the_default() -> None:
    assert repr(Recipe()) == "Recipe()"
    assert repr(Recipe(budget=512, seed=1)) == "Recipe(budget=512, seed=1)"


def test_a_cache_is_made_by_a_recipe() -> None:
    model = make_model(dtype=torch.float32)
    recipe = Recipe("20%", "snapkv", "int8", chunk=32, period=16, tail=4, references=128, seed=5)
    made, same = KeepCache.of(model, recipe), KeepCache(
        model, "20%", "snapkv", slot_dtype="int8", chunk=32, period=16, tail=4, references=128, seed=5
    )  # fmt: skip
    assert made.recipe == same.recipe
    assert made.policy == same.policy
    assert isinstance(made.recipe.method, Method)
    assert made.recipe == replace(recipe, method=METHODS["snapkv"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repeat": "recall"}, "repeat='recall'"),
        ({"backing": "tape"}, "expected 'cpu', 'disk' or None"),
        ({"lookback": 63}, "expected 'auto', 'off' or at least 64 tokens"),
        ({"keep": "a+"}, r"as in keep=\('a\+',\)"),
    ],
)
def test_what_it_cannot_be_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe(**settings)


def test_long_texts_are_read_in_chunks_unless_a_budget_is_to_be_found() -> None:
    assert Recipe().settled(8192).chunk == 0
    assert Recipe().settled(8193).chunk == 2048
    assert Recipe(budget="auto").settled(100_000).chunk == 0
    assert Recipe(chunk=64).settled(10).chunk == 64


@pytest.mark.parametrize(
    "unused",
    [{"keep": ("Miller",)}, {"exact": True}, {"repeat": "always"}, {"tolerance": 0.5}, {"chunk": 64}, {"lookback": "auto"}],
    ids=str,
)
def test_what_would_be_ignored_is_refused(model_and_tokenizer, unused: dict) -> None:
    model, tokenizer = model_and_tokenizer
    (name,) = unused
    refusing = {
        "conversation": lambda: Conversation(model, tokenizer, replace(CONVERSATION, **unused)),
        "server": lambda: PromptCaches(replace(SERVER, **unused)),
        "inspection": lambda: inspection(model, tokenizer, Prompt(tokenizer, FOX), "", Recipe(**unused)),
        "answers": lambda: ask(model, tokenizer, Prompt(tokenizer, FOX), ["?"], Recipe(**unused)),
    }
    refusing["document"] = lambda: compile_text(model, tokenizer, FOX, Recipe(**unused))
    looking_back = ["conversation", "server", "inspection", "document"]
    by_setting = {"chunk": ["inspection"], "exact": [*looking_back[:3], "answers"], "lookback": looking_back}
    for user in by_setting.get(name, ["conversation", "server"]):
        with pytest.raises(InputError, match=f"{name}=.* has no effect on .*{user}"):
            refusing[user]()
