"""What `--objective auto` found out about the labels, in words."""

from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

MODELS = (
    "all labels are correct",
    "one flip rate for all labels",
    "one flip rate for each annotator",
    "flip rates that depend on features of the pair",
    "flip rates that depend on annotator and features",
)
"""The descriptions that `--objective auto` compares, by the number `noise/model`."""
ODDS = ("one_rate", "annotators", "features", "both")
"""Their names in the metrics `noise/log_odds_NAME`, but for the first."""


def auto_choice(records: Sequence[Record]) -> str:
    """Which description `auto` chose, and why; empty for other objectives.

    Args:
      records: lines of `metrics.jsonl`.
    """
    last = next((r for r in records[::-1] if "noise/model" in r), {})
    odds = [last.get(f"noise/log_odds_{name}") for name in ODDS]
    if last.get("noise/model") is None or None in odds:
        return ""
    log_odds, which = [0.0, *odds], int(last["noise/model"])
    next_best = max(
        (n for n in range(len(MODELS)) if n != which), key=lambda n: log_odds[n]
    )
    ahead = log_odds[which] - log_odds[next_best]
    if ahead < 0:
        return (
            f'{MODELS[which]}; "{MODELS[next_best]}" explain the labels better '
            f"(by {-ahead:.1f} nats), but this may be a preference of all annotators"
        )
    return f'{MODELS[which]} (log-odds of {ahead:.1f} against "{MODELS[next_best]}")'
