"""What one request has said over all its attempts, and from which token it can go on elsewhere.

An engine tells tokens and text, and text may lag behind: a token may end in the middle of a character, and
with stop strings the engine holds back so many characters that none of them can slip out. A request goes on
from the last token whose text is out in full; what is said again after that is dropped. Under greedy
decoding the text is then the same as if nothing had happened. Where tokens are sampled, those that are cut
off may come out differently, and with stop strings the few characters held back may not match.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from live.jobs import Resume


class Transcript:
    __slots__ = (
        "_held_back",
        "_marks",
        "_sampled",
        "_told",
        "prompt_token_ids",
        "resumable",
        "said",
        "token_ids",
    )

    def __init__(self, body: Mapping[str, Any], resume: Resume | None = None) -> None:
        self.prompt_token_ids: tuple[int, ...] | None = None
        self.token_ids: list[int] = []
        self.said = 0
        """Characters given out."""
        self.resumable = True
        """Whether all that was said is in ``token_ids`` and can be said on from there."""
        self._told = 0
        """Where in the whole text the present attempt has come to."""
        self._held_back = held_back(body)
        self._sampled = body.get("temperature", 1.0) != 0
        if resume is not None:
            self.prompt_token_ids = resume.prompt_token_ids
            self.token_ids = list(resume.token_ids)
            self.said = len(resume.text)
            self._told = self.said - resume.skip
        self._marks = deque([(len(self.token_ids), self._told)])
        """(tokens, characters of their text): where the request could go on; the first is where it would."""

    def add(self, text: str, token_ids: Sequence[int]) -> str:
        """Take in what an engine told; returns the text that is new."""
        self.token_ids += token_ids
        if not text:
            return ""
        self._told += len(text)
        if not token_ids:
            self.resumable = False  # an engine that does not tell its tokens
        elif len(token_ids) == 1 or self._sampled:
            # Of several tokens that came together the last may end within a character.
            self._marks.append((len(self.token_ids), self._told + self._held_back))
        new = self._told - self.said
        if new <= 0:
            return ""
        self.said = self._told
        marks = self._marks
        while len(marks) > 1 and marks[1][1] <= self.said:
            marks.popleft()
        return text[-new:] if new < len(text) else text

    def cut(self) -> int:
        """Go back to where the request can go on. Returns the tokens that are kept."""
        tokens, chars = self._marks[0]
        del self.token_ids[tokens:]
        self._told = chars
        self._marks = deque([(tokens, chars)])
        return tokens

    def restart(self) -> None:
        """Forget all that was said: nobody has heard it."""
        self.token_ids.clear()
        self.said = self._told = 0
        self._marks = deque([(0, 0)])
        self.resumable = True

    def checkpoint(self, text: str) -> Resume | None:
        """What is needed to go on in another process, given the text that is out; None if it cannot."""
        if self.prompt_token_ids is None or not self.resumable:
            return None
        tokens, chars = self._marks[0]
        return Resume(self.prompt_token_ids, tuple(self.token_ids[:tokens]), text, skip=self.said - chars)


def held_back(body: Mapping[str, Any]) -> int:
    """Characters that vLLM holds back until it knows that they begin no stop string."""
    stop = body.get("stop")
    if not stop or body.get("include_stop_str_in_output"):
        return 0
    return max(len(each) for each in ([stop] if isinstance(stop, str) else stop)) - 1
