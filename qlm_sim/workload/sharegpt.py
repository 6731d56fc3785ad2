"""Reads ShareGPT JSON: conversations in, the token lengths of the first exchange of each, or of all, out.

Knows no other format. The file is read in pieces and its text is let go as soon as it is counted, so
memory stays small however large the file. A file cut off in the middle is read up to the cut.
"""

import json
import re
from collections.abc import Callable, Iterator

import numpy as np

from qlm_sim.errors import InputError
from qlm_sim.workload.files import Progress, text_chunks
from qlm_sim.workload.tables import shorten
from qlm_sim.workload.tokenizers import TokenCounter
from qlm_sim.workload.workload import Trace, unique_ids

HUMANS = frozenset({"human", "user"})
ASSISTANTS = frozenset({"gpt", "chatgpt", "bing", "bard", "assistant"})


def read_sharegpt(
    path: str, name: str, counter: TokenCounter, progress: Progress | None, warn: Callable[[str], None]
) -> Trace:
    """One request per conversation: its first human turn that an assistant's turn follows, and that turn.

    So does vLLM's benchmark, but that it takes the first two turns, whoever speaks. Conversations
    without such an exchange, or with a blank side of it, are left out and counted in a warning. The
    prompt counts the special tokens that an engine adds; the output counts its text alone.
    """
    ids: list[str] = []
    total = 0

    def texts() -> Iterator[str]:
        nonlocal total
        for conversation in _elements(path, progress, warn):
            total += 1
            conversation_id, exchange = _first_exchange(conversation, f"{path}: conversation {total:,}")
            if exchange and exchange[0].strip() and exchange[1].strip():
                ids.append(conversation_id or str(total))
                yield from exchange

    prompt, output = counter.count(texts()).reshape(-1, 2).T
    if not ids:
        raise InputError(
            f"{path}: none of {total:,} conversations has a human turn that an assistant answers"
        )
    if len(ids) < total:
        warn(
            f"{path}: {total - len(ids):,} of {total:,} conversations are left out: "
            "no human turn with an assistant's answer after it"
        )
    return Trace(
        name=name,
        ids=unique_ids(ids),
        prompt_tokens=prompt + counter.prompt_extra_tokens,
        output_tokens=output.copy(),
    )


def read_sharegpt_turns(
    path: str, name: str, counter: TokenCounter, progress: Progress | None, warn: Callable[[str], None]
) -> Trace:
    """One request for each turn that an assistant's turn follows; all turns before it are in its prompt.

    So the requests of a conversation begin alike, and their content is the conversation's id. Conversations
    without a whole exchange are left out and counted in a warning, as are answers that are blank.
    """
    talks: list[tuple[str, list[bool]]] = []
    """Of each conversation: id, and of each turn whether an assistant speaks."""

    def texts() -> Iterator[str]:
        for number, conversation in enumerate(_elements(path, progress, warn), 1):
            conversation_id, turns = _turns(conversation, f"{path}: conversation {number:,}")
            talks.append((conversation_id or str(number), [speaker in ASSISTANTS for speaker, _ in turns]))
            for _, text in turns:
                yield text

    counts = iter(counter.count(texts()).tolist())
    names = unique_ids([talk_id for talk_id, _ in talks])
    ids: list[str] = []
    content: list[str] = []
    prompts: list[int] = []
    outputs: list[int] = []
    empty = 0
    for talk_name, (_, answers) in zip(names, talks, strict=True):
        before, exchanges = 0, 0
        for place, answer in enumerate(answers):
            tokens = next(counts)
            if answer and before and tokens and not answers[place - 1]:
                exchanges += 1
                ids.append(f"{talk_name}/{exchanges}")
                content.append(_stream(talk_name))
                prompts.append(before + counter.prompt_extra_tokens)
                outputs.append(tokens)
            before += tokens
        empty += not exchanges
    if not ids:
        raise InputError(
            f"{path}: none of {len(talks):,} conversations has a human turn that an assistant answers"
        )
    if empty:
        warn(
            f"{path}: {empty:,} of {len(talks):,} conversations are left out: "
            "no human turn with an assistant's answer after it"
        )
    return Trace(
        name=name,
        ids=unique_ids(ids),
        prompt_tokens=np.array(prompts, dtype=np.int64),
        output_tokens=np.array(outputs, dtype=np.int64),
        content=content,
    )


def _stream(name: str) -> str:
    """The name as that of a stream: without what has a meaning there."""
    return re.sub(r"[\s:]", "_", name)


def _elements(path: str, progress: Progress | None, warn: Callable[[str], None]) -> Iterator[object]:
    """The elements of the file's JSON array, one at a time, up to its end or the cut."""
    text = _Text(path, text_chunks(path, progress))
    if text.next_sign() != "[":
        raise text.error(text.at, "the file does not start with '['; a JSON array would be right")
    text.at += 1
    count = 0
    while (sign := text.next_sign()) != "]":
        if count and sign == ",":
            text.at += 1
            text.next_sign()
        elif count and sign:
            raise text.error(text.at, f"{sign!r} after conversation {count:,}; ',' or ']' would be right")
        try:
            yield text.value()
        except EOFError:
            if not count:
                raise InputError(f"{path}: cut off before its first conversation is whole") from None
            warn(
                f"{path}: cut off at byte {text.bytes:,}, after {count:,} whole conversations, which are used"
            )
            return
        count += 1
    text.at += 1
    if sign := text.next_sign():
        raise text.error(text.at, f"{sign!r} after the closing ']'; nothing would be right")


def _turns(conversation: object, where: str) -> tuple[str, list[tuple[str, str]]]:
    """The conversation's id, and (speaker, text) of its turns."""
    if not isinstance(conversation, dict) or not isinstance(conversation.get("conversations"), list):
        raise InputError(f'{where}: {shorten(conversation)}; {{"id", "conversations": [...]}} would be right')
    turns = []
    for turn in conversation["conversations"]:
        if (
            not isinstance(turn, dict)
            or not isinstance(speaker := turn.get("from"), str)
            or not isinstance(value := turn.get("value"), str)
        ):
            raise InputError(f'{where}: turn {shorten(turn)}; {{"from": text, "value": text}} would be right')
        turns.append((speaker, value))
    return str(conversation.get("id", "")), turns


def _first_exchange(conversation: object, where: str) -> tuple[str, tuple[str, str] | None]:
    """The conversation's id, and its first human turn with the answer."""
    conversation_id, turns = _turns(conversation, where)
    prompt: str | None = None
    for speaker, value in turns:
        if prompt is not None and speaker in ASSISTANTS:
            return conversation_id, (prompt, value)
        prompt = value if speaker in HUMANS else None
    return conversation_id, None


_MARGIN = 16
"""A fault of JSON this many characters before the text's end is not the fault of its ending there."""

_SPACE = re.compile(r"[ \t\r\n]*")
_decode = json.JSONDecoder().raw_decode


class _Text:
    """The part of a long text that is not read yet: grows at its end, forgets what is read."""

    def __init__(self, path: str, chunks: Iterator[str]) -> None:
        self.path = path
        self.chunks = chunks
        self.text = ""
        self.at = 0
        """Where to read on in ``text``."""
        self.lines = 0
        """Lines that end before ``text``."""
        self.bytes = 0
        """Bytes of the file up to the end of ``text``."""

    def next_sign(self) -> str:
        """The next character that is no space, not read over; "" at the end."""
        while True:
            match = _SPACE.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text) or not self._grow():
                return self.text[self.at : self.at + 1]

    def value(self) -> object:
        """The JSON value that starts here, read over; EOFError where the file ends inside it."""
        while True:
            try:
                value, self.at = _decode(self.text, self.at)
                return value
            except json.JSONDecodeError as error:
                open_end = error.msg.startswith("Unterminated string")
                if not open_end and error.pos < len(self.text) - _MARGIN:
                    raise self.error(error.pos, f"{error.msg}; valid JSON would be right") from None
            if not self._grow():
                raise EOFError

    def error(self, at: int, message: str) -> InputError:
        line = self.lines + self.text.count("\n", 0, at) + 1
        return InputError(f"{self.path}: line {line:,}: {message}")

    def _grow(self) -> bool:
        """Take in as much again as is held, so that a long value is not decoded too often."""
        self.lines += self.text.count("\n", 0, self.at)
        pieces = [self.text[self.at :]]
        held, grown = len(pieces[0]), 0
        for chunk in self.chunks:
            pieces.append(chunk)
            grown += len(chunk)
            self.bytes += len(chunk.encode())
            if grown > held:
                break
        self.text, self.at = "".join(pieces), 0
        return grown > 0
