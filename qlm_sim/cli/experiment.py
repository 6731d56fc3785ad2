"""``qlm-sim experiment``: the figures and tables of experiments/, made again."""

import argparse
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from qlm_sim.cli.parser import Commands
from qlm_sim.errors import InputError

_FOLDER = Path(__file__).parents[2] / "experiments"


def add_to(commands: Commands) -> None:
    parser = commands.add_parser(
        "experiment",
        help="repeat an experiment of the checkout",
        description="Repeat experiments: files of experiments/ with a function run(out, quick). They need a "
        "checkout; the installed package does not hold them.",
        epilog="examples:\n  qlm-sim experiment --list\n"
        "  qlm-sim experiment random_scenarios --quick --out runs/x",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to run, one after the other")
    parser.add_argument("--quick", action="store_true", help="a small part of each, to see that it works")
    parser.add_argument(
        "--out", metavar="DIR", help="where tables and figures go (default: experiments/results)"
    )
    parser.add_argument("--list", action="store_true", help="list the experiments and exit")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    known = experiments()
    if args.list:
        for name, path in known.items():
            print(f"{name:<20}{path.read_text(encoding='utf-8').splitlines()[0].strip(chr(34))}")
        return 0
    if not args.names:
        raise InputError(f"experiment: no name given; one of: {', '.join(known)}")
    for name in args.names:
        if name not in known:
            raise InputError(f"experiment {name!r}: not known; one of: {', '.join(known)}")
    sys.path.insert(0, str(_FOLDER))  # for modules that several experiments share
    out = Path(args.out) if args.out else _FOLDER / "results"
    for name in args.names:
        spec = spec_from_file_location(f"experiments.{name}", known[name])
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        module.run(out, args.quick)
        print(f"{name}: {out}")
    return 0


def experiments() -> dict[str, Path]:
    """The experiments of this checkout by name. Raises InputError where there is no checkout."""
    if not _FOLDER.is_dir():
        raise InputError(
            "experiments are run from a checkout of the repository; the installed package has none"
        )
    return {
        path.stem: path for path in sorted(_FOLDER.glob("*.py")) if "\ndef run(out: Path" in path.read_text()
    }
