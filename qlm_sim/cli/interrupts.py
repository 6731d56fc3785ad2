"""Ctrl-C at moments when it must wait."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred() -> Iterator[None]:
    """Ctrl-C in this block interrupts at its end.

    For imports, where libraries swallow KeyboardInterrupt or turn it into another error.
    """
    pressed = False

    def remember(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, or in the hands of whoever called us
        yield
        return
    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            raise KeyboardInterrupt
