"""Reads OpenAI batch JSONL: the requests that a batch file asks for.

Knows nothing of answers, for the file holds none: the most tokens that a request may generate stands
in for its output length, and a warning says so.
"""

from collections.abc import Callable, Iterator

import numpy as np

from qlm_sim.errors import InputError
from qlm_sim.workload.files import Progress
from qlm_sim.workload.tables import MOST, json_lines, shorten
from qlm_sim.workload.tokenizers import TokenCounter
from qlm_sim.workload.workload import Trace

LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")


def read_openai_batch(
    path: str, name: str, counter: TokenCounter, progress: Progress | None, warn: Callable[[str], None]
) -> Trace:
    """One request per line; prompts count the text of all messages, not the chat template around them."""
    ids: dict[str, None] = {}
    models: list[str] = []
    limits: list[int] = []

    def texts() -> Iterator[str]:
        for line, row in json_lines(path, progress):
            where = f"{path}: line {line}"
            custom_id, body = row.get("custom_id"), row.get("body")
            if not isinstance(custom_id, str) or custom_id in ids:
                raise InputError(
                    f"{where}: custom_id is {shorten(custom_id)}; text of its own would be right"
                )
            if not isinstance(body, dict):
                raise InputError(f"{where}: body is {shorten(body)}; a JSON object would be right")
            ids[custom_id] = None
            models.append(str(body.get("model", "")))
            limits.append(_limit(body, where))
            yield _prompt(body, where)

    prompt_tokens = counter.count(texts()) + counter.prompt_extra_tokens
    if not ids:
        raise InputError(f"{path}: the file holds no request")
    warn(f"{path}: a batch file tells no output lengths: every request is taken to generate its max_tokens")
    output_tokens = np.array(limits, dtype=np.int64)
    return Trace(
        name=name,
        ids=list(ids),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        model=models,
        max_tokens=output_tokens,
        foreign_models=True,
    )


def _limit(body: dict[str, object], where: str) -> int:
    for key in LIMITS:
        limit = body.get(key)
        if limit is not None:
            if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MOST:
                raise InputError(
                    f"{where}: body.{key} is {shorten(limit)}; a whole number from 1 would be right"
                )
            return limit
    raise InputError(
        f"{where}: no body.max_tokens, which stands in for the output length that a batch file does not tell"
    )


def _prompt(body: dict[str, object], where: str) -> str:
    """The text of the messages, or of the prompt, in one piece."""
    messages = body.get("messages", body.get("prompt", body.get("input")))
    if isinstance(messages, str):
        return messages
    contents = []
    for message in messages if isinstance(messages, list) else [None]:
        content = message.get("content") if isinstance(message, dict) else None
        parts = content if isinstance(content, list) else [{"text": content}]
        for part in parts:
            text = part.get("text", "") if isinstance(part, dict) else None
            if not isinstance(text, str):
                raise InputError(
                    f"{where}: body's prompt is {shorten(messages)}; "
                    'prompt: text, or messages: [{"role", "content"}], would be right'
                )
            contents.append(text)
    return "\n".join(contents)
