"""Which latency a request is promised: its SLO class, and targets that it names itself.

The class comes from, the first that says one: the header x-qlm-slo-class; x-slo-ttft-ms (the class of the
nearest target); ``service_tier``; the tenant's default; the model's default; the configuration's. The
headers x-slo-ttft-ms and x-slo-tpot-ms then replace the class's own targets.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from live.config import SERVICE_TIERS, LiveConfig
from live.gateway.errors import ApiError
from live.gateway.tenants import Tenant
from qlm_sim.core.types import SloClass

CLASS_HEADER = "x-qlm-slo-class"
TTFT_HEADER = "x-slo-ttft-ms"
TPOT_HEADER = "x-slo-tpot-ms"


@dataclass(frozen=True, slots=True)
class Slo:
    """What one request is promised."""

    name: str
    """Its class."""
    ttft_s: float
    tpot_s: float | None
    e2e_s: float | None
    tier: str | None
    """The service tier that was asked for, to be named in the answer."""

    def met(self, ttft_s: float, e2e_s: float, output_tokens: int) -> bool:
        """Whether a finished request has met every target."""
        tpot_s = (e2e_s - ttft_s) / (output_tokens - 1) if output_tokens > 1 else 0.0
        return (
            ttft_s <= self.ttft_s
            and (self.tpot_s is None or tpot_s <= self.tpot_s)
            and (self.e2e_s is None or e2e_s <= self.e2e_s)
        )


class SloResolver:
    """Knows the classes, and the defaults of tiers and models."""

    def __init__(self, config: LiveConfig) -> None:
        self._classes = {each.name: each for each in config.slo}
        self._tiers = dict(config.service_tier)
        self._of_model = {model.name: model.default_slo for model in config.model}
        self._default = config.default_class
        self._ready = {each.name: _promise(each, None) for each in config.slo}

    def of_class(self, name: str, ttft_s: float | None = None) -> Slo:
        """What a class promises; ``ttft_s`` in place of its own target."""
        each = self._classes[name]
        if ttft_s is None:
            return self._ready[name]
        return Slo(name, ttft_s, each.tpot_s, each.e2e_s, None)

    def resolve(self, headers: Mapping[str, str], tier: object, tenant: Tenant, model: str) -> Slo:
        """The promise to a request. Raises ApiError 400."""
        ttft_s, tpot_s = _seconds(headers, TTFT_HEADER), _seconds(headers, TPOT_HEADER)
        tier = self._tier(tier)
        name = headers.get(CLASS_HEADER)
        if name is not None and name not in self._classes:
            raise ApiError(
                400,
                f"Header {CLASS_HEADER}: found {name!r}, expected one of {', '.join(self._classes)}.",
                param=CLASS_HEADER,
                code="unknown_slo_class",
            )
        if name is None and ttft_s is not None:
            name = self._nearest(ttft_s)
        if name is None and tier is not None:
            name = self._tiers.get(tier)
        name = name or tenant.default_slo or self._of_model.get(model) or self._default
        if ttft_s is None and tpot_s is None and tier is None:
            return self._ready[name]
        each = self._classes[name]
        assert each.ttft_s is not None, "load_config() has checked it"
        return Slo(name, ttft_s or each.ttft_s, tpot_s or each.tpot_s, each.e2e_s, tier)

    def _tier(self, tier: object) -> str | None:
        if tier is None or tier == "auto":
            return None
        if tier not in SERVICE_TIERS:
            raise ApiError(
                400,
                f"service_tier: found {tier!r}, expected one of auto, {', '.join(SERVICE_TIERS)}.",
                param="service_tier",
            )
        return str(tier)

    def _nearest(self, ttft_s: float) -> str:
        """The class whose target is nearest by ratio, the tighter of equals."""
        return min(
            self._classes.values(),
            key=lambda each: (abs(math.log((each.ttft_s or 1.0) / ttft_s)), each.ttft_s),
        ).name


def _promise(each: SloClass, tier: str | None) -> Slo:
    assert each.ttft_s is not None, "load_config() has checked it"
    return Slo(each.name, each.ttft_s, each.tpot_s, each.e2e_s, tier)


def _seconds(headers: Mapping[str, str], name: str) -> float | None:
    text = headers.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ApiError(
            400, f"Header {name}: found {text!r}, expected milliseconds, a number above 0.", param=name
        )
    return value / 1000.0
