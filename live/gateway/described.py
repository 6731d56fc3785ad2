"""What a configuration means, in words: the answer of ``serve --check``."""

from live.build import make_instances
from live.config import LiveConfig
from live.serving import url_of
from live.store import without_password


def describe(config: LiveConfig) -> str:
    """One line for each part. Raises InputError where engines or tokenizers cannot be made."""
    gateway = config.gateway
    url = url_of(gateway.host, gateway.port, tls=gateway.tls_cert is not None)
    lines = [
        f"gateway    {url}, policy {config.scheduler.policy}, store {without_password(config.store.url)}",
    ]
    for each in config.slo:
        roles = [
            *(["default"] if each.name == config.default_class else []),
            *(["batches"] if each.name == config.batch_class else []),
            *(f"service_tier {tier}" for tier, name in config.service_tier.items() if name == each.name),
        ]
        targets = [
            f"{word} <= {value:g} s"
            for word, value in (("TTFT", each.ttft_s), ("TPOT", each.tpot_s), ("E2E", each.e2e_s))
            if value is not None
        ]
        lines.append(f"class      {each.name}: {', '.join(targets)}{_in_brackets(roles)}")
    for tenant in config.tenant:
        limits = [f"weight {tenant.weight:g}"]
        if tenant.max_queued is not None:
            limits.append(f"at most {tenant.max_queued} queued")
        if tenant.rate_rps is not None:
            limits.append(f"at most {tenant.rate_rps:g} requests/s")
        lines.append(f"tenant     {tenant.name}: {', '.join(limits)}")
    if not config.tenant:
        lines.append("tenant     everybody, without a key")
    for engine, instance in zip(config.engine, make_instances(config), strict=True):
        where = engine.url or " ".join(engine.command or (engine.kind,))
        for name, profile in instance.models.items():
            resident = " (resident)" if name == (engine.resident or engine.models[0]) else ""
            lines.append(
                f"engine     {engine.id}: {name}{resident}, {where}; "
                f"KV {profile.kv_capacity_tokens:,} tokens, {profile.max_num_seqs} sequences, "
                f"context {profile.max_model_len:,}"
            )
    return "\n".join(lines)


def _in_brackets(roles: list[str]) -> str:
    return f" ({', '.join(roles)})" if roles else ""
