"""KV cache capacity as a real engine told it: in its log, or in its Prometheus metrics."""

import re
from collections.abc import Callable

from qlm_sim.errors import InputError
from qlm_sim.workload.files import text_chunks

_FORMS: tuple[tuple[str, Callable[[int, int], int]], ...] = (
    (r'vllm:cache_config_info\{[^}]*\bnum_gpu_blocks="(\d+)"', lambda number, block_size: number),
    (r"# (?:GPU|CUDA|cuda) blocks: ([\d,]+)", lambda number, block_size: number),
    (r"\bnum_gpu_blocks(?:_override)?(?: is)?[ :=]+([\d,]+)", lambda number, block_size: number),
    (r"KV cache size: ([\d,]+) tokens", lambda number, block_size: number // block_size),
)
"""What vLLM writes, by version: metrics of all, V0's log, V1's log in debug mode, V1's log."""


def num_gpu_blocks(path: str, block_size: int) -> int:
    """KV cache blocks of ``block_size`` tokens, from vLLM's log or /metrics. The last mention counts.

    Raises InputError where the file has none, or its metrics tell another block size.
    """
    text = "".join(text_chunks(path, None))
    told = re.findall(r'vllm:cache_config_info\{[^}]*\bblock_size="(\d+)"', text)
    if told and int(told[-1]) != block_size:
        raise InputError(
            f"{path}: the engine's blocks are of {told[-1]} tokens; give --block-size {told[-1]}"
        )
    for pattern, blocks in _FORMS:
        if found := re.findall(pattern, text):
            number = blocks(int(found[-1].replace(",", "")), block_size)
            if number < 1:
                raise InputError(f"{path}: tells {found[-1]}, less than one block of {block_size} tokens")
            return number
    raise InputError(
        f'{path}: no KV cache size; a line such as "# GPU blocks: 7448", "GPU KV cache size: 119,168 '
        'tokens" or vllm:cache_config_info{...num_gpu_blocks="7448"...} would be right'
    )
