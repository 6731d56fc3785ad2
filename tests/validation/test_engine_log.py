"""KV cache blocks out of what vLLM writes."""

import pytest

from qlm_sim.errors import InputError
from qlm_sim.validation.engine_log import num_gpu_blocks


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("INFO 01-01 gpu_executor.py:84] # GPU blocks: 7448, # CPU blocks: 512\n", 7448),
        (
            "DEBUG [loggers.py:352] cache_config_info with initialization after num_gpu_blocks is: 7438\n",
            7438,
        ),
        ("INFO [kv_cache_utils.py:829] GPU KV cache size: 412,304 tokens\n", 25769),
        ("GPU KV cache size: 1,600 tokens\nGPU KV cache size: 3,200 tokens\n", 200),
        ('vllm:cache_config_info{block_size="16",num_gpu_blocks="7438",sliding_window="None"} 1.0\n', 7438),
    ],
)
def test_blocks_are_found(text, blocks, tmp_path):
    path = tmp_path / "engine.log"
    path.write_text(f"something else, num_cpu_blocks=3\n{text}and more\n")
    assert num_gpu_blocks(str(path), 16) == blocks


def test_tokens_become_blocks_of_the_size_given(tmp_path):
    path = tmp_path / "engine.log"
    path.write_text("GPU KV cache size: 32,768 tokens\n")
    assert num_gpu_blocks(str(path), 32) == 1024


def test_what_is_missing_or_contradicts_is_told(tmp_path):
    path = tmp_path / "engine.log"
    path.write_text("nothing of use\n")
    with pytest.raises(InputError, match=r"engine\.log: no KV cache size"):
        num_gpu_blocks(str(path), 16)
    path.write_text('vllm:cache_config_info{block_size="32",num_gpu_blocks="10"} 1\n')
    with pytest.raises(InputError, match=r"blocks are of 32 tokens; give --block-size 32"):
        num_gpu_blocks(str(path), 16)
