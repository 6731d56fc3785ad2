"""Reading a configuration file. Starts nothing."""

import tomllib
from dataclasses import replace
from pathlib import Path

from live.config.check import check_config
from live.config.schema import LIMITS, LiveConfig
from qlm_sim.config.table import Source, read_table
from qlm_sim.errors import InputError


def load_config(path: str | Path) -> LiveConfig:
    """The configuration of that file. Raises InputError of one line: file, key, found, expected."""
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config {path}: {(error.strerror or str(error)).lower()}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"config {path}: {error}") from None
    source = Source(str(path), LIMITS)
    config = _with_whole_paths(read_table(LiveConfig, table, source), path.parent)
    check_config(config, source)
    return config


def _with_whole_paths(config: LiveConfig, folder: Path) -> LiveConfig:
    """Paths in the file are relative to it; what exists there as a file or folder is meant as such."""

    def whole(path: str | None, always: bool = True) -> str | None:
        if path is None:
            return None
        there = folder / path
        return str(there.absolute()) if always or there.exists() else path

    url = config.store.url
    if url.startswith("sqlite:///"):
        url = f"sqlite:///{(folder / url.removeprefix('sqlite:///')).absolute()}"
    return replace(
        config,
        gateway=replace(
            config.gateway, tls_cert=whole(config.gateway.tls_cert), tls_key=whole(config.gateway.tls_key)
        ),
        store=replace(config.store, url=url),
        model=tuple(
            replace(
                model,
                path=whole(model.path, always=False),
                config=whole(model.config),
                tokenizer=whole(model.tokenizer),
            )
            for model in config.model
        ),
        engine=tuple(replace(engine, gpu=whole(engine.gpu, always=False)) for engine in config.engine),
    )
