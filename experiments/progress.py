"""Progress messages."""

import time


def say(started: float, text: str) -> None:
    """A line with the minutes since `started`, of `time.perf_counter`."""
    print(f"[{(time.perf_counter() - started) / 60:5.1f} min] {text}", flush=True)
