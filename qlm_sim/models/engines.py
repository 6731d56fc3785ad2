"""Engine versions: the time each adds to an iteration, and to a request, beside the GPU's kernels.

Reads engines.toml. Knows nothing of models or GPUs.
"""

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from qlm_sim.errors import InputError
from qlm_sim.models.hardware import Coefficient

DEFAULT_ENGINE = "vllm-0.11"
WHOLE_PROMPT_SINCE = (0, 19)
"""The first version of vLLM whose scheduler_reserve_full_isl is on unless it is turned off."""


@dataclass(frozen=True, slots=True)
class EngineVersion:
    """One engine version's overhead per iteration: iteration_s + sequence_s x sequences."""

    name: str
    scheduler: str
    """"v0" or "v1": which of vLLM's schedulers the version runs. V1's rules are simulated for both."""
    reserves_whole_prompt: bool
    """Whether scheduler_reserve_full_isl (see EngineConfig) is on by default."""
    iteration_s: Coefficient
    workers_s: Coefficient
    """Further seconds per iteration where each of several GPUs has a process of its own."""
    sequence_s: Coefficient
    request_s: Coefficient
    """Seconds that one request spends in the server outside of its engine. No other waits for it."""

    @property
    def caveat(self) -> str | None:
        """What is not simulated of it."""
        if self.scheduler == "v1":
            return None
        return f"{self.name} ran vLLM's V0 scheduler, which is simulated by V1's rules"


@cache
def _rows() -> list[tuple[tuple[int, ...], dict[str, dict[str, float | str] | str]]]:
    table = tomllib.loads(files("qlm_sim.models").joinpath("engines.toml").read_text("utf-8"))
    return [(_numbers(row["since"]), row) for row in table["vllm"]]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def load_engine(name: str) -> EngineVersion:
    """The engine of a name such as "vllm-0.11" or "vllm-0.6.3"; "vllm" alone is ``DEFAULT_ENGINE``."""
    wanted = DEFAULT_ENGINE if name.lower() == "vllm" else name.lower()
    match = re.fullmatch(r"vllm-v?(\d+(?:\.\d+)*)", wanted)
    if match is None:
        raise InputError(f"engine {name!r} is not known; wanted vllm-VERSION, such as {DEFAULT_ENGINE}")
    fitting = [row for since, row in _rows() if since <= _numbers(match[1])]
    if not fitting:
        raise InputError(f"engine {name!r} is too old; the oldest known is vllm-{_rows()[0][1]['since']}")
    row = fitting[-1]
    return EngineVersion(
        name=f"vllm-{match[1]}",
        scheduler=str(row["scheduler"]),
        reserves_whole_prompt=_numbers(match[1]) >= WHOLE_PROMPT_SINCE,
        iteration_s=Coefficient(**row["iteration_s"]),  # type: ignore[arg-type]
        workers_s=Coefficient(**row["workers_s"]),  # type: ignore[arg-type]
        sequence_s=Coefficient(**row["sequence_s"]),  # type: ignore[arg-type]
        request_s=Coefficient(**row["request_s"]),  # type: ignore[arg-type]
    )
