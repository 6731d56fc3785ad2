"""Request ids in little memory: ten million strings of eight characters take 640 MB, packed ones 80 MB.

Knows text alone. Ids are appended and read, never changed.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

_BLOCK = 8192

_Block = list[str] | NDArray[Any]


class Ids(Sequence[str]):
    """A sequence of ids, packed by blocks. A slice of it is a list."""

    def __init__(self, ids: Iterable[str] = ()) -> None:
        self._blocks: list[_Block] = []
        """Each of ``_BLOCK`` ids."""
        self._newest: list[str] = []
        self.extend(ids)

    def extend(self, ids: Iterable[str]) -> None:
        newest, rest = self._newest, iter(ids)
        while more := list(islice(rest, _BLOCK - len(newest))):
            newest += more
            if len(newest) == _BLOCK:
                self._blocks.append(_packed(newest[:]))
                newest.clear()

    def __len__(self) -> int:
        return len(self._blocks) * _BLOCK + len(self._newest)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            if step != 1:
                return [self[each] for each in range(start, stop, step)]
            first, last = start // _BLOCK, -(-stop // _BLOCK)
            found = [each for number in range(first, last) for each in self._block(number)]
            return found[start - first * _BLOCK : max(stop, start) - first * _BLOCK]
        number, row = divmod(range(len(self))[place], _BLOCK)
        if number == len(self._blocks):
            return self._newest[row]
        return _text(self._blocks[number][row : row + 1])[0]

    def __iter__(self) -> Iterator[str]:
        for number in range(len(self._blocks) + 1):
            yield from self._block(number)

    def _block(self, number: int) -> list[str]:
        return _text(self._blocks[number]) if number < len(self._blocks) else self._newest


def _packed(ids: list[str]) -> _Block:
    """Bytes of one width, or the ids themselves where bytes would not give them back."""
    if any("\0" in each for each in ids):
        return ids
    try:
        return np.array(ids, dtype="S")
    except UnicodeEncodeError:
        return ids


def _text(block: _Block) -> list[str]:
    if isinstance(block, list):
        return block
    text: list[str] = block.astype("U").tolist()
    return text
