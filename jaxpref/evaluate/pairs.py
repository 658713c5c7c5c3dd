"""`jaxpref evaluate`: how a model ranks preference pairs, pair by pair."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np

from jaxpref import data
from jaxpref.data import DataOptions
from jaxpref.errors import InputError
from jaxpref.evaluate.metrics import preference_metrics
from jaxpref.files import write_json, write_whole
from jaxpref.models import build
from jaxpref.models.hub import resolve_folder
from jaxpref.models.huggingface import load_config, load_params
from jaxpref.train.config import Dtype
from jaxpref.train.inputs import check_finite, check_fits
from jaxpref.train.mesh import MeshConfig, check_rows, make_mesh
from jaxpref.train.score import make_score_step, score_pairs
from jaxpref.train.scores import make_scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What `jaxpref evaluate` reads."""

    model: str
    """Hugging Face model folder (such as OUT/export of a run), or a hub id."""
    data: str
    """Preference file or data set; every pair of it is scored."""
    out: str
    """Folder for `metrics.json` and `eval_pairs.jsonl`."""
    reference: str | None = None
    """Reference model folder or hub id; without it, log-probs count by themselves."""
    beta: float = 0.1
    """Implicit rewards are beta times the log-ratio to the reference."""
    batch_size: int = 16
    """Pairs scored at the same time, over all devices."""
    max_length: int = DataOptions.max_length
    """Longest prompt and completion together, in tokens."""
    max_prompt_length: int | None = None
    """Longest prompt, in tokens, by default half of `max_length`; longer ones lose
    their beginning."""
    compute_dtype: Dtype = "float32"
    """Dtype of matrix products and activations."""
    mesh: MeshConfig = MeshConfig()
    """How the devices are used."""


def run(config: EvaluateConfig) -> dict[str, float]:
    """Scores every pair and writes `metrics.json` and `eval_pairs.jsonl` to `out`."""
    if not 0 < config.beta < math.inf:
        raise InputError(f"beta {config.beta}: must be above 0 and finite")
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be used ({error})") from error
    folder = resolve_folder(config.model)
    reference_folder = resolve_folder(config.reference) if config.reference else None
    options = DataOptions(
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        heldout_fraction=0.0,
    )
    plan = data.make_plan(
        data.open_source(config.data), data.load_tokenizer(folder), options, sides=2
    )
    pairs = plan.train
    if jax.process_index() == 0:
        print(f"{config.data}: {plan.describe()}", flush=True)
    mesh = make_mesh(config.mesh)
    check_rows(config.batch_size, 1, mesh)
    with jax.set_mesh(mesh):
        logps = _score(folder, pairs, config, mesh, "model log-probs")
        reference_logps = np.zeros_like(logps)
        if reference_folder is not None:
            reference_logps = _score(
                reference_folder, pairs, config, mesh, "reference log-probs"
            )
    rewards = config.beta * (logps - reference_logps)
    metrics = preference_metrics(rewards[:, 0] - rewards[:, 1]) | {
        "rewards/chosen": float(rewards[:, 0].mean()),
        "rewards/rejected": float(rewards[:, 1].mean()),
        "logps/chosen": float(logps[:, 0].mean()),
        "logps/rejected": float(logps[:, 1].mean()),
    }
    if jax.process_index() == 0:
        write_json(out / "metrics.json", metrics)
        _write_pairs(out / "eval_pairs.jsonl", pairs, logps, reference_logps, rewards)
        for name, value in metrics.items():
            print(f"{name:24} {value:.4f}")
    return metrics


def _score(folder: Path, pairs, config: EvaluateConfig, mesh, title: str) -> np.ndarray:
    model_config = load_config(folder)
    check_fits(config.data, pairs, str(folder), model_config)
    model = build(dataclasses.replace(model_config, compute_dtype=config.compute_dtype))
    params = load_params(folder, model)
    split = {
        "shape": data.batch_shape(pairs),
        "batch_size": config.batch_size,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    step = make_score_step(make_scores(model))
    scores = score_pairs(step, params, pairs, split=split, mesh=mesh, title=title)
    logps = scores["policy_logps"]
    check_finite(config.data, pairs, str(folder), logps)
    return logps


def _write_pairs(path: Path, pairs, logps, reference_logps, rewards) -> None:
    margins = rewards[:, 0] - rewards[:, 1]
    lines = []
    for n in range(len(pairs)):
        annotator = int(pairs.annotators[n])
        row = {
            "id": str(pairs.ids[n]),
            "row": int(pairs.rows[n]) + 1,
            "logps_chosen": float(logps[n, 0]),
            "logps_rejected": float(logps[n, 1]),
            "reference_logps_chosen": float(reference_logps[n, 0]),
            "reference_logps_rejected": float(reference_logps[n, 1]),
            "length_chosen": int(pairs.completion_lengths[n, 0]),
            "length_rejected": int(pairs.completion_lengths[n, 1]),
            "margin": float(margins[n]),
            "correct": None if margins[n] == 0 else bool(margins[n] > 0),
            "flip": bool(pairs.flips[n]),
            "annotator": pairs.annotator_names[annotator] if annotator >= 0 else None,
        }
        lines.append(json.dumps(row) + "\n")
    write_whole(path, "".join(lines))
