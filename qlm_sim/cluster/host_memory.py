"""An instance's host memory: model weights, and the KV cache of requests that were evicted there.

Weights come first. KV cache takes what they leave, and the oldest gives way when more weights come.
"""

from qlm_sim.cluster.requests import SimRequest
from qlm_sim.core.host import HostModels
from qlm_sim.core.types import InstanceSpec


class HostMemory:
    def __init__(self, spec: InstanceSpec) -> None:
        self.models = HostModels(
            spec.host_bytes, [(name, spec.models[name].weight_bytes) for name in spec.host_models]
        )
        self.kv_bytes = 0
        self._kv: dict[SimRequest, int] = {}
        """Bytes by request, in order of eviction."""

    def keep(self, seq: SimRequest, kv_bytes: int) -> bool:
        """Take in the KV cache of ``seq.computed`` tokens, if there is room."""
        if self.models.used_bytes + self.kv_bytes + kv_bytes > self.models.capacity_bytes:
            return False
        self._kv[seq] = kv_bytes
        self.kv_bytes += kv_bytes
        seq.host = self
        seq.host_tokens = seq.computed
        return True

    def release(self, seq: SimRequest) -> None:
        """Forget the KV cache of ``seq``."""
        self.kv_bytes -= self._kv.pop(seq)
        seq.host = None
        seq.host_tokens = 0

    def load(self, model: str, weight_bytes: int) -> None:
        """Weights pass through on their way to the GPU and stay as long as they fit."""
        self.models.touch(model, weight_bytes)
        while self._kv and self.models.used_bytes + self.kv_bytes > self.models.capacity_bytes:
            self.release(next(iter(self._kv)))
