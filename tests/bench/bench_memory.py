"""Peak memory and time of a whole process: import, run, summary, and results to Parquet; no figures.

At the yardstick's rate ``vllm`` falls behind: of a million requests up to a hundred thousand wait at once.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from bench.yardstick import loop, requests
from qlm_sim.metrics.run import conclude
trace = requests(int(sys.argv[2]), 4)
recorder, ended_at = loop("vllm", trace, 4)
run = conclude("vllm", recorder, trace.slo_classes, ended_at)
if len(sys.argv) > 3:
    from qlm_sim.metrics.parquet import write_requests
    write_requests(Path(sys.argv[3]), [run])
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def measure(benchmark: BenchmarkFixture, count: int, rounds: int, *parquet: str) -> None:
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parents[1]), str(count), *parquet]

    def child() -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    peak_kib = int(benchmark.pedantic(child, rounds=rounds))
    benchmark.extra_info["peak_mib"] = round(peak_kib / 1024)
    benchmark.extra_info["requests"] = count
    assert peak_kib < 2 * 1024**2


def test_whole_process(benchmark: BenchmarkFixture) -> None:
    measure(benchmark, 2_000, 5)


@pytest.mark.parametrize("count", [2_000, 10_000, 100_000, 1_000_000])
def test_with_parquet(benchmark: BenchmarkFixture, count: int, tmp_path: Path) -> None:
    measure(benchmark, count, 1, str(tmp_path / "r.parquet"))
