"""How long a prompt is, in tokens, before an engine has seen it.

With a tokenizer.json the count is exact for a plain prompt, and near for a chat (the engine puts the model's
template around it). Without one it is estimated from characters, by the share that the engines have told for
earlier prompts of the model.
"""

from typing import Any

from live.config import ModelConfig
from live.gateway.bodies import ChatBody, CompletionBody, is_plain, texts_of
from qlm_sim.errors import InputError

CHARACTERS_PER_TOKEN = 4.0
"""English text under common tokenizers; where learning starts."""
MEMORY = 200.0
"""Prompts over which the share is averaged."""
TEMPLATE_TOKENS = 4
"""What a chat template adds for each message, about."""


class PromptCounter:
    """Counts the prompts of one model."""

    def __init__(self, model: ModelConfig) -> None:
        self._tokenizer: Any = None
        self._characters = CHARACTERS_PER_TOKEN
        self._tokens = 1.0
        if model.tokenizer is not None:
            from tokenizers import Tokenizer

            try:
                self._tokenizer = Tokenizer.from_file(model.tokenizer)
            except Exception as error:  # the library raises plain Exception
                raise InputError(f"tokenizer {model.tokenizer}: {error}") from None

    @property
    def exact(self) -> bool:
        return self._tokenizer is not None

    def of_text(self, text: str | list[int]) -> int:
        """Tokens of a prompt, at least one."""
        if isinstance(text, list):
            return max(1, len(text))
        if self._tokenizer is not None:
            return max(1, len(self._tokenizer.encode(text).ids))
        return max(1, round(len(text) * self._tokens / self._characters))

    def of_chat(self, fields: ChatBody) -> int:
        """Tokens of a conversation's texts, about. What images take is the engine's to know."""
        if self._tokenizer is None:
            return max(1, round(chat_characters(fields) * self._tokens / self._characters))
        texts = [text for message in fields.messages for text in texts_of(message)]
        plain = sum(len(each.ids) for each in self._tokenizer.encode_batch(texts))
        return plain + TEMPLATE_TOKENS * len(fields.messages)

    def learn(self, text_characters: int, tokens: int) -> None:
        """An engine has told how many tokens a prompt of so many characters has."""
        if text_characters > 0 and tokens > 0:
            keep = 1.0 - 1.0 / MEMORY
            self._characters = self._characters * keep + text_characters / MEMORY
            self._tokens = self._tokens * keep + tokens / MEMORY


def chat_characters(fields: ChatBody) -> int:
    """Characters of a conversation; each message counts for its place in the template too."""
    return sum(sum(map(len, texts_of(each))) + 4 * TEMPLATE_TOKENS for each in fields.messages)


def prompt_characters(fields: CompletionBody | ChatBody, prompt: str | list[int] | None) -> int:
    """Characters to learn from; 0 where the prompt is not text alone."""
    if isinstance(fields, ChatBody):
        return chat_characters(fields) if is_plain(fields) else 0
    return len(prompt) if isinstance(prompt, str) else 0
