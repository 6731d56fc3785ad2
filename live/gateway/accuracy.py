"""How good the estimated waits are: each is compared with the wait that came, online.

Over the last ``RECENT`` requests: coverage (how often the wait was within the quantile told; 0.9 of the time
for an honest p90), the error of the median, and R2 as the paper reports it.
"""

from collections import deque

import numpy as np

RECENT = 1000


class Accuracy:
    def __init__(self) -> None:
        self._scores: deque[tuple[float, float, float]] = deque(maxlen=RECENT)
        self.scored = 0

    def score(self, median_s: float, p90_s: float, actual_s: float) -> None:
        self._scores.append((median_s, p90_s, actual_s))
        self.scored += 1

    def coverage(self) -> dict[str, float]:
        """Share of waits within the quantile told, by quantile; empty before the first."""
        if not self._scores:
            return {}
        scores = np.array(self._scores)
        return {
            "0.5": float(np.mean(scores[:, 2] <= scores[:, 0])),
            "0.9": float(np.mean(scores[:, 2] <= scores[:, 1])),
        }

    def errors(self) -> dict[str, float]:
        """Mean absolute error of the median, and its bias (told less came), in seconds."""
        if not self._scores:
            return {}
        scores = np.array(self._scores)
        off = scores[:, 0] - scores[:, 2]
        return {"mean_absolute": float(np.mean(np.abs(off))), "bias": float(np.mean(off))}

    def r2(self) -> float:
        """1 less the share of the waits' variance that the medians leave unexplained; 0 where undefined."""
        if len(self._scores) < 2:
            return 0.0
        scores = np.array(self._scores)
        spread = float(np.sum((scores[:, 2] - scores[:, 2].mean()) ** 2))
        if spread == 0.0:
            return 0.0
        return 1.0 - float(np.sum((scores[:, 2] - scores[:, 0]) ** 2)) / spread
