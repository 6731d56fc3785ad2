"""Instances that may take a request at once: its model is loaded and nothing is queued; least loaded first.

Asking costs little however many instances there are: only those are looked at that were named since the
last time.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import inf

from qlm_sim.core.instances import InstanceLedger, by_model


class IdleInstances:
    """Must be told by ``changed`` of every instance whose batch, model or queue is another than before."""

    def __init__(self, ledgers: Mapping[str, InstanceLedger], queued: Mapping[str, Sequence[object]]) -> None:
        """``queued``: what waits, by instance."""
        self._queued = queued
        self._capable = by_model(ledgers)
        self._places = {
            model: {ledger.id: place for place, ledger in enumerate(capable)}
            for model, capable in self._capable.items()
        }
        """By model and instance: its position in the lists of the model."""
        self._loads = {model: [inf] * len(capable) for model, capable in self._capable.items()}
        """By model: share of its sequences that each instance runs; infinite where it may not take any."""
        self._changed: dict[InstanceLedger, None] = dict.fromkeys(ledgers.values())

    def changed(self, ledger: InstanceLedger) -> None:
        self._changed[ledger] = None

    def least_loaded(self, model: str) -> Iterator[InstanceLedger]:
        """The instances for the model, by load; of equals, the first of all instances."""
        for ledger in self._changed:
            self._look_at(ledger)
        self._changed.clear()
        loads = self._loads[model]
        least = min(loads)
        while least < inf:
            place = loads.index(least)
            yield self._capable[model][place]
            loads = loads.copy()
            loads[place] = inf
            least = min(loads)

    def _look_at(self, ledger: InstanceLedger) -> None:
        loaded = ledger.model if ledger.next_model() == ledger.model and not self._queued[ledger.id] else None
        for model, profile in ledger.spec.models.items():
            load = len(ledger.running) / profile.max_num_seqs if model == loaded else inf
            self._loads[model][self._places[model][ledger.id]] = load
