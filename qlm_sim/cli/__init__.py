"""The command line ``qlm-sim``: results on stdout, talk on stderr.

Bad input is one line and exit status 2, Ctrl-C is 130; any other exception is a bug and keeps its traceback.
"""

from collections.abc import Sequence

from qlm_sim import __version__
from qlm_sim.cli import experiment, policies, profile, replay, scenario, validate
from qlm_sim.cli.parser import Parser, run_command

_EXAMPLES = """examples:
  qlm-sim replay                            real ShareGPT lengths, every policy, the default cluster
  qlm-sim replay sharegpt.json --rate 4     your own trace
  qlm-sim scenario check multi-model        what a scenario asks of its cluster
  qlm-sim validate log.csv --gpu H100 --model llama-2-7b    the simulated engine against a real one
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    return run_command("qlm-sim", build_parser, argv)


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
