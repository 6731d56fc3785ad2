"""The fake's text: made up, and the same whenever the tokens before it are the same.

So text can be compared as that of a real model under greedy decoding: a request that is taken up again
from its prompt and some generated tokens goes on as it would have. One character in forty takes two tokens,
of which the first has no text of its own, as partial UTF-8 has none.
"""

from collections.abc import Sequence

VOCABULARY = 4096
END = 2
"""End of text."""
HALF, REST = 3, 4
"""The two tokens of one character."""
_FIRST = 5
_PRIME = (1 << 61) - 1
_FACTOR = 1_000_003
_BROKEN = "�"
_SYLLABLES = ("ka", "lo", "mi", "ra", "tu", "ve", "so", "ni", "pe", "da", "gu", "fi", "zo", "be", "ha", "wu")


def _word(token: int) -> str:
    rest = token - _FIRST
    parts = []
    for _ in range(3):
        parts.append(_SYLLABLES[rest % 16])
        rest //= 16
    return (" " if token % 3 else "") + "".join(parts)


WORDS = ["", "", "", "", "é", *(_word(token) for token in range(_FIRST, VOCABULARY))]
"""Text by token."""


def tokenize(text: str) -> list[int]:
    """About a token per four characters, as real tokenizers; there is no way back."""
    data = text.encode()
    return [
        _FIRST + int.from_bytes(data[at : at + 4], "little") % (VOCABULARY - _FIRST)
        for at in range(0, len(data), 4)
    ]


def detokenize(tokens: Sequence[int]) -> str:
    return "".join(words(tokens))


def words(tokens: Sequence[int]) -> list[str]:
    """The text that each token adds when nothing is known of those before the first."""
    texts = [WORDS[token % VOCABULARY] for token in tokens]
    for at, token in enumerate(tokens):
        if token == REST and (at == 0 or tokens[at - 1] != HALF):
            texts[at] = _BROKEN
    return texts


def generate(model: str, prompt: Sequence[int], most: int, mean_tokens: float, ignore_end: bool) -> list[int]:
    """What ``model`` says after ``prompt``: at most ``most`` tokens; END is the last where it ends itself.

    Lengths are geometric about ``mean_tokens``.
    """
    state = sum(model.encode()) + 1
    for token in prompt:
        state = (state * _FACTOR + token + 1) % _PRIME
    last = prompt[-1] if prompt else 0
    end_below = int(_PRIME / mean_tokens)
    said: list[int] = []
    while len(said) < most:
        mixed = (state ^ (state >> 29)) * 0x9E3779B97F4A7C15 % _PRIME
        if last == HALF:
            token = REST
        elif mixed < end_below and not ignore_end:
            token = END
        else:
            mixed = (mixed ^ (mixed >> 31)) * 0xBF58476D1CE4E5B9 % _PRIME
            token = HALF if mixed % 40 == 0 else _FIRST + mixed // 40 % (VOCABULARY - _FIRST)
        said.append(token)
        if token == END:
            break
        state = (state * _FACTOR + token + 1) % _PRIME
        last = token
    return said
