"""Mean and standard deviation over seeds."""

import statistics
from collections.abc import Iterable


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (over n - 1); 0 for a single value."""
    values = [float(value) for value in values]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), deviation
