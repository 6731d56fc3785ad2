"""The command line ``qlm-sim``: results on stdout, talk on stderr.

Bad input is one line and exit status 2, Ctrl-C is 130; any other exception is a bug and keeps its traceback.
"""

import os
import signal
import sys
from collections.abc import Sequence

from qlm_sim import __version__
from qlm_sim.cli import experiment, policies, profile, replay, scenario, validate
from qlm_sim.cli.parser import Parser
from qlm_sim.errors import InputError

_EXAMPLES = """examples:
  qlm-sim replay                            real ShareGPT lengths, every policy, the default cluster
  qlm-sim replay sharegpt.json --rate 4     your own trace
  qlm-sim scenario check multi-model        what a scenario asks of its cluster
  qlm-sim validate log.csv --gpu H100 --model llama-2-7b    the simulated engine against a real one
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    try:
        args = build_parser().parse_args(argv)
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except InputError as error:
        print(f"qlm-sim: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qlm-sim: error: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader has left, as in ``qlm-sim ... | head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="qlm-sim", description="Queue management for LLM serving, simulated.", epilog=_EXAMPLES
    )
    parser.add_argument("--version", action="version", version=f"qlm-sim {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (replay, scenario, profile, validate, experiment, policies):
        command.add_to(commands)
    return parser
