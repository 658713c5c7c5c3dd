"""Progress messages."""

import time


def say(started: float, text: str) -> None:
    """Prints a line with the minutes since `started` (a `time.perf_counter`)."""
    print(f"[{(time.perf_counter() - started) / 60:5.1f} min] {text}", flush=True)
