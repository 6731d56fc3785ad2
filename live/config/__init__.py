"""The configuration of ``qlm-live``: one TOML file, read strictly."""

from live.config.load import load_config
from live.config.schema import (
    SERVICE_TIERS,
    EngineConfig,
    LiveConfig,
    ModelConfig,
    StoreConfig,
    TenantConfig,
    api_key,
)

__all__ = [
    "SERVICE_TIERS",
    "EngineConfig",
    "LiveConfig",
    "ModelConfig",
    "StoreConfig",
    "TenantConfig",
    "api_key",
    "load_config",
]
