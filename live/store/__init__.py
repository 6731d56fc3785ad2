"""Where accepted batches and files survive the death of any process. ``open_store`` picks by URL."""

import re

from live.store.interface import Store


def without_password(url: str) -> str:
    """The URL of a store as logs may show it."""
    url = re.sub(r"(://[^/@:]*:).*@", r"\1***@", url)
    return re.sub(r"([?&]password=)[^&]*", r"\1***", url)


async def open_store(url: str) -> Store:
    """The store of that URL (sqlite:///PATH or redis://...), ready. Raises StoreError."""
    if url.startswith("sqlite:///"):
        from live.store.sqlite import SqliteStore

        return await SqliteStore.open(url.removeprefix("sqlite:///"))
    from live.store.redis import RedisStore

    return await RedisStore.open(url)
