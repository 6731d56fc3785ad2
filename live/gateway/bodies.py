"""The bodies of /v1/completions and /v1/chat/completions: what is checked here, and what it means.

What OpenAI defines is checked; what an engine adds (vLLM's own parameters) goes through as it is, and the
engine checks it.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from live.gateway.errors import ApiError
from live.jobs import CHAT


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """vLLM's: every event tells the usage so far."""


class _Common(msgspec.Struct):
    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    user: str | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: int | None = None
    """vLLM's: a request that is resumed reckons with it."""
    metadata: dict[str, Any] | None = None


class CompletionBody(_Common, kw_only=True):
    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    best_of: int | None = None
    logprobs: int | None = None
    suffix: str | None = None


class Message(msgspec.Struct):
    role: str
    content: str | list[Any] | None = None
    tool_calls: list[Any] | None = None


class ChatBody(_Common, kw_only=True):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    response_format: dict[str, Any] | None = None


_decode = msgspec.json.Decoder().decode

PINNING = (
    "presence_penalty",
    "frequency_penalty",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
    "echo",
    "best_of",
    "suffix",
    "tools",
    "functions",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
    "use_beam_search",
)
"""Parameters with which an engine cannot go on from the tokens that another engine generated."""


def parse(raw: bytes | bytearray) -> dict[str, Any]:
    """The body as plain data. Raises ApiError 400 where it is no JSON object."""
    try:
        body = _decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"We could not parse the JSON body of your request: {error}.") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"The body of the request is no JSON object but {type(body).__name__}.")
    return body


def check(body: dict[str, Any], endpoint: str) -> CompletionBody | ChatBody:
    """The body's fields. Raises ApiError 400 that names the parameter, what was found and what is right."""
    kind: type[CompletionBody | ChatBody] = ChatBody if endpoint == CHAT else CompletionBody
    try:
        fields = msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        message = str(error)
        _, _, path = message.partition(" - at `$.")
        if message.startswith("Object missing required field"):
            path = message.split("`")[1]
        raise ApiError(400, f"{message}.", param=path.rstrip("`") or None) from None
    _check_numbers(fields)
    if isinstance(fields, ChatBody):
        if not fields.messages:
            raise ApiError(
                400, "messages: found an empty list, expected at least one message.", param="messages"
            )
    elif not fields.prompt and not isinstance(fields.prompt, str):
        raise ApiError(400, "prompt: found an empty list, expected a text or tokens.", param="prompt")
    if fields.stream_options is not None and not fields.stream:
        raise ApiError(400, "stream_options: expected only with stream = true.", param="stream_options")
    return fields


def _check_numbers(fields: CompletionBody | ChatBody) -> None:
    bounds: list[tuple[str, float | None, float, float]] = [
        ("max_tokens", fields.max_tokens, 1, 2**31),
        ("n", fields.n, 1, 128),
        ("temperature", fields.temperature, 0, 2),
        ("top_p", fields.top_p, 0, 1),
        ("presence_penalty", fields.presence_penalty, -2, 2),
        ("frequency_penalty", fields.frequency_penalty, -2, 2),
    ]
    if isinstance(fields, ChatBody):
        bounds.append(("max_completion_tokens", fields.max_completion_tokens, 1, 2**31))
    for name, value, least, most in bounds:
        if value is not None and not least <= value <= most:
            raise ApiError(
                400, f"{name}: found {value!s:.40}, expected a number from {least} to {most}.", param=name
            )


def max_tokens_of(fields: CompletionBody | ChatBody) -> int | None:
    """Most tokens to generate, where the client says it."""
    if isinstance(fields, ChatBody):
        return fields.max_completion_tokens or fields.max_tokens
    return fields.max_tokens if fields.max_tokens is not None else 16  # OpenAI's default


def prompts_of(fields: CompletionBody) -> list[str | list[int]]:
    """The prompts of a completion: one, or one for each text or token list of a list."""
    prompt = fields.prompt
    if isinstance(prompt, str):
        return [prompt]
    if all(isinstance(each, int) for each in prompt):
        return [prompt]  # type: ignore[list-item]
    if any(isinstance(each, int) for each in prompt):
        raise ApiError(400, "prompt: found tokens and texts mixed, expected one kind.", param="prompt")
    return prompt  # type: ignore[return-value]


def is_pinned(body: Mapping[str, Any], fields: CompletionBody | ChatBody) -> bool:
    """Whether a request that has said something cannot be resumed on another engine."""
    if fields.n is not None and fields.n > 1:
        return True
    if body.get("response_format") not in (None, {"type": "text"}):
        return True
    if isinstance(fields, CompletionBody) and fields.logprobs is not None:
        return True  # 0 asks for those of the tokens themselves
    if isinstance(fields, ChatBody) and not is_plain(fields):
        return True  # it would go on from its tokens, without images
    return any(body.get(name) for name in PINNING)


def texts_of(message: Message) -> list[str]:
    """The texts of a message's content, without its other parts: images, audio."""
    content = message.content
    if isinstance(content, str):
        return [content]
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return [text for text in texts if isinstance(text, str)]


def is_plain(fields: ChatBody) -> bool:
    """Whether the messages are nothing but text."""
    return all(
        len(texts_of(each)) == len(each.content) for each in fields.messages if isinstance(each.content, list)
    )
