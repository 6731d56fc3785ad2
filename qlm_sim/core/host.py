"""Host memory of an instance: which model weights it holds, the least recently used leaving first."""

from collections.abc import Iterable


class HostModels:
    """Weights held in host memory. The engine keeps one as fact, the core's ledger one as belief."""

    def __init__(self, capacity_bytes: int, held: Iterable[tuple[str, int]] = ()) -> None:
        self.capacity_bytes = capacity_bytes
        self._weight_bytes: dict[str, int] = {}
        self.used_bytes = 0
        for model, weight_bytes in held:
            self.touch(model, weight_bytes)

    def holds(self, model: str) -> bool:
        return model in self._weight_bytes

    def touch(self, model: str, weight_bytes: int) -> None:
        """Mark ``model`` as just used, loading it and dropping the least recently used to make room.

        A model larger than the whole capacity is not kept.
        """
        self.used_bytes -= self._weight_bytes.pop(model, 0)
        if weight_bytes > self.capacity_bytes:
            return
        while self.used_bytes + weight_bytes > self.capacity_bytes:
            oldest = next(iter(self._weight_bytes))
            self.used_bytes -= self._weight_bytes.pop(oldest)
        self._weight_bytes[model] = weight_bytes
        self.used_bytes += weight_bytes
