"""What no single key can tell: names that must match between tables, and settings that exclude each other."""

from pathlib import Path
from urllib.parse import urlsplit

from live.config.schema import SERVICE_TIERS, EngineConfig, LiveConfig, api_key
from qlm_sim.config.table import Source, did_you_mean
from qlm_sim.core.types import Lso
from qlm_sim.errors import InputError
from qlm_sim.policies import POLICIES


def check_config(config: LiveConfig, source: Source) -> None:
    """Raises InputError at the first contradiction, naming its key."""
    _check_slo(config, source)
    _check_tenants(config, source)
    _check_engines(config, source)
    gateway, scheduler = config.gateway, config.scheduler
    if (gateway.tls_cert is None) != (gateway.tls_key is None):
        missing = "tls_key" if gateway.tls_key is None else "tls_cert"
        raise InputError(f"{source.name}: gateway.{missing}: missing, expected with its counterpart")
    for key, file in (("tls_cert", gateway.tls_cert), ("tls_key", gateway.tls_key)):
        if file is not None and not Path(file).is_file():
            raise source.refuse(f"gateway.{key}", file, "a file that exists")
    if gateway.advertise is not None:
        _check_url("gateway.advertise", gateway.advertise, source)
    if scheduler.policy not in POLICIES:
        raise InputError(
            f"{source.name}: scheduler.policy: found {scheduler.policy!r}; "
            f"{did_you_mean(scheduler.policy, list(POLICIES))}"
        )
    if POLICIES[scheduler.policy].told:
        raise source.refuse(
            "scheduler.policy", scheduler.policy, "a policy that need not be told output lengths in advance"
        )
    for name in scheduler.without:
        if name not in list(Lso):
            raise source.refuse("scheduler.without", name, f"one of {', '.join(Lso)}")
    if not config.store.url.startswith(("sqlite:///", "redis://", "rediss://", "unix://")):
        raise source.refuse("store.url", config.store.url, "sqlite:///PATH or redis://HOST:PORT/DB")


def _check_slo(config: LiveConfig, source: Source) -> None:
    names = [each.name for each in config.slo]
    _once("slo", names, source)
    if not names:
        raise source.refuse("slo", [], "at least one class")
    for number, each in enumerate(config.slo):
        if each.ttft_s is None:
            raise InputError(f"{source.name}: slo[{number}].ttft_s: missing, expected a number above 0")
    asked = [
        ("default_slo", config.default_slo),
        ("batch.slo", config.batch.slo),
        *((f"service_tier.{tier}", name) for tier, name in config.service_tier.items()),
        *((f"tenant[{n}].default_slo", each.default_slo) for n, each in enumerate(config.tenant)),
        *((f"model[{n}].default_slo", each.default_slo) for n, each in enumerate(config.model)),
    ]
    for key, name in asked:
        if name is not None and name not in names:
            raise InputError(f"{source.name}: {key}: found {name!r}; {did_you_mean(name, names)}")
    for tier in config.service_tier:
        if tier not in SERVICE_TIERS:
            raise InputError(
                f"{source.name}: service_tier.{tier}: unknown key; {did_you_mean(tier, [*SERVICE_TIERS])}"
            )


def _check_tenants(config: LiveConfig, source: Source) -> None:
    _once("tenant", [each.name for each in config.tenant], source)
    keys: dict[str, str] = {}
    for number, tenant in enumerate(config.tenant):
        at = f"tenant[{number}]"
        if (tenant.api_key is None) == (tenant.api_key_env is None):
            raise InputError(f"{source.name}: {at}: expected one of api_key and api_key_env")
        key = api_key(tenant)
        if not key:
            raise InputError(
                f"{source.name}: {at}.api_key_env: {tenant.api_key_env} is not set, expected the key in it"
                if tenant.api_key_env is not None
                else f"{source.name}: {at}.api_key: found '', expected a key"
            )
        if key in keys:
            raise InputError(f"{source.name}: {at}: its API key is also that of tenant {keys[key]!r}")
        keys[key] = tenant.name


def _check_engines(config: LiveConfig, source: Source) -> None:
    models = [each.name for each in config.model]
    _once("model", models, source)
    _once("engine", [each.id for each in config.engine], source, key="id")
    if not config.engine:
        raise source.refuse("engine", [], "at least one engine")
    for number, engine in enumerate(config.engine):
        at = f"engine[{number}]"
        if not engine.models:
            raise source.refuse(f"{at}.models", [], "at least one model")
        for name in engine.models:
            if name not in models:
                raise InputError(f"{source.name}: {at}.models: found {name!r}; {did_you_mean(name, models)}")
        if engine.resident is not None and engine.resident not in engine.models:
            raise source.refuse(f"{at}.resident", engine.resident, f"one of {', '.join(engine.models)}")
        if engine.kv_tokens is not None and engine.kv_tokens < engine.block_size:
            expected = f"at least block_size ({engine.block_size})"
            raise source.refuse(f"{at}.kv_tokens", engine.kv_tokens, expected)
        _check_servers(engine, at, source)
    served = {name for engine in config.engine for name in engine.models}
    for number, name in enumerate(models):
        if name not in served:
            raise InputError(
                f"{source.name}: model[{number}]: found {name!r}, expected an engine that serves it"
            )


def _check_servers(engine: EngineConfig, at: str, source: Source) -> None:
    several = len(engine.models) > 1
    if several and engine.swap == "none":
        raise source.refuse(f"{at}.swap", engine.swap, "sleep or restart, as it has several models")
    if engine.kind != "server":
        return
    for key, url in (("url", engine.url), *((f"urls.{name}", url) for name, url in engine.urls.items())):
        if url is not None:
            _check_url(f"{at}.{key}", url, source)
    if sum((engine.url is not None, bool(engine.urls), engine.command is not None)) != 1:
        raise InputError(
            f"{source.name}: {at}: expected one of url or urls (attach to servers) and command (start them)"
        )
    if engine.swap == "restart" and engine.command is None:
        raise source.refuse(f"{at}.swap", engine.swap, "sleep or none, as only our own server restarts")
    if several and engine.swap == "sleep" and engine.command is None:
        for name in engine.models:
            if name not in engine.urls:
                raise InputError(f"{source.name}: {at}.urls.{name}: missing, expected the server of {name}")


def _check_url(key: str, url: str, source: Source) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise source.refuse(key, url, "http://HOST:PORT or https://HOST:PORT, an IPv6 address in brackets")


def _once(table: str, names: list[str], source: Source, key: str = "name") -> None:
    seen: set[str] = set()
    for number, name in enumerate(names):
        if name in seen:
            raise source.refuse(f"{table}[{number}].{key}", name, "each name once")
        seen.add(name)
