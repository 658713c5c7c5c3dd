"""What a sweep writes about its runs: `sweep.json`, `sweep.csv`, and the report."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxpref.errors import show
from jaxpref.files import write_json, write_whole
from jaxpref.report.progress import aligned
from jaxpref.report.sweep import chosen_text, setting_rows, write_sweep
from jaxpref.sweep.options import SweepOptions
from jaxpref.sweep.tables import (
    Over,
    Record,
    as_csv,
    axes_of_comparison,
    chosen_settings,
    frontier_points,
    numeric,
    settings,
)


def write_tables(
    folder: Path,
    records: Sequence[Record],
    *,
    over: Over,
    options: SweepOptions,
    command: str,
) -> None:
    """Writes `sweep.json` and `sweep.csv`.

    Args:
      folder: OUT of the sweep.
      records: the runs that are done; see `runs.run_all`.
      over: the swept options and their values.
      options: how the runs are compared.
      command: the command line.

    Raises:
      InputError: if a file cannot be written.
    """
    content = content_of(records, over, options) | {"command": command}
    write_json(folder / "sweep.json", content)
    write_whole(folder / "sweep.csv", as_csv(records, over))


def content_of(
    records: Sequence[Record], over: Over, options: SweepOptions
) -> dict[str, Any]:
    """What `sweep.json` holds, without the command."""
    evaluated = {record["heldout_digest"] for record in records}
    compared = axes_of_comparison(records)
    frontier = chosen = None
    if compared is not None:
        x, y = compared
        along = next(iter(numeric(over)), None)
        points = frontier_points(records, over, x, y)
        frontier = {"x": x, "y": y, "along": along, "points": points}
        if options.most_kl is not None and x == "kl":
            chosen = chosen_settings(records, over, y, most_kl=options.most_kl)
    starts = {r.get("reference_reward") for r in records} - {None}
    return {
        "over": {name: list(values) for name, values in over.items()},
        # None if the runs are not all evaluated on the same pairs.
        "heldout_pairs": records[0]["heldout_pairs"] if len(evaluated) == 1 else None,
        "kl_prompts": options.kl_prompts,
        "kl_tokens": options.kl_tokens,
        "reward_model": options.reward_model,
        "most_kl": options.most_kl,
        # One number only if all runs have the same reference and prompts.
        "reference_reward": starts.pop() if len(starts) == 1 else None,
        "runs": list(records),
        "settings": settings(records),
        "frontier": frontier,
        "chosen": chosen,
    }


def write_report(folder: Path) -> dict[str, Any]:
    """Writes `report.html` and the figure from `sweep.json`, which is returned."""
    content = json.loads((folder / "sweep.json").read_text("utf-8"))
    write_sweep(folder, content)
    return content


def print_summary(content: dict[str, Any], out: str) -> None:
    """Prints the table of settings and where the rest is."""
    columns, rows = setting_rows(content)
    lines = aligned([columns, *rows])
    if content["chosen"]:
        lines += chosen_text(content).split("\n\n")
    show("\n".join([*lines, f"report: {out}/report.html, runs: {out}/sweep.csv"]))
