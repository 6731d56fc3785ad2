"""A worker for vLLM on CPU that really sleeps: vLLM's own ignores the order.

Asleep it holds neither weights nor KV cache; awake it loads them again. ``--worker-cls
sleeping_worker.SleepingCPUWorker``, with this folder on PYTHONPATH. On GPUs vLLM's own sleep mode does this.
"""

import copy
import ctypes
import gc
from typing import Any

from vllm.config import set_current_vllm_config
from vllm.v1.worker.cpu_worker import CPUWorker


class SleepingCPUWorker(CPUWorker):
    _kv_cache_config: Any = None

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        self._kv_cache_config = copy.deepcopy(kv_cache_config)
        super().initialize_from_config(kv_cache_config)

    def sleep(self, level: int = 1) -> None:
        runner = self.model_runner
        layers = self.compilation_config.static_forward_context
        for layer in layers.values():
            if hasattr(layer, "kv_cache"):
                layer.kv_cache = None
        layers.clear()
        runner.kv_caches.clear()
        runner.attn_groups = []
        runner.model = None
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or the process keeps what it has freed

    def wake_up(self, tags: list[str] | None = None) -> None:
        if self.model_runner.model is not None:
            return
        with set_current_vllm_config(self.vllm_config):
            self.model_runner.load_model()
            self.model_runner.initialize_kv_cache(copy.deepcopy(self._kv_cache_config))
