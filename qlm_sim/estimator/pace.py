"""How much an engine gets done while requests wait for it: the paper's token throughput Θ, as observed.

While a line waits, an engine is as full as it can be kept; how full that is, preemptions, fragmentation
and the engine's own rules decide, more than a model of them can know. So it is observed: the seconds spent
on decoding, the tokens generated in them, and the KV tokens held over their steps, of which a request of
prompt p and output O takes p·O + O²/2.
"""

from math import exp

MEMORY_STEPS = 20_000.0
"""Decode steps under a waiting line after which an observation weighs 1/e."""


class Pace:
    """One model on one instance, under a waiting line."""

    __slots__ = ("_ended", "_open", "alone_s", "decode_s", "kv_steps", "prefill_s", "sequence_steps", "steps")

    def __init__(self) -> None:
        self.steps = 0.0
        self.decode_s = 0.0
        self.sequence_steps = 0.0
        """Sequences over steps: tokens."""
        self.kv_steps = 0.0
        """KV tokens over steps."""
        self.prefill_s = 0.0
        """Seconds that prefills took ..."""
        self.alone_s = 0.0
        """... and would have taken by the profile, each in an iteration of its own."""
        self._open = [0.0] * 6
        """The same six since the last check."""
        self._ended = 0
        """Requests that left since the line began to wait."""

    def decoded(self, steps: float, seconds: float, sequences: float, kv_tokens: float) -> None:
        """So much has been decoded; negative where it turns out that it was not."""
        row = self._open
        row[0] += steps
        row[1] += seconds
        row[2] += steps * sequences
        row[3] += steps * kv_tokens

    def prefilled(self, seconds: float, alone_s: float) -> None:
        self._open[4] += seconds
        self._open[5] += alone_s

    def ended(self) -> None:
        """A request has left the engine."""
        self._ended += 1

    def check(self, waited: bool, running: int) -> None:
        """Whether something waited all the time since the last check: else what was seen says nothing.

        Nor does it while the batch is young, before as many have left as it holds.
        """
        row = self._open
        if not waited:
            self._ended = 0
        elif self._ended >= running:
            keep = min(1.0, exp(-row[0] / MEMORY_STEPS))
            self.steps = keep * self.steps + row[0]
            self.decode_s = keep * self.decode_s + row[1]
            self.sequence_steps = keep * self.sequence_steps + row[2]
            self.kv_steps = keep * self.kv_steps + row[3]
            self.prefill_s = keep * self.prefill_s + row[4]
            self.alone_s = keep * self.alone_s + row[5]
        self._open = [0.0] * 6
