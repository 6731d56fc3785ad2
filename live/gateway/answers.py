"""From the pieces of a job's output to OpenAI's answers, whole or as a stream. Knows no socket."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from live.jobs import CHAT, Delta, Finished

_encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"


class AnswerHead:
    """What every piece of one answer says: id, model, when."""

    __slots__ = ("chat", "created", "id", "model", "tier")

    def __init__(self, answer_id: str, endpoint: str, model: str, tier: str | None) -> None:
        self.id = answer_id
        self.chat = endpoint == CHAT
        self.created = int(time.time())
        self.model = model
        self.tier = tier

    def fields(self, kind: str) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return head if self.tier is None else {**head, "service_tier": self.tier}


class EventStream:
    """Server-sent events of one answer."""

    __slots__ = ("_end", "_head", "_output_tokens", "_prefix", "_prompt_tokens", "_token_ids", "_usage")

    def __init__(
        self, head: AnswerHead, *, usage: bool, token_ids: bool, prompt_tokens: int | None = None
    ) -> None:
        """``usage``: stream_options.include_usage; ``token_ids``: vLLM's return_token_ids.

        ``prompt_tokens``: for vLLM's continuous_usage_stats, the prompt's length as it was counted here; the
        last event tells what the engine counted.
        """
        self._head = head
        self._usage = usage
        self._prompt_tokens = prompt_tokens
        self._output_tokens = 0
        self._token_ids = token_ids
        kind = "chat.completion.chunk" if head.chat else "text_completion"
        opening = _encode(head.fields(kind))[:-1]
        self._prefix = b"data: " + opening + b',"choices":['
        self._end = b'],"usage":null}\n\n' if usage else b"]}\n\n"

    def piece(self, output: Delta, index: int = 0) -> bytes:
        """One event. ``index``: what is added to the choice's own, where several prompts share an answer."""
        choice = output.choice
        if index or self._token_ids:
            choice = {**choice, "index": choice["index"] + index}
            if self._token_ids:
                choice["token_ids"] = output.token_ids
        if self._prompt_tokens is None:
            return self._prefix + _encode(choice) + self._end
        self._output_tokens += len(output.token_ids)
        so_far = _usage(self._prompt_tokens, self._output_tokens)
        return self._prefix + _encode(choice) + b'],"usage":' + _encode(so_far) + b"}\n\n"

    def end(self, ends: Sequence[Finished]) -> bytes:
        """What comes after the last piece."""
        if not self._usage:
            return DONE
        kind = "chat.completion.chunk" if self._head.chat else "text_completion"
        last = {**self._head.fields(kind), "choices": [], "usage": usage(ends)}
        return b"data: " + _encode(last) + b"\n\n" + DONE

    @staticmethod
    def error(content: Mapping[str, Any]) -> bytes:
        """An error after the stream has begun, as vLLM tells it."""
        return b"data: " + _encode(content) + b"\n\n" + DONE


def whole(head: AnswerHead, pieces: Sequence[Sequence[Delta]], ends: Sequence[Finished]) -> bytes:
    """The answer that does not stream: the pieces and the end of each prompt's job."""
    choices = []
    for number, deltas in enumerate(pieces):
        merged = _merged(deltas, head.chat)
        for index in sorted(merged):
            choice = merged[index]
            choice["index"] = number * len(merged) + index
            choice.setdefault("finish_reason", None)
            if choice["finish_reason"] is None:
                choice["finish_reason"] = ends[number].finish_reason
            choices.append(choice)
    kind = "chat.completion" if head.chat else "text_completion"
    return _encode({**head.fields(kind), "choices": choices, "usage": usage(ends)})


def usage(ends: Sequence[Finished]) -> dict[str, Any]:
    prompt = sum(end.prompt_tokens for end in ends)
    output = sum(end.output_tokens for end in ends)
    told = _usage(prompt, output)
    cached = sum(end.cached_tokens for end in ends)
    if cached:
        told["prompt_tokens_details"] = {"cached_tokens": cached}
    return told


def _usage(prompt: int, output: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def _merged(deltas: Sequence[Delta], chat: bool) -> dict[int, dict[str, Any]]:
    """The pieces put together, by choice."""
    choices: dict[int, dict[str, Any]] = {}
    texts: dict[int, list[str]] = {}
    for delta in deltas:
        piece = delta.choice
        index = piece.get("index", 0)
        choice = choices.get(index)
        if choice is None:
            choice = choices[index] = {"index": index, "logprobs": None, "finish_reason": None}
            if chat:
                choice["message"] = {"role": "assistant", "content": ""}
            texts[index] = []
        if chat:
            said = piece.get("delta") or {}
            if said.get("content"):
                texts[index].append(said["content"])
            if len(said) > 1:
                _merge_message(choice["message"], said)
        elif piece.get("text"):
            texts[index].append(piece["text"])
        for name, value in piece.items():
            if name == "logprobs":
                if value is not None:
                    choice["logprobs"] = _joined(choice["logprobs"], value)
            elif name not in ("index", "delta", "text") and value is not None:
                choice[name] = value
    for index, choice in choices.items():
        text = "".join(texts[index])
        if not chat:
            choice["text"] = text
        elif text or "tool_calls" not in choice["message"]:
            choice["message"]["content"] = text
        else:
            choice["message"]["content"] = None
    return choices


def _merge_message(message: dict[str, Any], said: Mapping[str, Any]) -> None:
    """All of a chat's delta but its content: texts are joined, tool calls by their index."""
    for name, value in said.items():
        if name in ("role", "content") or value is None:
            continue
        if name == "tool_calls":
            calls = message.setdefault("tool_calls", [])
            for call in value:
                _merge_tool_call(calls, call)
        elif isinstance(value, str):
            message[name] = message.get(name, "") + value
        else:
            message[name] = value


def _merge_tool_call(calls: list[dict[str, Any]], call: Mapping[str, Any]) -> None:
    index = call.get("index", len(calls))
    while len(calls) <= index:
        calls.append({"type": "function", "function": {"name": "", "arguments": ""}})
    known = calls[index]
    for name, value in call.items():
        if name == "function":
            for part, text in value.items():
                known["function"][part] = (known["function"].get(part) or "") + (text or "")
        elif name != "index" and value is not None:
            known[name] = value


def _joined(before: dict[str, Any] | None, value: Mapping[str, Any]) -> dict[str, Any]:
    """Log probabilities of more tokens: lists are joined name by name."""
    if before is None:
        return dict(value)
    return {
        name: (before.get(name) or []) + part if isinstance(part, list) else part
        for name, part in value.items()
    }
