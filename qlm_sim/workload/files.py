"""Opens trace files, compressed by gzip or not, and turns what goes wrong into one clear line.

Knows no format.
"""

import codecs
import gzip
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from qlm_sim.errors import InputError

Progress = Callable[[int, int], None]
"""Told (bytes read so far, bytes of the file)."""


@contextmanager
def open_trace(path: str) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """The file's bytes, decompressed, and a function that tells how many of the file are read."""
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            yield cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if packed else raw, raw.tell
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder; a trace is a file") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: damaged gzip file: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None


def text_chunks(path: str, progress: Progress | None, chunk_bytes: int = 1 << 22) -> Iterator[str]:
    """The file's text in pieces. Bytes of a character that the file's end cuts off are dropped."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    size = os.path.getsize(path) if os.path.isfile(path) else 0
    start = 0
    with open_trace(path) as (file, tell):
        while chunk := file.read(chunk_bytes):
            held = len(decoder.getstate()[0])
            try:
                text = decoder.decode(chunk)
            except UnicodeDecodeError as error:
                raise not_utf8(path, f"byte {start - held + error.start + 1:,}") from None
            start += len(chunk)
            if progress:
                progress(tell(), size)
            yield text


def text_lines(path: str, progress: Progress | None = None) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of every line that is not blank."""
    rest, number = "", 0
    for chunk in text_chunks(path, progress):
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            number += 1
            if line and not line.isspace():
                yield number, line
    if rest and not rest.isspace():
        yield number + 1, rest


def not_utf8(path: str, where: str) -> InputError:
    return InputError(f"{path}: {where}: not UTF-8 text; save the file as UTF-8")
