"""How long an instance has been at work, all in all."""


class BusyClock:
    """Runs while the instance has requests. Times are seconds since the run's start."""

    def __init__(self) -> None:
        self._before_s = 0.0
        """Of the stretches that are over."""
        self._since: float | None = None

    def start(self, now: float) -> None:
        self._since = now

    def stop(self, now: float) -> None:
        self._before_s = self.seconds(now)
        self._since = None

    def seconds(self, now: float) -> float:
        return self._before_s if self._since is None else self._before_s + now - self._since
