"""Who sends requests: tenants by API key, with their weights and limits.

Time is an argument: the rate limit is a bucket that holds ten seconds of the rate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from live.config import TenantConfig, api_key
from live.gateway.errors import ApiError, retry_later

BUCKET_S = 10.0
"""Seconds over which a rate is averaged: so many requests may come at once."""


class RateLimit:
    """At most ``rate_rps`` requests per second, averaged."""

    def __init__(self, rate_rps: float) -> None:
        self._rate = rate_rps
        self._most = max(1.0, rate_rps * BUCKET_S)
        self._held = self._most
        self._at = 0.0

    def take(self, now: float, requests: int = 1) -> float:
        """Seconds until so many requests may come; 0 if they may, which then count.

        Of more than there is ever room for, the next ones wait until all are made up for.
        ``now`` begins anew with every service: a gateway that leads again has a new one.
        """
        self._held = min(self._most, self._held + max(0.0, now - self._at) * self._rate)
        self._at = now
        wanted = min(float(requests), self._most)
        if self._held < wanted:
            return (wanted - self._held) / self._rate
        self._held -= requests
        return 0.0


@dataclass(slots=True, eq=False)
class Tenant:
    """A tenant and how much it has in the house."""

    name: str
    weight: float = 1.0
    max_queued: int | None = None
    default_slo: str | None = None
    rate: RateLimit | None = None
    queued: int = 0
    """Interactive requests in the house, running ones too. Counted by the intake."""


class Tenants:
    """All tenants, by their keys."""

    def __init__(self, configs: Sequence[TenantConfig]) -> None:
        self._by_key: dict[str, Tenant] = {}
        self.all: dict[str, Tenant] = {}
        for config in configs:
            tenant = Tenant(
                config.name,
                config.weight,
                config.max_queued,
                config.default_slo,
                RateLimit(config.rate_rps) if config.rate_rps is not None else None,
            )
            key = api_key(config)
            assert key is not None, "load_config() has checked it"
            self._by_key[key] = tenant
            self.all[tenant.name] = tenant
        if not configs:
            self._everybody: Tenant | None = Tenant("default")
            self.all["default"] = self._everybody
        else:
            self._everybody = None

    def identify(self, authorization: str | None) -> Tenant:
        """The tenant of an Authorization header. Raises ApiError 401 where it is nobody's."""
        if self._everybody is not None:
            return self._everybody
        scheme, _, key = (authorization or "").partition(" ")
        tenant = self._by_key.get(key.strip()) if scheme.lower() == "bearer" else None
        if tenant is None:
            raise ApiError(
                401,
                "Incorrect API key provided." if authorization else "You didn't provide an API key.",
                code="invalid_api_key",
            )
        return tenant

    def by_name(self, name: str) -> Tenant:
        """A tenant that may have left the configuration since its batch was accepted."""
        return self.all.get(name) or Tenant(name)


def check_limits(tenant: Tenant, now: float, requests: int) -> None:
    """Refuse what is beyond the tenant's own limits. Raises ApiError 429."""
    if tenant.max_queued is not None and tenant.queued + requests > tenant.max_queued:
        raise retry_later(
            429,
            f"Tenant {tenant.name!r} has {tenant.queued} requests queued and asks for {requests} more; "
            f"its limit is {tenant.max_queued}.",
            1,
            "queue_full",
        )
    if tenant.rate is not None:
        wait_s = tenant.rate.take(now, requests)
        if wait_s > 0:
            raise retry_later(
                429, f"Rate limit reached for tenant {tenant.name!r}.", wait_s, "rate_limit_exceeded"
            )
