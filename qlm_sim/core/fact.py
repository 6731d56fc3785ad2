"""The decorator of what is made for every request: events, actions, and requests themselves.

A frozen dataclass sets each field through ``object.__setattr__``, which takes four times as long as a
plain one does. So these are plain to the interpreter, and frozen to the type checker: mypy refuses an
assignment to a field of theirs as it does for ``dataclass(frozen=True)``.
"""

from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def fact(cls: type[T]) -> type[T]:
    """A slotted, hashable dataclass that nothing changes once it is made."""
    return dataclass(slots=True, unsafe_hash=True)(cls)
