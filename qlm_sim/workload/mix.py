"""Makes a workload out of a trace: which requests, for which model, in which class, and when.

Knows no file and no engine. Each kind of chance (mix, rows, prompt lengths, arrivals) has a generator
of its own, so that another rate leaves the requests as they are, and more requests leave the first
ones as they are.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qlm_sim.core.types import SloClass
from qlm_sim.errors import InputError
from qlm_sim.workload.arrivals import arrival_times, parse_arrivals, rescale
from qlm_sim.workload.content import again
from qlm_sim.workload.workload import Trace, Workload, drawn_ids

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class MixEntry:
    """One part of the mix: a model, an SLO class, and how much of the requests it gets."""

    model: str
    slo_class: str
    share: float
    """Weight of this entry; the shares of a mix need not add up to 1."""
    arrivals: str | None = None
    """An arrival process of the entry's own; None joins the entries that have none either."""
    rate_rps: float | None = None
    """Its own rate; None is its share of the whole rate."""
    prompt_tokens: tuple[int, int] | None = None
    """Prompt lengths drawn evenly from this range, ends included, in place of the trace's."""


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The requests before they have times: columns of one length."""

    rows: Ints
    """Where each stands in the trace."""
    entry: Ints
    model: Ints
    slo: Ints
    prompt_tokens: Ints


def build_workload(
    trace: Trace,
    *,
    mix: Sequence[MixEntry],
    slo_classes: Sequence[SloClass],
    arrivals: str,
    rate_rps: float | None,
    requests: int | None,
    seed: int,
    max_model_len: Mapping[str, int],
) -> tuple[Workload, list[str]]:
    """The workload, and notes on what was left out, used twice or read otherwise than it stands.

    With ``arrivals`` "trace" the first ``requests`` rows are taken, in the trace's order and at its
    times, brought to ``rate_rps`` if that is given. Otherwise rows are drawn without replacement (again
    and again, once all are used) and come by the named process at ``rate_rps`` in all. ``requests``
    None takes as many as the trace has. A model or class that a row names is kept; what it leaves open
    is drawn from ``mix`` by share. What a model cannot hold (prompt + output > ``max_model_len``) is
    left out, as vLLM refuses it. ``max_model_len`` names every model there is.
    """
    _check(mix, slo_classes, requests, seed, max_model_len)
    from_trace = parse_arrivals(arrivals).from_trace
    if from_trace and trace.arrival_s is None:
        raise InputError(
            f"trace {trace.name} has no arrival times; arrivals poisson, gamma:CV or uniform would do"
        )
    notes: list[str] = []
    models = tuple(max_model_len)
    limits = np.array([max_model_len[model] for model in models], dtype=np.int64)
    named_model = _named(trace, trace.model, models, "model", trace.foreign_models, notes)
    named_slo = _named(trace, trace.slo_class, [slo.name for slo in slo_classes], "SLO class", False, notes)
    chooser = _Chooser(trace, mix, models, slo_classes, limits, seed, notes)
    if from_trace or (named_model >= 0).any() or (named_slo >= 0).any():
        chosen = chooser.by_row(named_model, named_slo, requests, in_order=from_trace)
    else:
        chosen = chooser.by_share(requests)
    arrival_s = _arrival_s(trace, mix, chosen, arrivals, rate_rps, seed)

    order = np.argsort(arrival_s, kind="stable")
    rows, model, prompt = chosen.rows[order], chosen.model[order], chosen.prompt_tokens[order]
    content = None
    if trace.content is not None:
        own_prompt = prompt == trace.prompt_tokens[rows]
        rows, content = _content(trace.content, rows, model, own_prompt, in_turn=not from_trace)
        prompt = np.where(own_prompt, trace.prompt_tokens[rows], prompt)
    room = limits[model] - prompt
    workload = Workload(
        ids=drawn_ids(trace.ids, rows),
        arrival_s=arrival_s[order],
        prompt_tokens=_small(prompt),
        output_tokens=_small(trace.output_tokens[rows]),
        max_tokens=_small(room if trace.max_tokens is None else np.minimum(room, trace.max_tokens[rows])),
        models=models,
        model_index=_small(model),
        slo_classes=tuple(slo_classes),
        slo_index=_small(chosen.slo[order]),
        content=content,
    )
    return workload, notes


def _small(column: Ints) -> NDArray[np.int32]:
    """Half the memory, for as long as the run lasts. Token counts and indices are far below 2**31, but for
    a max_model_len that means no limit."""
    return np.minimum(column, np.iinfo(np.int32).max).astype(np.int32)


class _Chooser:
    """Chooses rows of the trace and gives each a model, a class and a prompt length."""

    def __init__(
        self,
        trace: Trace,
        mix: Sequence[MixEntry],
        models: Sequence[str],
        slo_classes: Sequence[SloClass],
        limits: Ints,
        seed: int,
        notes: list[str],
    ) -> None:
        class_names = [slo.name for slo in slo_classes]
        self.trace = trace
        self.mix = mix
        self.models = models
        self.limits = limits
        self.notes = notes
        self.shares = np.array([entry.share for entry in mix])
        self.entry_model = np.array([models.index(entry.model) for entry in mix], dtype=np.int64)
        self.entry_slo = np.array([class_names.index(entry.slo_class) for entry in mix], dtype=np.int64)
        ranges = [entry.prompt_tokens for entry in mix]
        self.ranged = np.array([bounds is not None for bounds in ranges])
        self.low, self.high = np.array([bounds or (0, 0) for bounds in ranges], dtype=np.int64).T
        self.mix_rng, self.prompt_rng = (np.random.default_rng(s) for s in _seeds(seed, "mix", "prompts"))
        (self.row_seed,) = _seeds(seed, "rows")

    def by_row(self, named_model: Ints, named_slo: Ints, requests: int | None, *, in_order: bool) -> _Chosen:
        """Fill in what each row leaves open, then take rows that fit."""
        entry = self._entries_for(named_model, named_slo)
        model = np.where(named_model >= 0, named_model, self.entry_model[entry])
        slo = np.where(named_slo >= 0, named_slo, self.entry_slo[entry])
        whole = (named_model >= 0) & (named_slo >= 0)
        prompt = self._prompts(entry, self.trace.prompt_tokens, keep=whole)
        fits = prompt + self.trace.output_tokens <= self.limits[model]
        pool = np.flatnonzero(fits)
        if not len(pool):
            raise InputError(f"trace {self.trace.name}: no request fits its model's max_model_len")
        if refused := len(fits) - len(pool):
            self.notes.append(
                f"{refused:,} of {len(fits):,} requests of the trace exceed their model's max_model_len "
                "and are left out, as vLLM refuses them"
            )
        if not in_order:
            rows = self._draw(pool, len(pool) if requests is None else requests, self.row_seed)
        else:
            rows = pool[:requests]
            if requests is not None and requests > len(pool):
                self.notes.append(
                    f"{requests:,} requests are asked for; the trace has {len(pool):,}, all are taken"
                )
        return _Chosen(rows, entry[rows], model[rows], slo[rows], prompt[rows])

    def by_share(self, requests: int | None) -> _Chosen:
        """Draw the mix first, then for each entry rows that its model can hold, so that shares hold."""
        pools: dict[bytes, Bools] = {}
        pool_of: list[bytes] = []
        too_long: dict[str, None] = {}
        for index, entry in enumerate(self.mix):
            limit = int(self.limits[self.entry_model[index]])
            prompt = int(self.high[index]) if self.ranged[index] else self.trace.prompt_tokens
            fits = prompt + self.trace.output_tokens <= limit
            if not fits.any():
                raise InputError(
                    f"trace {self.trace.name}: no request fits max_model_len {limit} of {entry.model}"
                    + (f" with a prompt of {prompt} tokens" if self.ranged[index] else "")
                )
            if refused := int((~fits).sum()):
                too_long[f"{refused:,} for {entry.model} ({limit:,} tokens)"] = None
            pool_of.append(fits.tobytes())
            pools.setdefault(pool_of[-1], fits)

        if too_long:
            self.notes.append(
                f"of {len(self.trace):,} requests in the trace some exceed a model's max_model_len and are "
                f"not drawn for it, as vLLM refuses them: {', '.join(too_long)}"
            )
        count = max(int(fits.sum()) for fits in pools.values()) if requests is None else requests
        entry_of = self._entries(np.ones(len(self.mix), bool), self.mix_rng.random(count))
        rows = np.empty(count, dtype=np.int64)
        for (key, fits), seed in zip(pools.items(), self.row_seed.spawn(len(pools)), strict=True):
            slots = np.isin(entry_of, [index for index, pool in enumerate(pool_of) if pool == key])
            rows[slots] = self._draw(np.flatnonzero(fits), int(slots.sum()), seed)
        prompt = self._prompts(entry_of, self.trace.prompt_tokens[rows], keep=np.zeros(count, dtype=bool))
        return _Chosen(rows, entry_of, self.entry_model[entry_of], self.entry_slo[entry_of], prompt)

    def _draw(self, pool: Ints, count: int, seed: np.random.SeedSequence) -> Ints:
        """``count`` rows of the pool, shuffled, none twice before all are used."""
        if count > len(pool):
            self.notes.append(
                f"{count:,} requests are drawn from {len(pool):,} of the trace: some are used again"
            )
        rng = np.random.default_rng(seed)
        rounds = max(1, math.ceil(count / len(pool)))
        rows: Ints = np.concatenate([rng.permutation(pool) for _ in range(rounds)])
        return rows[:count]

    def _entries_for(self, named_model: Ints, named_slo: Ints) -> Ints:
        """An entry of the mix for every row, among those that agree with what it names, if any do."""
        chance = self.mix_rng.random(len(named_model))
        entry = np.empty(len(named_model), dtype=np.int64)
        for model, slo in sorted(set(zip(named_model.tolist(), named_slo.tolist(), strict=True))):
            of_model = (self.entry_model == model) | (model < 0)
            of_slo = (self.entry_slo == slo) | (slo < 0)
            agreeing = next(
                mask
                for mask in (of_model & of_slo, of_model, of_slo, np.ones(len(self.mix), bool))
                if mask.any()
            )
            rows = (named_model == model) & (named_slo == slo)
            entry[rows] = self._entries(agreeing, chance[rows])
        return entry

    def _entries(self, allowed: Bools, chance: NDArray[np.float64]) -> Ints:
        """Entries by share, among those allowed, for numbers drawn evenly from [0, 1)."""
        edges = np.cumsum(self.shares * allowed)
        last = np.flatnonzero(allowed)[-1]  # where rounding puts a chance at the very edge
        entry: Ints = np.minimum(np.searchsorted(edges, chance * edges[-1], side="right"), last)
        return entry

    def _prompts(self, entry: Ints, from_trace: Ints, *, keep: Bools) -> Ints:
        """Prompt lengths: the trace's, but for entries with a range of their own."""
        if not self.ranged.any():
            return from_trace
        chance = self.prompt_rng.random(len(entry))
        width = self.high[entry] - self.low[entry] + 1
        drawn = self.low[entry] + np.floor(chance * width).astype(np.int64)
        prompts: Ints = np.where(self.ranged[entry] & ~keep, drawn, from_trace)
        return prompts


def _content(
    texts: Sequence[str], rows: Ints, model: Ints, own_prompt: Bools, *, in_turn: bool
) -> tuple[Ints, list[str]]:
    """The rows, and what they have in common, given in order of arrival.

    A prompt that is not the trace's has nothing in common with others. A row that is used again is alike, yet
    other tokens. ``in_turn``: rows come in any order, so those of one conversation and model change places
    among themselves until they stand as in the trace.
    """
    uses: dict[int, int] = {}
    found: list[str] = []
    for row, own in zip(rows.tolist(), own_prompt.tolist(), strict=True):
        use = uses[row] = uses.get(row, 0) + 1
        text = texts[row] if own else ""
        found.append(again(text, use) if use > 1 else text)
    if in_turn:
        talks: dict[tuple[str, int] | int, int] = {}
        talk = np.array(
            [
                talks.setdefault((text, each) if text else place, len(talks))
                for place, (text, each) in enumerate(zip(found, model.tolist(), strict=True))
            ]
        )
        placed = rows.copy()
        placed[np.argsort(talk, kind="stable")] = rows[np.lexsort((rows, talk))]
        rows = placed
    return rows, found


def _arrival_s(
    trace: Trace,
    mix: Sequence[MixEntry],
    chosen: _Chosen,
    arrivals: str,
    rate_rps: float | None,
    seed: int,
) -> NDArray[np.float64]:
    """Times of the chosen requests: entries without a process of their own share one."""
    own = [entry.arrivals is not None or entry.rate_rps is not None for entry in mix]
    joint = [index for index, is_own in enumerate(own) if not is_own]
    streams = ([joint] if joint else []) + [[index] for index, is_own in enumerate(own) if is_own]
    share = sum(entry.share for entry in mix)
    (arrival_seed,) = _seeds(seed, "arrivals")
    times = np.empty(len(chosen.rows))
    for entries, stream_seed in zip(streams, arrival_seed.spawn(len(streams)), strict=True):
        first = mix[entries[0]]
        kind = first.arrivals or arrivals
        rate = first.rate_rps
        if rate is None and rate_rps is not None:
            rate = rate_rps if len(streams) == 1 else rate_rps * sum(mix[i].share for i in entries) / share
        slots = np.flatnonzero(np.isin(chosen.entry, entries))
        if not parse_arrivals(kind).from_trace:
            if rate is None:
                raise InputError(f"arrivals {kind} need a rate (--rate, in requests/s)")
            times[slots] = arrival_times(kind, rate, len(slots), np.random.default_rng(stream_seed))
        elif trace.arrival_s is not None and parse_arrivals(arrivals).from_trace:
            own_s = trace.arrival_s[chosen.rows[slots]]
            times[slots] = own_s if rate is None else rescale(own_s, rate)
        else:
            raise InputError(
                f"mix entry of {first.model}, {first.slo_class}: arrivals 'trace' with arrivals {arrivals!r} "
                "of the whole workload; 'trace' for both would be right"
            )
    return times


def _named(
    trace: Trace,
    column: Sequence[str] | None,
    known: Sequence[str],
    what: str,
    foreign: bool,
    notes: list[str],
) -> Ints:
    """Index of each row's name among those known, -1 where it names none."""
    if column is None:
        return np.full(len(trace), -1, dtype=np.int64)
    index = {"": -1} | {name: place for place, name in enumerate(known)}
    unknown = sorted(set(column) - set(index))
    if unknown and not foreign:
        request_id = trace.ids[list(column).index(unknown[0])]
        raise InputError(
            f"trace {trace.name}: {what} {unknown[0]!r} (request {request_id}) is not in the scenario, "
            f"which has {', '.join(known)}"
        )
    if unknown:
        notes.append(f"{what} {', '.join(unknown)} of the trace is not in the scenario: drawn from its mix")
    return np.array([index.get(name, -1) for name in column], dtype=np.int64)


def _check(
    mix: Sequence[MixEntry],
    slo_classes: Sequence[SloClass],
    requests: int | None,
    seed: int,
    max_model_len: Mapping[str, int],
) -> None:
    if not mix:
        raise InputError("the mix is empty; one entry or more would be right")
    class_names = [slo.name for slo in slo_classes]
    for number, entry in enumerate(mix, 1):
        where = f"mix entry {number}"
        if entry.model not in max_model_len:
            raise InputError(
                f"{where}: model {entry.model!r} is unknown; known are {', '.join(max_model_len)}"
            )
        if entry.slo_class not in class_names:
            raise InputError(
                f"{where}: SLO class {entry.slo_class!r} is unknown; known are {', '.join(class_names)}"
            )
        if not (math.isfinite(entry.share) and entry.share > 0):
            raise InputError(f"{where}: share {entry.share:g}; a number above 0 would be right")
        if entry.arrivals is not None:
            parse_arrivals(entry.arrivals)
        if entry.prompt_tokens is not None:
            low, high = entry.prompt_tokens
            if not 1 <= low <= high < max_model_len[entry.model]:
                raise InputError(
                    f"{where}: prompt_tokens [{low}, {high}]; 1 <= low <= high < max_model_len "
                    f"{max_model_len[entry.model]} of {entry.model} would be right"
                )
    if requests is not None and requests < 1:
        raise InputError(f"{requests} requests; 1 or more would be right")
    if seed < 0:
        raise InputError(f"seed {seed}; a whole number of 0 or more would be right")


def _seeds(seed: int, *purposes: str) -> list[np.random.SeedSequence]:
    """One seed for each kind of chance, independent of the others."""
    names = ("mix", "rows", "prompts", "arrivals")
    children = np.random.SeedSequence(seed).spawn(len(names))
    return [children[names.index(purpose)] for purpose in purposes]
