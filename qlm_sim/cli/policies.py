"""``qlm-sim policies``: the scheduling policies, one line each."""

import argparse

from qlm_sim.cli.parser import Commands


def add_to(commands: Commands) -> None:
    parser = commands.add_parser(
        "policies",
        help="list the scheduling policies",
        description="List the scheduling policies, one line each.",
        epilog="examples:\n  qlm-sim policies\n  qlm-sim replay --policy qlm --policy vllm",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from qlm_sim.policies import POLICIES

    for name, policy in POLICIES.items():
        print(f"{name:<14}{policy.summary}")
    return 0
