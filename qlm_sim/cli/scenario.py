"""``qlm-sim scenario``: list those that ship, start one of your own, explain one."""

import argparse
import sys
from importlib import resources
from pathlib import Path

from qlm_sim.cli.parser import Commands
from qlm_sim.errors import InputError


def add_to(commands: Commands) -> None:
    parser = commands.add_parser(
        "scenario",
        help="list, write and explain scenarios",
        description="A scenario is one TOML file that names everything a run needs.",
        epilog="examples:\n  qlm-sim scenario list\n  qlm-sim scenario init my.toml\n"
        "  qlm-sim scenario check my.toml\n  qlm-sim replay --scenario my.toml",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    listing = actions.add_parser(
        "list",
        help="the scenarios that ship",
        description="List the scenarios that ship.",
        epilog="examples:\n  qlm-sim scenario list",
    )
    listing.set_defaults(run=run_list)
    init = actions.add_parser(
        "init",
        help="write a commented scenario to start from",
        description="Write a scenario in which every key is explained.",
        epilog="examples:\n  qlm-sim scenario init\n  qlm-sim scenario init my.toml\n"
        "  qlm-sim scenario init -    print it",
    )
    init.add_argument(
        "file", nargs="?", default="scenario.toml", metavar="FILE", help="default: scenario.toml"
    )
    init.set_defaults(run=run_init)
    check = actions.add_parser(
        "check",
        help="explain a scenario: instances, memory, offered load and capacity",
        description="Read a scenario strictly and say what it asks of its cluster.",
        epilog="examples:\n  qlm-sim scenario check multi-model\n  qlm-sim scenario check my.toml",
    )
    check.add_argument("scenario", metavar="NAME|FILE", help="a shipped scenario, or a file")
    check.set_defaults(run=run_check)


def run_list(args: argparse.Namespace) -> int:
    from qlm_sim.config import load_scenario, shipped_scenarios

    for name in shipped_scenarios():
        print(f"{name:<14}{load_scenario(name).description}")
    return 0


def run_init(args: argparse.Namespace) -> int:
    text = resources.files("qlm_sim.config").joinpath("template.toml").read_text()
    if args.file == "-":
        sys.stdout.write(text)
        return 0
    path = Path(args.file)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise InputError(f"{path}: is there already; name another file, or remove it") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    print(f"{path}: written; next: qlm-sim scenario check {path}")
    return 0


def run_check(args: argparse.Namespace) -> int:
    from rich.console import Console

    from qlm_sim.cli.explain import explain
    from qlm_sim.config import load_scenario

    explain(load_scenario(args.scenario), Console(file=sys.stdout))
    return 0
