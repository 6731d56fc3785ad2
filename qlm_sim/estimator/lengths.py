"""How long outputs are: distributions learnt from what finishes and from what still runs, from a prior.

Nobody's true length is read in advance. A running request is a censored observation: its length is not
known, but that it is longer than what it has generated is. Leaving such requests out makes early
estimates too short, because short outputs finish first; so the chance to end is estimated for each of
many ranges of tokens, from all that came into the range (life table; Kaplan and Meier, 1958). Kept per
kind of request (``LengthKind``), each leaning on its SLO class, that on its model, and that on the prior,
as long as it has seen little.
"""

from array import array
from bisect import bisect_left
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from qlm_sim.core.types import Request

Floats = NDArray[np.float64]

PRIOR_MEAN_TOKENS = 256.0
"""Prior mean output length: between the means of ShareGPT (about 200 to 280 tokens, by tokenizer)
and of the Azure conversation trace of 2023 (211). The prior is exponential."""
PRIOR_REQUESTS = 16.0
"""How many requests the prior, or the wider level, counts for."""
MEAN_REQUESTS = 64.0
"""How many the prior's mean counts for: what ends first is short, and tells too little of the others."""
TAIL_REQUESTS = 0.5, 4.0
"""So many at least, however few get that far, for a model and for what leans on it: or one request of a
hundred times the mean, in thousands, would rule the second moment."""
MEMORY_REQUESTS = 20_000
"""What was learnt of a model counts half from here on, so that a changing workload is followed."""
LONGEST_CAP = 1024
"""``max_tokens`` above this says little of an output's length; up to it, requests are kept apart."""

_GROWTH = 1.12
EDGES: tuple[int, ...] = tuple(sorted({*range(9), *(round(8 * _GROWTH**i) for i in range(1, 93)), 2**18}))
"""Bin b holds lengths in (EDGES[b], EDGES[b + 1]] tokens."""
_LAST = len(EDGES) - 1
_TOKENS = _LAST
_LEAVES = 2 * _LAST
"""Where the columns of ``_Seen`` begin."""
_EDGES = np.array(EDGES, dtype=float)
_MIDDLES = (_EDGES[1:] + _EDGES[:-1] + 1) / 2
_VARIANCES = (np.diff(_EDGES) ** 2 - 1) / 12
"""Mean and variance of a length that is in the bin, all of its lengths being as likely."""
_SURELY = 0.999
"""Chance to end in a bin that no request leaves alive; not 1, so that every length has a logarithm."""


class LengthKind(NamedTuple):
    """Requests whose output lengths are taken to be alike."""

    model: str
    slo_class: str
    prompt_band: int
    """One band per factor of two in the prompt's length."""
    cap_tokens: int
    """A power of two that ``max_tokens`` does not exceed; 0 where max_tokens is above LONGEST_CAP."""


_kind = cache(LengthKind)


def kind_of(request: Request) -> LengthKind:
    most = request.max_tokens
    return _kind(
        request.model,
        request.slo_class,
        request.prompt_tokens.bit_length(),
        1 << (most - 1).bit_length() if most <= LONGEST_CAP else 0,
    )


@dataclass(frozen=True, slots=True)
class LengthStatistics:
    """Count, sum and sum of squares of output lengths in tokens."""

    count: float = PRIOR_REQUESTS
    total: float = PRIOR_REQUESTS * PRIOR_MEAN_TOKENS
    total_squared: float = PRIOR_REQUESTS * PRIOR_MEAN_TOKENS**2 * 2

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def second_moment(self) -> float:
        """E[X²], in tokens²."""
        return self.total_squared / self.count

    @property
    def variance(self) -> float:
        return max(0.0, self.second_moment - self.mean**2)


def _total(share: Floats, value: Floats) -> float:
    """The scalar product, with the same last bit on every machine: BLAS adds in another order on each kind of
    CPU, and a plan may hang on that."""
    return float((share * value).sum())


class LengthDistribution:
    """Output lengths by bin; inside a bin all lengths are about as likely."""

    def __init__(self, ending: Floats, middle: Floats, observations: float) -> None:
        """``ending``: chance to end in a bin once it is reached; ``middle``: mean of the lengths in it;
        ``observations``: how many it rests on."""
        self.ending = np.minimum(ending, _SURELY)
        self.middle = middle
        self.observations = observations
        self.reaching = np.concatenate(([1.0], np.cumprod(1.0 - self.ending)))
        """P(length > edge), by edge."""

    def log_survival(self, tokens: Floats) -> Floats:
        """log P(length > tokens), elementwise."""
        logs: Floats = np.log(np.interp(tokens, _EDGES, self.reaching))
        return logs

    @cached_property
    def moments(self) -> tuple[float, float, float, float]:
        """E[X], E[X²], E[X³], E[X⁴] in powers of tokens."""
        share, x, v = -np.diff(self.reaching), self.middle, _VARIANCES
        return (
            _total(share, x),
            _total(share, x**2 + v),
            _total(share, x**3 + 3 * x * v),
            _total(share, x**4 + 6 * x**2 * v + 1.8 * v**2),
        )

    @cached_property
    def statistics(self) -> LengthStatistics:
        share, x, count = -np.diff(self.reaching), self.middle, self.observations
        return LengthStatistics(count, _total(share, x) * count, _total(share, x**2 + _VARIANCES) * count)


def _exponential(mean_tokens: float) -> LengthDistribution:
    """What is believed of lengths of which only the mean is known."""
    ending: Floats = -np.expm1(-np.diff(_EDGES) / mean_tokens)
    return LengthDistribution(ending, _MIDDLES, PRIOR_REQUESTS)


PRIOR = _exponential(PRIOR_MEAN_TOKENS)


def _bin(tokens: float) -> int:
    """The bin that holds so many tokens; the last one holds what is longer."""
    return bisect_left(EDGES, tokens, 1, _LAST) - 1


class Generating(Protocol):
    """A request that decodes now."""

    def tokens(self) -> float:
        """Generated so far, all attempts together."""
        ...


class _Seen:
    """What was seen of the requests of one kind."""

    __slots__ = ("columns", "events", "levels", "running")

    def __init__(self, levels: "tuple[_Level, _Level, _Level]") -> None:
        self.levels = levels
        """Those of its model, of its class and its own."""
        self.columns = array("d", bytes(8 * 3 * _LAST))
        """Three values for each bin, one column behind the other: requests that finished in it, their tokens
        in sum, and those whose observation ends in it otherwise, less those whose begins there."""
        self.events = 0
        self.running: dict[str, Generating] = {}
        """Those that decode, by id."""

    def forget_half(self) -> None:
        self.columns = array("d", [value / 2 for value in self.columns])


class _Level:
    """The length distribution of one kind, class or model."""

    def __init__(self, wider: "_Level | None", cap_tokens: int) -> None:
        self._wider = wider
        self._cap_bin = bisect_left(EDGES, cap_tokens) - 1 if cap_tokens else len(EDGES) - 1
        self.kinds: list[_Seen] = []
        """What was seen of the kinds in it."""
        self.remembered = 0
        """Requests of this model that have finished, those that were forgotten left out."""
        self._due = 0.0
        self._seen = -1
        self.version = 0
        self._distribution = PRIOR

    def forget_half(self) -> None:
        self.remembered //= 2
        for kind in self.kinds:
            kind.forget_half()

    @property
    def distribution(self) -> LengthDistribution:
        """Estimated anew whenever a tenth more has been seen here, or when the wider level was."""
        wider = self._wider
        prior = wider.distribution if wider is not None else PRIOR
        events = sum([kind.events for kind in self.kinds])
        if events >= self._due or (wider is not None and wider.version != self._seen):
            self._due = events * 1.1 + 8
            self._seen = wider.version if wider is not None else 0
            self.version += 1
            self._distribution = self._estimate(prior)
        return self._distribution

    def _estimate(self, prior: LengthDistribution) -> LengthDistribution:
        columns = np.zeros(3 * _LAST)
        for kind in self.kinds:
            columns += kind.columns
        ends, sums, leaves = columns.reshape(3, _LAST)
        finished = float(ends.sum())
        leaves += ends
        tokens = np.array([each.tokens() for kind in self.kinds for each in kind.running.values()])
        if len(tokens):
            at = np.clip(np.searchsorted(_EDGES, tokens) - 1, 0, len(leaves) - 1)
            leaves += np.bincount(at, minlength=len(leaves))
        # Who is observed for a part of the bin is at risk for half of it.
        at_risk = np.cumsum(leaves[::-1])[::-1] - (leaves - ends) / 2
        least = TAIL_REQUESTS[1]
        if self._wider is None:
            # Outputs may be far from the prior's mean: the exponential that fits what was seen. Tokens of
            # what runs keep its mean from falling, as the shortest end first, but do not raise it: a file of
            # work that began at one time would seem endless until the first of it ends.
            requests = finished + MEAN_REQUESTS
            ended = (float(sums.sum()) + MEAN_REQUESTS * PRIOR_MEAN_TOKENS) / requests
            mean = min(ended + float(tokens.sum()) / requests, max(ended, PRIOR_MEAN_TOKENS))
            prior, least = _exponential(mean), TAIL_REQUESTS[0]
        # The prior counts as requests of its own, as many at least as ``least`` in each bin.
        weight = np.maximum(PRIOR_REQUESTS * prior.reaching[:-1], least)
        ending = (ends + weight * prior.ending) / (np.maximum(at_risk, ends) + weight)
        ending[self._cap_bin :] = _SURELY
        middle = (sums + weight * prior.middle) / (ends + weight)
        return LengthDistribution(ending, middle, finished + PRIOR_REQUESTS)


class OutputLengths:
    """Length distributions per kind, per SLO class of a model, and per model."""

    def __init__(self) -> None:
        self._levels: dict[tuple[str | int, ...], _Level] = {}
        self._of_kind: dict[LengthKind, _Seen] = {}
        self.ended_requests = 0
        """How many times ``ended`` was told: what was asked before may be out of date by so many."""

    def began(self, request_id: str, kind: LengthKind, generating: Generating, tokens: float = 1.0) -> None:
        """A request decodes from now on, with so many tokens generated."""
        try:
            seen = self._of_kind[kind]
        except KeyError:
            seen = self._new(kind)
        seen.running[request_id] = generating
        seen.events += 1
        if tokens > 1.0:
            seen.columns[_LEAVES + _bin(tokens)] -= 1.0

    def ended(self, request_id: str, kind: LengthKind, tokens: float, finished: bool) -> None:
        """It stopped after so many tokens; not ``finished``: it would have generated more."""
        self.ended_requests += 1
        seen = self._of_kind[kind]
        del seen.running[request_id]
        at = bisect_left(EDGES, tokens, 1, _LAST) - 1
        if finished:
            seen.events += 1
            seen.columns[at] += 1.0
            seen.columns[_TOKENS + at] += tokens
            model = seen.levels[0]
            model.remembered += 1
            if model.remembered > MEMORY_REQUESTS:
                model.forget_half()
        else:
            seen.columns[_LEAVES + at] += 1.0

    def of_kind(self, kind: LengthKind) -> LengthDistribution:
        return (self._of_kind.get(kind) or self._new(kind)).levels[2].distribution

    def of_class(self, model: str, slo_class: str) -> LengthStatistics:
        return self._level(model, slo_class).distribution.statistics

    def of_model(self, model: str) -> LengthStatistics:
        return self._level(model).distribution.statistics

    def _new(self, kind: LengthKind) -> _Seen:
        model, slo_class, _, _ = kind
        seen = _Seen((self._level(model), self._level(model, slo_class), self._level(*kind)))
        for level in seen.levels:
            level.kinds.append(seen)
        self._of_kind[kind] = seen
        return seen

    def _level(self, *key: str | int) -> _Level:
        level = self._levels.get(key)
        if level is None:
            wider = None if len(key) == 1 else self._level(*key[: 1 if len(key) == 2 else 2])
            cap = key[3] if len(key) == 4 else 0
            assert isinstance(cap, int)
            level = self._levels[key] = _Level(wider, cap)
        return level
