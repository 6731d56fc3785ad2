"""The garbage collector, kept from looking through a simulation that leaves it nothing.

Every request makes and drops some dozen objects, all of them free by their reference counts. Yet the
collector would go through the young ones at every 700 more, and through all that a program holds now
and then: a seventh of a run's time.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

YOUNG_OBJECTS = 100_000
"""New objects, net, at which the collector looks through them."""


@contextmanager
def seldom_collecting() -> Iterator[None]:
    """Leave what exists now out of collections, and the rest alone until it has grown by much."""
    thresholds = gc.get_threshold()
    frozen = gc.get_freeze_count()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        if not frozen:
            gc.unfreeze()
