"""`jaxpref evaluate`: how a model ranks preference pairs, pair by pair.

A language model by implicit rewards, beta times the log-ratio to its reference; a
reward model by its scores.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from jaxpref import data
from jaxpref.data import DataOptions, PreferenceDataset
from jaxpref.data.tokenizers import check_same_tokenizer
from jaxpref.errors import InputError, show
from jaxpref.evaluate.metrics import accuracy, preference_metrics, wilson_interval
from jaxpref.files import check_output_folder, write_json, write_whole
from jaxpref.models import Numerics, RewardModel, build
from jaxpref.models.folder import load_params
from jaxpref.models.folder_config import is_reward_model, read_architecture
from jaxpref.models.hub import resolve_folder
from jaxpref.runtime.mesh import (
    MeshConfig,
    check_rows,
    make_mesh,
    rows_for,
    share_of_rows,
)
from jaxpref.runtime.precision import default_compute_dtype
from jaxpref.runtime.processes import log
from jaxpref.runtime.ranges import at_least
from jaxpref.runtime.run_folder import locked
from jaxpref.scoring.checks import check_finite, check_fits
from jaxpref.scoring.scorer import make_scorer
from jaxpref.train.options import Dtype
from jaxpref.train.task import Scoring

METRICS, PAIRS = FILES = "metrics.json", "eval_pairs.jsonl"
"""Names of the files that an evaluation writes."""
LOCK = ".evaluate.lock"
"""The file that a process locks while it writes them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What `jaxpref evaluate` reads."""

    model: str
    """Hugging Face model folder (such as OUT/export of a run), or a Hub ID; a language
    model or a reward model."""
    data: str
    """Preference file or dataset.  Every pair in it is scored."""
    out: str
    """Folder for `metrics.json` and `eval_pairs.jsonl`."""
    reference: str | None = None
    """Reference model folder or Hub ID (default: none, so rewards are beta times the
    log-probability).  A reward model needs none."""
    beta: float | None = None
    """Implicit rewards are beta times the log-ratio to the reference (default: 0.1).  A
    reward model has no beta."""
    batch_size: int = 16
    """Pairs scored at once, over all devices."""
    max_length: int | None = None
    """Maximum tokens of prompt and completion together (default: 1024, or the model's
    context if that is shorter)."""
    max_prompt_length: int | None = None
    """Maximum tokens of a prompt (default: what the completions leave of --max-length,
    at least half).  Longer prompts lose their earliest turns, or their first tokens."""
    ignore_fields: tuple[str, ...] = ()
    """Fields of the records to ignore, even if they change what a record means."""
    compute_dtype: Dtype | None = None
    """Dtype of matrix products and activations (default: bfloat16 on TPU and GPU,
    float32 on CPU)."""
    mesh: MeshConfig = MeshConfig()
    """How the devices are used."""

    def __post_init__(self):
        at_least(1, self, "batch_size")
        at_least(2, self, "max_length", "max_prompt_length")
        if self.beta is not None and not 0 < self.beta < math.inf:
            raise InputError(f"beta {self.beta}: must be above 0 and finite")


def run(config: EvaluateConfig) -> dict[str, float]:
    """Scores every pair and writes `metrics.json` and `eval_pairs.jsonl` to `out`.

    Returns:
      `preference_metrics` of the reward margins, means of the scores, and
      `length_only/...`, the accuracy of always preferring the longer completion.

    Raises:
      InputError: for anything that the caller can fix.
    """
    reads = {f"--{x}": getattr(config, x) for x in ("model", "data", "reference")}
    out = check_output_folder("--out", config.out, FILES, reads)
    _check_foreign(out)
    with locked(out, LOCK):
        return _run(config, out)


def _run(config: EvaluateConfig, out: Path) -> dict[str, float]:
    beta = 0.1 if config.beta is None else config.beta
    folder = resolve_folder(config.model)
    scored_alone = is_reward_model(folder)
    for flag, given in {"reference": config.reference, "beta": config.beta}.items():
        if scored_alone and given is not None:
            raise InputError(
                f"--{flag} {given}: {config.model} is a reward model, whose scores are "
                f"rewards by themselves; leave out --{flag}"
            )
    reference_folder = resolve_folder(config.reference) if config.reference else None
    options = DataOptions(
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        ignore_fields=config.ignore_fields,
        heldout_fraction=0.0,
    )
    positions = read_architecture(folder).max_position_embeddings
    options = data.for_model(options, positions)
    source, tokenizer = data.open_source(config.data), data.load_tokenizer(folder)
    plan = data.make_splits(source, tokenizer, options, whole_turns=scored_alone)
    pairs = plan.train
    plan.fields.check_ignored(config.ignore_fields)
    for line in (plan.describe(), plan.fields.describe()):
        log(f"{config.data}: {line}")
    if reference_folder is not None:
        check_same_tokenizer(
            tokenizer,
            reference_folder,
            [([source], pairs)],
            options,
            name=str(config.reference),
        )
    dtype = config.compute_dtype or default_compute_dtype()
    config = dataclasses.replace(config, compute_dtype=dtype)
    mesh = make_mesh(config.mesh)
    check_rows(config.batch_size, 1, mesh)
    rows = rows_for(len(pairs), config.batch_size, mesh)
    config = dataclasses.replace(config, batch_size=rows)
    with jax.set_mesh(mesh):
        score = functools.partial(_score, pairs=pairs, config=config, mesh=mesh)
        if scored_alone:
            rewards = score(folder, "rewards", title="model scores")
            scores = {"rewards": rewards}
        else:
            logps = score(folder, "policy_logps", title="model log-probs")
            reference_logps = np.zeros_like(logps)
            if reference_folder is not None:
                reference_logps = score(
                    reference_folder, "policy_logps", title="reference log-probs"
                )
            rewards = beta * (logps - reference_logps)
            scores = {"logps": logps, "reference_logps": reference_logps}
    margins = rewards[:, 0] - rewards[:, 1]
    metrics = preference_metrics(margins) | _length_only(pairs)
    for name, table in ({"rewards": rewards} | scores).items():
        if name != "reference_logps":
            metrics[f"{name}/chosen"] = float(table[:, 0].mean())
            metrics[f"{name}/rejected"] = float(table[:, 1].mean())
    if jax.process_index() == 0:
        _write_pairs(out / PAIRS, pairs, scores, margins)
        write_json(out / METRICS, metrics)
        for name, value in metrics.items():
            show(f"{name:27} {value:.4f}")
    return metrics


def _check_foreign(out: Path) -> None:
    """Refuses a folder with files of these names that no evaluation wrote."""
    if (out / METRICS).exists() and not (out / PAIRS).exists():
        raise InputError(
            f"--out {out}: has a {METRICS} without {PAIRS}, so another program wrote"
            " it; use another folder"
        )
    if (out / PAIRS).exists():
        with (out / PAIRS).open("rb") as file:
            first = file.readline(1_000_000)
        try:
            ours = not first or {"id", "row", "margin"} <= json.loads(first).keys()
        except (ValueError, AttributeError, RecursionError):
            ours = False
        if not ours:
            raise InputError(
                f"--out {out}: its {PAIRS} was not written by `jaxpref evaluate`, which"
                " would overwrite it; use another folder"
            )


def _length_only(pairs: PreferenceDataset) -> dict[str, float]:
    """How often the chosen completion is the one with more tokens; a tie counts half.

    What a model has to beat to have understood anything.
    """
    lengths = pairs.completion_lengths
    share = accuracy(lengths[:, 0] - lengths[:, 1])
    low, high = wilson_interval(share, len(pairs))
    name = "length_only/accuracies"
    return {name: share, f"{name}_low": low, f"{name}_high": high}


def _score(
    folder: Path,
    name: str,
    *,
    pairs: PreferenceDataset,
    config: EvaluateConfig,
    mesh: jax.sharding.Mesh,
    title: str,
) -> np.ndarray:
    """One of the scores of every completion, float32 [N, 2]."""
    architecture = read_architecture(folder)
    check_fits([config.data], pairs, str(folder), architecture)
    make_model = RewardModel if name == "rewards" else build
    dtype = config.compute_dtype or default_compute_dtype()
    model = make_model(architecture, Numerics(compute_dtype=dtype))
    params = load_params(folder, model)
    index, count = share_of_rows(mesh)
    layout = data.padded_layout(
        pairs, batch_size=config.batch_size, process_index=index, process_count=count
    )
    scorer = make_scorer(model, frozenset({name}))
    task = Scoring(scorer=scorer, mesh=mesh, layout=layout)
    scores = task.score(task.score_step)(params, None, pairs, title=title)
    check_finite([config.data], pairs, str(folder), scores[name])
    return scores[name]


def _write_pairs(
    path: Path,
    pairs: PreferenceDataset,
    scores: Mapping[str, np.ndarray],
    margins: np.ndarray,
) -> None:
    lines = []
    for n in range(len(pairs)):
        annotator = int(pairs.columns["annotator"][n])
        row = {
            "id": str(pairs.ids[n]),
            "row": int(pairs.columns["row"][n]) + 1,
            **{
                f"{name}_{side}": float(table[n, k])
                for name, table in scores.items()
                for k, side in enumerate(("chosen", "rejected"))
            },
            "length_chosen": int(pairs.completion_lengths[n, 0]),
            "length_rejected": int(pairs.completion_lengths[n, 1]),
            "margin": float(margins[n]),
            "correct": None if margins[n] == 0 else bool(margins[n] > 0),
            "flip": bool(pairs.columns["is_flipped"][n]),
            "annotator": pairs.annotator_names[annotator] if annotator >= 0 else None,
        }
        lines.append(json.dumps(row) + "\n")
    write_whole(path, "".join(lines))
