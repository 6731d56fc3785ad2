"""Consecutive iterations of one batch, in closed form.

The batch stays as it is, so the i-th iteration takes first_s + (i - 1) growth_s: each adds one token
per sequence to the KV cache that the next one reads. Knows nothing of requests.
"""

from math import ceil, floor, sqrt


class Leap:
    """Iterations that an engine runs without looking up. Each engine has one and sets it anew."""

    __slots__ = ("began_at", "first_s", "growth_s", "iterations", "lead", "start")

    def __init__(self) -> None:
        self.set(0.0, 1, 0.0, 0.0)

    def set(self, start: float, iterations: int, first_s: float, growth_s: float) -> float:
        """Returns the time at which the last iteration ends."""
        self.start = start
        self.lead = 0
        """Iterations before ``start``: one that was put before this leap, or none."""
        self.iterations = iterations
        self.first_s = first_s
        self.growth_s = growth_s
        if iterations == 1:
            return start + first_s
        return start + (iterations * first_s + growth_s * (iterations * (iterations - 1) * 0.5))

    def put_before(self, began_at: float) -> None:
        """The leap's start is the end of an iteration that began then and counts with the others."""
        self.began_at = began_at
        self.lead = 1
        self.iterations += 1

    def end(self, iterations: int) -> float:
        """When that many iterations are done."""
        iterations -= self.lead
        if iterations < 0:
            return self.began_at
        return self.start + (
            iterations * self.first_s + self.growth_s * (iterations * (iterations - 1) * 0.5)
        )

    def done(self, now: float) -> int:
        """Iterations that are over at ``now``."""
        done = min(max(floor(self._iterations_in(now - self.start)) + self.lead, 0), self.iterations)
        while done < self.iterations and self.end(done + 1) <= now:
            done += 1
        while done > 0 and self.end(done) > now:
            done -= 1
        return done

    def cut(self, now: float) -> float:
        """Stop at the first end of an iteration that is not before ``now``, and return that time."""
        iterations = self.iterations
        least = ceil(self._iterations_in(now - self.start)) + self.lead
        if least < 1:
            least = 1
        elif least > iterations:
            least = iterations
        while least > 1 and self.end(least - 1) >= now:
            least -= 1
        while (end := self.end(least)) < now and least < iterations:
            least += 1
        self.iterations = least
        return end

    def _iterations_in(self, elapsed_s: float) -> float:
        """The real solution of k first_s + growth_s k (k - 1) / 2 = elapsed_s."""
        if elapsed_s <= 0.0:
            return 0.0
        half = self.first_s - 0.5 * self.growth_s
        root = half + sqrt(half * half + 2.0 * self.growth_s * elapsed_s)
        return 2.0 * elapsed_s / root if root > 0.0 else float(self.iterations)
