"""The imports tell the architecture: who may know whom, read from the syntax tree of every module."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("qlm_sim", "live")
MODULES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

# Under this directory or in this module alone may the library be imported.
ONLY_UNDER = {
    "simpy": "qlm_sim/cluster",
    "asyncio": "live",
    "pulp": "qlm_sim/solver",
    "highspy": "qlm_sim/solver",
    "matplotlib": "qlm_sim/report",
    "argparse": "qlm_sim/cli",
}

# What a package of ours may import of the others. The core sees itself alone; none below sees the CLI.
MAY_IMPORT = {
    "qlm_sim/core": {"qlm_sim/core"},
    "qlm_sim/estimator": {"qlm_sim/core", "qlm_sim/estimator"},
    "qlm_sim/policies": {
        "qlm_sim/core",
        "qlm_sim/estimator",
        "qlm_sim/policies",
        "qlm_sim/solver",
        "qlm_sim/errors",
    },
    "qlm_sim/solver": {"qlm_sim/core", "qlm_sim/estimator", "qlm_sim/solver", "qlm_sim/errors"},
    "qlm_sim/models": {"qlm_sim/core", "qlm_sim/models", "qlm_sim/hardware_profiles", "qlm_sim/errors"},
    "qlm_sim/workload": {"qlm_sim/core", "qlm_sim/workload", "qlm_sim/errors"},
    "qlm_sim/cluster": {
        "qlm_sim/core",
        "qlm_sim/models",
        "qlm_sim/workload",
        "qlm_sim/cluster",
        "qlm_sim/runtime",
        "qlm_sim/errors",
    },
    "qlm_sim/metrics": {"qlm_sim/core", "qlm_sim/metrics", "qlm_sim/errors"},
    "qlm_sim/report": {"qlm_sim/core", "qlm_sim/metrics", "qlm_sim/report", "qlm_sim/errors"},
    "qlm_sim/runtime": {"qlm_sim/core"},
}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, and whether importing the file imports it.

    What stands in a function or under ``if TYPE_CHECKING`` is not imported with the file.
    """
    tree = ast.parse((ROOT / path).read_text())
    inner = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING")
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in inner
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import hides the direction"
            yield from ((f"{node.module}.{alias.name}", id(node) not in inner) for alias in node.names)


def part(dotted: str) -> str:
    """The package of ours that a module belongs to: qlm_sim.core.types is of qlm_sim/core."""
    return "/".join(dotted.split(".")[:2])


def test_every_module_of_both_packages_is_read() -> None:
    assert Path("qlm_sim/core/types.py") in MODULES
    assert Path("live/__init__.py") in MODULES


def test_core_imports_the_standard_library_numpy_and_msgspec_alone() -> None:
    """Of msgspec it takes the struct: frozen, and made in a third of a dataclass's time."""
    allowed = sys.stdlib_module_names | {"numpy", "msgspec", "qlm_sim"}
    strangers = {
        (str(path), name)
        for path in MODULES
        if path.is_relative_to("qlm_sim/core")
        for name, _ in imports(path)
        if name.split(".")[0] not in allowed
    }
    assert not strangers


@pytest.mark.parametrize("library", ONLY_UNDER)
def test_library_stays_where_it_belongs(library: str) -> None:
    users = {path for path in MODULES for name, _ in imports(path) if name.split(".")[0] == library}
    astray = {str(path) for path in users if not path.is_relative_to(ONLY_UNDER[library])}
    if library == "argparse":
        astray = {path for path in astray if path != "live/cli.py" and not path.startswith("live/commands/")}
    assert not astray


def test_vllm_is_imported_in_one_file_at_most() -> None:
    users = {str(path) for path in MODULES for name, _ in imports(path) if name.split(".")[0] == "vllm"}
    assert len(users) <= 1


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_package_imports_only_what_it_may_know(package: str) -> None:
    own = [path for path in MODULES if path.is_relative_to(package) or str(path) == f"{package}.py"]
    assert own, f"no module of {package}"
    strangers = {
        (str(path), name)
        for path in own
        for name, _ in imports(path)
        if name.split(".")[0] in PACKAGES and part(name) not in MAY_IMPORT[package]
    }
    assert not strangers


def test_simulator_does_not_know_the_live_world() -> None:
    strangers = {
        (str(path), name)
        for path in MODULES
        if path.is_relative_to("qlm_sim")
        for name, _ in imports(path)
        if name.split(".")[0] == "live"
    }
    assert not strangers


def test_matplotlib_is_imported_when_a_figure_is_drawn() -> None:
    eager = {
        (str(path), name)
        for path in MODULES
        for name, eagerly in imports(path)
        if eagerly and name.split(".")[0] == "matplotlib"
    }
    assert not eager


HEAVY = {
    "numpy",
    "matplotlib",
    "pandas",
    "pyarrow",
    "pulp",
    "highspy",
    "simpy",
    "mistral_common",
    "tokenizers",
}


def loaded_by(code: str) -> set[str]:
    """Heavy libraries that a fresh Python has after the code."""
    code += "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return HEAVY & set(done.stdout.split())


def test_command_line_starts_without_heavy_libraries() -> None:
    """``qlm-sim --help`` must not wait for libraries that only a run or a report needs."""
    assert loaded_by("from qlm_sim.cli import build_parser; build_parser()") == set()


def test_replaying_from_python_loads_only_what_a_simulation_needs() -> None:
    """Tables, figures and the MILP cost more time to import than 2,000 requests to run."""
    assert loaded_by("from qlm_sim.replay import replay") == {"numpy", "simpy"}
