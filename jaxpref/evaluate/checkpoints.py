"""Accuracies at several checkpoints, and what they say about the data."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxpref.errors import InputError
from jaxpref.evaluate.pairs import EvaluateConfig
from jaxpref.evaluate.signal_noise import signal_and_noise
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.weights import Weights, is_reward
from jaxpref.scoring.run_weights import CHECKPOINTS, named_weights

Hits = Callable[[Weights], Float[np.ndarray, " records"]]


def checkpoint_metrics(config: EvaluateConfig, hits: Hits) -> dict[str, Any]:
    """The accuracy at each of `config.checkpoints`, by run, and `signal_and_noise`.

    Args:
      config: the model, and its checkpoints.
      hits: how right the rewards of weights are about each record, from 0 to 1.

    Returns:
      `accuracies` by checkpoint; `runs`, with the `mean` and the standard `deviation`
      of each run's; and `signal`, `noise` and `signal_to_noise`.

    Raises:
      InputError: if a checkpoint has another architecture than the model.
    """
    model = named_weights(config.model, config.adapter)
    accuracies, by_run = {}, {}
    for name in sorted(config.checkpoints, key=_order):
        weights = named_weights(name, None)
        same = read_architecture(weights.folder) == read_architecture(model.folder)
        if not same or is_reward(weights) != is_reward(model):
            raise InputError(
                f"--checkpoints {name}: has another architecture than --model "
                f"{config.model}; name checkpoints of the same model"
            )
        accuracies[name] = float(np.mean(hits(weights)))
        by_run.setdefault(_run(name), []).append(accuracies[name])
    runs = {
        name: {"mean": float(np.mean(x)), "deviation": float(np.std(x))}
        for name, x in by_run.items()
    }
    return {"accuracies": accuracies, "runs": runs, **signal_and_noise(by_run)}


def checkpoint_lines(found: Mapping[str, Any]) -> list[str]:
    """The metrics in lines."""
    lines = [f"{name}: accuracy {x:.4f}" for name, x in found["accuracies"].items()]
    lines += [
        f"{name}: mean {x['mean']:.4f}, standard deviation {x['deviation']:.4f}"
        for name, x in found["runs"].items()
    ]
    for name in ("signal", "noise", "signal_to_noise"):
        if found[name] is not None:
            lines.append(f"{name.replace('_', ' ')}: {found[name]:.4g}")
    return lines


def _run(name: str) -> str:
    """The run that a checkpoint belongs to; an export is a run of its own."""
    path = Path(name)
    return str(path.parent.parent) if path.parent.name == CHECKPOINTS else name


def _order(name: str) -> tuple[str, int]:
    """Checkpoints of a run by their steps."""
    step = Path(name).name
    return _run(name), int(step) if step.isdecimal() else 0
