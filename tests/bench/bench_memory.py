"""Peak memory and time of a whole process: import, run, summary, results to Parquet; no figures."""

import subprocess
import sys
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

CHILD = """
import resource, sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from bench_yardstick import loop, requests
from qlm_sim.metrics.parquet import write_requests
from qlm_sim.metrics.run import conclude
trace = requests(int(sys.argv[1]), 4)
recorder, ended_at = loop("vllm", trace, 4)
run = conclude("vllm", recorder, trace.slo_classes, ended_at)
write_requests(Path(sys.argv[2]), [run])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize("count", [2_000, 10_000, 100_000])
def test_whole_process(benchmark: BenchmarkFixture, count: int, tmp_path: Path) -> None:
    here = Path(__file__).parent
    command = [
        sys.executable,
        "-c",
        CHILD,
        str(count),
        str(tmp_path / "r.parquet"),
        str(here),
        str(here.parent),
    ]

    def child() -> str:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    peak_kib = int(benchmark.pedantic(child, rounds=1))
    benchmark.extra_info["peak_mib"] = round(peak_kib / 1024)
    benchmark.extra_info["requests"] = count
    assert peak_kib < 2 * 1024**2
