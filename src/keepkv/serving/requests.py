"""Requests: what a client of `keepkv serve` may ask for, checked before the model hears of it.

Whatever is wrong with a request is a `RefusedError` with a status between 400 and 499: nothing that a client sends is an error
of the server. What is asked for is bounded by `Limits`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from keepkv import schema
from keepkv.serving.limits import Limits, RefusedError


@dataclass(frozen=True)
class Asked:
    """A request that can be answered.

    Attributes:
        body: As transformers' server is to get it.
        salt: With whom it may share caches, by its own wish; "" if it does not say so.
        seed: Of what is drawn by chance; None: any.
    """

    body: Mapping[str, Any]
    salt: str = ""
    seed: int | None = None


# The endpoints that answer, and how each names the tokens of an answer
ROUTES = {
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
}
_USUAL_ANSWER = 1024  # tokens, where a request does not say how many
_PARTS = ("text", "input_text", "output_text")


def asked(route: str, raw: bytes, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> Asked:
    """Checks a request.

    Args:
        route: One of ROUTES.
        raw: Its body.
        tokenizer: The model's, to count the prompt's tokens.
        limits: What it may cost.

    Raises:
        RefusedError: for whatever cannot be answered.
    """
    try:
        body = schema.parse(raw)
        texts = list(_texts(body))
    except ValueError as error:
        raise RefusedError(400, f"the body is not a JSON object of texts and numbers: {_told(error)}") from error
    try:
        _check_prompt(route, body)
        salt = schema.text(body.pop("cache_salt", "") or "")
        seed = body.pop("seed", None)
        if seed is not None:
            schema.whole(seed, -(2**63), 2**63 - 1)
        _check_settings(body)
        _bound_answer(route, body, limits)
        _check_template_settings(body, tokenizer)
    except ValueError as error:
        raise RefusedError(400, str(error)) from error
    if len(salt) > 256:
        raise RefusedError(400, "cache_salt is longer than 256 letters: give a shorter one, such as a random number")
    count = len(tokenizer("\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"])
    if count > limits.prompt:
        raise RefusedError(400, f"the prompt has about {count:,} tokens, and {limits.prompt:,} are allowed: shorten it")
    return Asked(body, salt, seed)


def _told(error: ValueError) -> str:
    """Why something is no JSON, without what it is: a decoder's own message may quote the text."""
    return str(error).splitlines()[0][:100] if type(error) is ValueError else "it cannot be decoded"


def _texts(value: Any) -> Iterator[str]:
    """Every text in it, names apart. Raises ValueError for half of a surrogate pair."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("a text holds half of a surrogate pair") from None
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
    elif isinstance(value, dict):
        for name, each in value.items():
            for _ in _texts(name):
                pass
            yield from _texts(each)


def _check_prompt(route: str, body: Mapping[str, Any]) -> None:
    """Raises ValueError unless there is something to answer."""
    if route == "/v1/completions":
        prompt = body.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise ValueError("prompt: expected a text that is not empty")
        return
    name = "messages" if route == "/v1/chat/completions" else "input"
    messages = body.get(name)
    if name == "input" and isinstance(messages, str) and messages.strip():
        return
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name}: expected a list of messages that is not empty")
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"{name}[{number}]: expected an object with a role and a content")
        if name == "messages" or "role" in message:
            _check_message(f"{name}[{number}]", message)
    if not any(text.strip() for message in messages for text in _texts({**message, "role": ""})):
        raise ValueError(f"{name}: all of them are empty")


def _check_message(where: str, message: Mapping[str, Any]) -> None:
    """Raises ValueError for a message that a chat template cannot show."""
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise ValueError(f'{where}.role: expected a text such as "user"')
    content, calls = message.get("content"), message.get("tool_calls")
    if calls is not None:
        _check_calls(where, calls)
    elif isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") not in _PARTS or not isinstance(part.get("text"), str):
                raise ValueError(
                    f"{where}.content: expected parts of type text, each with a text: this model reads nothing else"
                )
    elif not isinstance(content, str):
        raise ValueError(f"{where}.content: expected a text, or a list of parts of type text")


def _check_calls(where: str, calls: object) -> None:
    if not isinstance(calls, list) or not calls:
        raise ValueError(f"{where}.tool_calls: expected a list that is not empty")
    for call in calls:
        function = (call.get("function") or call) if isinstance(call, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        try:
            fits = isinstance(json.loads(arguments) if isinstance(arguments, str) else arguments, dict)
        except (ValueError, RecursionError):
            fits = False
        if not fits or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where}.tool_calls: expected functions, each with a name and arguments, an object in JSON")


def _check_settings(body: dict[str, Any]) -> None:
    """Raises ValueError for a setting of another type, or outside its bounds."""
    if body.get("generation_config") is not None:
        raise ValueError("generation_config: is not allowed here; give temperature, top_p, stop and the like instead")
    for name, least, most in (("temperature", 0.0, 2.0), ("top_p", 1e-6, 1.0), ("frequency_penalty", -0.9, 2.0)):
        if body.get(name) is not None:
            _within(name, body[name], least, most)
    if body.get("temperature") and body["temperature"] < 0.01:
        body["temperature"] = 0  # what a model's numbers divided by it would overflow to
    if body.get("stream") not in (None, True, False):
        raise ValueError("stream: expected true or false")
    if body.get("n") not in (None, 1):
        raise ValueError("n: only one answer is given to a request: expected 1")
    _check_lists(body)


def _check_lists(body: Mapping[str, Any]) -> None:
    """Raises ValueError for settings that have several values."""
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if (
        not isinstance(stops, list)
        or len(stops) > 8
        or not all(isinstance(each, str) and 0 < len(each) <= 100 for each in stops)
    ):
        raise ValueError("stop: expected a text, or up to 8 of them, of up to 100 letters each")
    bias = body.get("logit_bias") or {}
    if not isinstance(bias, dict) or len(bias) > 300 or not all(name.isascii() and name.isdecimal() for name in bias):
        raise ValueError("logit_bias: expected an object of up to 300 tokens, by number")
    for value in bias.values():
        _within("logit_bias", value, -100, 100)
    for name in ("tools", "suffix", "instructions"):
        kind = list if name == "tools" else str
        if body.get(name) is not None and not isinstance(body[name], kind):
            raise ValueError(f"{name}: expected a {'list' if kind is list else 'text'}")
    if not all(isinstance(tool, dict) for tool in body.get("tools") or []):
        raise ValueError("tools: expected a list of objects")


def _within(name: str, value: object, least: float, most: float) -> None:
    try:
        schema.number(value, least, most)
    except ValueError:
        raise ValueError(f"{name}: expected a number from {least:g} to {most:g}") from None


def _bound_answer(route: str, body: dict[str, Any], limits: Limits) -> None:
    """Sees to it that the answer has an end. Raises ValueError for a length that is not allowed."""
    names = [name for name in ROUTES[route] if body.get(name) is not None]
    for name in names:
        try:
            schema.whole(body[name], 1, limits.answer)
        except ValueError:
            raise ValueError(f"{name}: expected a whole number from 1 to {limits.answer:,}, the most that is allowed") from None
    if not names:
        body[ROUTES[route][-1]] = min(_USUAL_ANSWER, limits.answer)


def _check_template_settings(body: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError for settings of a chat template that are more than that, such as a template."""
    settings = body.get("chat_template_kwargs")
    if settings is None:
        return
    taken = set(inspect.signature(tokenizer.apply_chat_template).parameters)
    if not isinstance(settings, dict) or taken & set(settings):
        raise ValueError("chat_template_kwargs: expected an object with settings of the model's own chat template")
    if not all(value is None or isinstance(value, bool | int | float | str) for value in settings.values()):
        raise ValueError("chat_template_kwargs: expected texts, numbers, true and false as values")
