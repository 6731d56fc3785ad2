"""Reads Prometheus' text format as far as it is needed here: one gauge, or the labels of an info."""

import re

_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def metric_sum(text: str, name: str) -> float:
    """The sum over all series of the metric; 0 where there is none."""
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith(name) and line[len(name)] in "{ "
    )


def metric_labels(text: str, name: str) -> dict[str, str]:
    """The labels of the metric's first series."""
    for line in text.splitlines():
        if line.startswith(name + "{"):
            return dict(_LABEL.findall(line))
    return {}
