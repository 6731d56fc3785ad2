"""What a request's tokens are, as far as it matters to prefix caching: which requests begin alike.

Content is text of the form ``system:400 chat-7``: runs of tokens, each out of a stream of that name from
the stream's start on. A run without a length, the last, goes on to the end of the request, its output
included. So the turns of a conversation all have one name, and each turn's prompt begins with the turn
before and its answer. What comes behind the last run is the request's own, as is all where content is "".

Knows no engine and no file format.
"""

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence

Content = tuple[tuple[int, Hashable], ...]
"""Runs as (first token, chain). Two requests whose tokens are equal up to the end of a run have the same
chains up to there: a chain stands for its stream and all that comes before it."""

_RUN = re.compile(r"([^\s:]+)(?::([1-9]\d*))?")


def parse_content(text: str) -> list[tuple[str, int | None]]:
    """Runs as (stream, tokens), with None for the last where it is open. ValueError says what is wrong."""
    runs: list[tuple[str, int | None]] = []
    for word in text.split():
        match = _RUN.fullmatch(word)
        if match is None:
            raise ValueError(f"{word!r}; NAME:TOKENS would be right")
        if runs and runs[-1][1] is None:
            raise ValueError(f"{word!r} after {runs[-1][0]!r}, which has no length; only the last may do so")
        runs.append((match[1], int(match[2]) if match[2] else None))
    return runs


def hash_block_tokens(prompt_tokens: Sequence[int], ids: Sequence[int]) -> int | None:
    """How many tokens each hash id stands for, told by how many ids the prompts have.

    Mooncake's 512 if they fit, else another power of two, else None. A last part that is not whole may have
    an id or not.
    """
    for size in (512, *(1 << bits for bits in range(4, 13))):
        if all(
            tokens // size <= count <= -(-tokens // size)
            for tokens, count in zip(prompt_tokens, ids, strict=True)
        ):
            return size
    return None


def content_of_hashes(ids: Sequence[int], prompt_tokens: int, size: int) -> str:
    """Content of a prompt whose parts of ``size`` tokens have these ids; what is generated is its own."""
    runs = [f"{each}:{size}" for each in ids]
    rest = prompt_tokens - (len(ids) - 1) * size
    if runs and rest < size:
        runs[-1] = f"{ids[-1]}:{rest}"
    return " ".join(runs)


def again(text: str, use: int) -> str:
    """The content of a request that is used for the second, third, ... time: alike, yet of other tokens."""
    return " ".join(
        f"{stream}#{use}" + ("" if tokens is None else f":{tokens}") for stream, tokens in parse_content(text)
    )


def contents(ids: Iterable[str], texts: Iterable[str]) -> Iterator[Content]:
    """The Content of each request, one after the other."""
    chains: dict[tuple[int, int, str], int] = {}
    for request_id, text in zip(ids, texts, strict=True):
        runs: list[tuple[int, Hashable]] = []
        start: int | None = 0
        chain = 0
        for stream, tokens in parse_content(text):
            assert start is not None
            chain = chains.setdefault((chain, start, stream), len(chains) + 1)
            runs.append((start, chain))
            start = None if tokens is None else start + tokens
        if start is not None:
            runs.append((start, request_id))
        yield tuple(runs)
