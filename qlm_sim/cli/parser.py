"""argparse as this command line wants it: errors of one line, help with examples, no abbreviated flags."""

import argparse
from typing import Any, NoReturn, TypeAlias

from qlm_sim.errors import InputError

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


class Parser(argparse.ArgumentParser):
    """Raises InputError in place of printing its usage and exiting."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")
