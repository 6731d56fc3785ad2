"""``qlm-live serve``: the gateway in front of the engines of a configuration."""

from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory

from qlm_sim.cli.parser import Commands
from qlm_sim.errors import InputError

_EXAMPLES = """examples:
  qlm-live serve live.toml
  qlm-live serve live.toml --port 9000 --record events.jsonl
  qlm-live serve live.toml --check
  qlm-live serve live.toml --dry-run      # no GPU needed: fake engines, timed as the profiles say

A configuration needs a model and an engine:
  [[model]]
  name = "llama-2-7b"
  [[engine]]
  id = "gpu-0"
  models = ["llama-2-7b"]
  url = "http://127.0.0.1:8101"       # a running vLLM server
docs/deploy.md explains every key.
"""


def add_to(commands: Commands) -> None:
    parser = commands.add_parser(
        "serve",
        help="serve an OpenAI-compatible API in front of engines",
        description="Serve an OpenAI-compatible API, with the scheduler in front of the engines.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.toml")
    parser.add_argument("--host", help="address to listen on, in place of gateway.host")
    parser.add_argument("--port", type=int, help="port to listen on, in place of gateway.port")
    parser.add_argument("--record", type=Path, metavar="EVENTS", help="write the event log of the run")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="only say what the configuration means")
    instead.add_argument(
        "--dry-run",
        action="store_true",
        help="serve on fake engines, timed by the profiles, with a durable queue that is gone afterwards",
    )
    parser.add_argument("--speed", type=float, metavar="N", help="with --dry-run: so many times faster")
    parser.set_defaults(run=run)


def run(args: Namespace) -> int:
    from dataclasses import replace

    from live.config import StoreConfig, load_config

    if args.port is not None and not 0 <= args.port <= 65535:
        raise InputError(f"--port: found {args.port}, expected a whole number from 0 to 65535")
    if args.speed is not None and not args.dry_run:
        raise InputError("--speed: only with --dry-run; real engines are as fast as they are")
    if args.speed is not None and not 0 < args.speed < float("inf"):
        raise InputError(f"--speed: found {args.speed:g}, expected a number above 0")
    config = load_config(args.config)
    gateway = config.gateway
    if args.host is not None:
        gateway = replace(gateway, host=args.host)
    if args.port is not None:
        gateway = replace(gateway, port=args.port)
    config = replace(config, gateway=gateway)
    if args.check:
        from live.gateway.described import describe

        print(describe(config))
        return 0
    from live.gateway.server import serve

    if not args.dry_run:
        return serve(config, args.record)
    from live.build import on_fakes

    # Fake answers are not for the batches that wait in the configured store.
    with TemporaryDirectory(prefix="qlm-live-") as folder:
        config = replace(config, store=StoreConfig(url=f"sqlite:///{folder}/dry-run.db"))
        return serve(on_fakes(config, args.speed or 1.0), args.record)
