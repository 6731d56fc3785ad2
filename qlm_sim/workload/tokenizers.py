"""Counts tokens of text, offline by default, with whatever tokenizer the user names.

Knows no trace format. Libraries are imported only when a tokenizer is asked for: they are an extra.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qlm_sim.errors import InputError

_BATCH = 2048
"""Texts encoded at once: enough to keep the cores busy, few enough to bound memory."""


@dataclass(frozen=True, slots=True)
class TokenCounter:
    """A tokenizer, as far as counting goes."""

    prompt_extra_tokens: int
    """Special tokens that an engine puts around a prompt (a begin-of-sequence token, mostly)."""
    count_batch: Callable[[list[str]], list[int]]
    """Tokens of each text, special tokens not counted."""

    def count(self, texts: Iterable[str]) -> NDArray[np.int64]:
        """Tokens of each text, special tokens not counted; texts are taken up as they come."""
        texts = iter(texts)
        counts: list[int] = []
        while batch := list(islice(texts, _BATCH)):
            counts += self.count_batch([_encodable(text) for text in batch])
        return np.array(counts, dtype=np.int64)


def load_tokenizer(name: str | None) -> TokenCounter:
    """The tokenizer called ``name``; None is Mistral-7B's, which mistral-common ships.

    ``name`` is a tokenizer.json, a SentencePiece model, a folder with one of the two, or a Hugging
    Face name, which is downloaded.
    """
    if name is None:
        return _sentencepiece(_bundled_mistral_model())
    path = Path(name)
    if path.is_dir():
        for file in ("tokenizer.json", "tokenizer.model"):
            if (path / file).is_file():
                return load_tokenizer(str(path / file))
        raise InputError(f"{name}: no tokenizer.json and no tokenizer.model in this folder")
    if path.is_file():
        return _tokenizer_json(path) if path.suffix == ".json" else _sentencepiece(path)
    if path.suffix in (".json", ".model") or path.is_absolute() or name.startswith("."):
        raise InputError(f"{name}: no such tokenizer file")
    return _hugging_face(name)


def _bundled_mistral_model() -> Path:
    spec = find_spec("mistral_common")
    if spec is None or not spec.submodule_search_locations:
        raise _missing("mistral-common")
    path = Path(spec.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"
    if not path.is_file():
        raise InputError(f"{path}: mistral-common no longer ships this file; name one with --tokenizer")
    return path


def _sentencepiece(path: Path) -> TokenCounter:
    try:
        import sentencepiece
    except ImportError:
        raise _missing("sentencepiece") from None
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        raise InputError(f"{path}: not a SentencePiece model") from None
    threads = os.cpu_count() or 1

    def count_batch(texts: list[str]) -> list[int]:
        return [len(ids) for ids in processor.encode(texts, num_threads=threads)]

    return TokenCounter(int(processor.bos_id() >= 0), count_batch)


def _tokenizer_json(path: Path) -> TokenCounter:
    try:
        import tokenizers
    except ImportError:
        raise _missing("tokenizers") from None
    try:
        return _fast(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{path}: not a tokenizer.json: {_first_line(error)}") from None


def _hugging_face(name: str) -> TokenCounter:
    try:
        import tokenizers
    except ImportError:
        raise _missing("tokenizers") from None
    try:
        return _fast(tokenizers.Tokenizer.from_pretrained(name))
    except Exception as error:  # the library raises bare Exception, and whatever its HTTP client does
        raise InputError(
            f"tokenizer {name!r}: no such file, and not to be had from Hugging Face: {_first_line(error)}"
        ) from None


def _fast(tokenizer: "tokenizers.Tokenizer") -> TokenCounter:  # type: ignore[name-defined]  # noqa: F821
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def count_batch(texts: list[str]) -> list[int]:
        return [len(encoding) for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    return TokenCounter(tokenizer.num_special_tokens_to_add(False), count_batch)


def _missing(package: str) -> InputError:
    return InputError(f"counting tokens needs {package}: pip install 'qlm[tokenizers]'")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _encodable(text: str) -> str:
    """The text with lone surrogates, which JSON can hold and UTF-8 cannot, replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")
