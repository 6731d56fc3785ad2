"""The command line ``qlm-live``: results on stdout, talk on stderr.

Bad input is one line and exit status 2, Ctrl-C is 130; any other exception is a bug and keeps its traceback.
"""

import sys
from collections.abc import Sequence

from live.commands import fake_engine, profile, replay, serve
from qlm_sim import __version__
from qlm_sim.cli.parser import Parser, run_command

_EXAMPLES = """examples:
  qlm-live serve live.toml              the OpenAI-compatible gateway in front of your engines
  qlm-live serve live.toml --check      only check the configuration
  qlm-live serve live.toml --dry-run    the same on fake engines
  qlm-live fake-engine llama-2-7b --port 8101
  qlm-live profile --config live.toml   measure the engines, and write their hardware profiles
  qlm-live compare --config live.toml --rate 2    a trace on them, and on simulated ones like them
"""


_EXTRA = ("aiohttp", "httptools", "multipart", "prometheus_client", "redis", "starlette", "uvicorn", "uvloop")
"""What the extra "live" brings, as imported."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    try:
        return run_command("qlm-live", build_parser, argv)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in _EXTRA:
            raise
        print(
            f"qlm-live: error: {missing} is not installed; it comes with pip install 'qlm[live]', "
            "in a checkout pip install -e '.[live]'",
            file=sys.stderr,
        )
        return 2


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(prog="qlm-live", description="Queue management for LLM serving, live.", epilog=_EXAMPLES)
    parser.add_argument("--version", action="version", version=f"qlm-live {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (serve, replay, profile, fake_engine):
        command.add_to(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
