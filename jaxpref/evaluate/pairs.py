"""`jaxpref evaluate`: how a model ranks the answers of pairs, of lists, or by labels.

A language model by implicit rewards, beta times the log-ratio to its reference; a
reward model by its scores.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from jaxpref import data
from jaxpref.data import DataOptions, PreferenceDataset
from jaxpref.data.bad_rows import FILE, log_skipped, write_skipped
from jaxpref.data.kinds import KINDS
from jaxpref.data.tokenizers import check_same_tokenizer
from jaxpref.errors import InputError, show
from jaxpref.evaluate import results
from jaxpref.files import check_output_folder, write_json, write_whole
from jaxpref.models import Numerics, RewardModel, build
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.soft_prompt_files import soft_prompt_length
from jaxpref.models.weights import Weights, is_reward, load_weights
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
from jaxpref.scoring.run_weights import named_weights, reference_weights
from jaxpref.scoring.twin import make_scorer
from jaxpref.train.options import Dtype
from jaxpref.train.task import Scoring

METRICS = "metrics.json"
FILES = (METRICS, *(kind.file for kind in results.ALL))
"""Names of the files that an evaluation may write."""
LOCK = ".evaluate.lock"
"""The file that a process locks while it writes them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(data.RecordOptions):
    """What `jaxpref evaluate` reads."""

    model: str
    """Hugging Face model folder (such as OUT/export of a run), OUT of a run, one of its
    checkpoints, or a Hub ID; a language model or a reward model."""
    data: str
    """Preference file or dataset.  Every record in it is scored."""
    out: str
    """Folder for `metrics.json`, and `eval_pairs.jsonl`, `eval_answers.jsonl` or
    `eval_lists.jsonl`."""
    kind: Literal["pairs", "labeled", "lists"] | None = None
    """What is read of each record: pairs, single answers with labels, or lists of
    answers with scores or ranks (default: what the first record is; formats that stand
    for pairs or lists are read as pairs)."""
    adapter: str | None = None
    """Folder or Hub ID of a LoRA adapter of the model, as peft writes it."""
    reference: str | None = None
    """Reference model or adapter, or base for the model without --adapter (default:
    none, so rewards are beta times the log-probability).  A reward model needs none."""
    beta: float | None = None
    """Implicit rewards are beta times the log-ratio to the reference (default: 0.1).  A
    reward model has no beta."""
    batch_size: int = 16
    """Records scored at once, over all devices."""
    max_length: int | None = None
    """Maximum tokens of prompt and completion together (default: 1024, or the model's
    context if that is shorter)."""
    max_prompt_length: int | None = None
    """Maximum tokens of a prompt (default: what the completions leave of --max-length,
    at least half).  Longer prompts lose their earliest turns, or their first tokens."""
    compute_dtype: Dtype | None = None
    """Dtype of matrix products and activations (default: bfloat16 on TPU and GPU,
    float32 on CPU)."""
    mesh: MeshConfig = MeshConfig()
    """How the devices are used."""

    def __post_init__(self):
        super().__post_init__()
        at_least(1, self, "batch_size")
        at_least(2, self, "max_length", "max_prompt_length")
        if self.beta is not None and not 0 < self.beta < math.inf:
            raise InputError(f"beta {self.beta}: must be above 0 and finite")


def run(config: EvaluateConfig) -> dict[str, float]:
    """Scores every record; writes `metrics.json` and a line per record to `out`.

    Returns:
      The metrics of `results.results_of`: of pairs, `preference_metrics` of the reward
      margins; of labeled answers, `answer_metrics`; of lists, `list_metrics`; means of
      the scores; and `length_only/...`, what the lengths of the answers achieve alone.

    Raises:
      InputError: for anything that the caller can fix.
    """
    reads = {
        f"--{x}": getattr(config, x) for x in ("model", "data", "adapter", "reference")
    }
    out = check_output_folder("--out", config.out, (*FILES, FILE), reads)
    _check_foreign(out)
    with locked(out, LOCK):
        return _run(config, out)


def _run(config: EvaluateConfig, out: Path) -> dict[str, float]:
    splits, score = open_pairs(config)
    records, found = splits.train, results.results_of(splits.kind)
    write_skipped(out, splits.skipped, config.on_bad_row)
    rewards, scores = score(named_weights(config.model, config.adapter))
    try:
        metrics = found.metrics(records, rewards, scores)
    except InputError as error:
        raise InputError(f"{config.data}: {error}") from None
    if jax.process_index() == 0:
        lines = found.lines(records, rewards, scores)
        for other in results.ALL:  # of an earlier evaluation
            (out / other.file).unlink(missing_ok=True)
        write_whole(out / found.file, "".join(json.dumps(x) + "\n" for x in lines))
        write_json(out / METRICS, metrics)
        for name, value in metrics.items():
            show(f"{name:27} {value:.4f}")
    return metrics


RecordScores = tuple[np.ndarray, dict[str, np.ndarray]]
"""The rewards of every record's completions, float32 [N, K], and the scores that they
come from, by name."""


def open_pairs(
    config: EvaluateConfig,
) -> tuple[data.Splits, Callable[[Weights], RecordScores]]:
    """Reads the records, and prepares to score them with models like `config.model`.

    Args:
      config: what is read; `out` is not used.

    Returns:
      The records, all in `train`, and a function that scores all of them with weights,
      which must have the architecture and the vocabulary of `config.model`.  The
      reference has scored the records before it is returned, and its programs are
      compiled once for all weights.

    Raises:
      InputError: for anything that the caller can fix.
    """
    beta = 0.1 if config.beta is None else config.beta
    weights = named_weights(config.model, config.adapter)
    scored_alone = is_reward(weights)
    for flag, given in {"reference": config.reference, "beta": config.beta}.items():
        if scored_alone and given is not None:
            raise InputError(
                f"--{flag} {given}: {config.model} is a reward model, whose scores are "
                f"rewards by themselves; leave out --{flag}"
            )
    reference = None
    if config.reference is not None:
        reference = reference_weights(config.reference, weights)
    splits = _read_pairs(config, weights, reference)
    pairs = splits.train
    dtype = config.compute_dtype or default_compute_dtype()
    config = dataclasses.replace(config, compute_dtype=dtype)
    mesh = make_mesh(config.mesh)
    check_rows(config.batch_size, 1, mesh)
    rows = rows_for(len(pairs), config.batch_size, mesh)
    config = dataclasses.replace(config, batch_size=rows)
    prepare = functools.partial(_weights_scorer, pairs=pairs, config=config, mesh=mesh)
    if scored_alone:
        score = prepare(weights, "rewards", title="model scores")

        def score_alone(weights: Weights) -> RecordScores:
            rewards = score(weights)
            return rewards, {"rewards": rewards}

        return splits, score_alone
    score = prepare(weights, "policy_logps", title="model log-probs")
    reference_logps = np.zeros(pairs.completion_lengths.shape, np.float32)
    if reference is not None:
        title = "reference log-probs"
        of_reference = prepare(reference, "policy_logps", title=title)
        reference_logps = of_reference(reference)

    def score_against_reference(weights: Weights) -> RecordScores:
        logps = score(weights)
        scores = {"logps": logps, "reference_logps": reference_logps}
        return beta * (logps - reference_logps), scores

    return splits, score_against_reference


def _read_pairs(
    config: EvaluateConfig, weights: Weights, reference: Weights | None
) -> data.Splits:
    """All records, tokenized for the model; checks the reference's tokenizer."""
    options = DataOptions(
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        **config.for_other(),
        heldout_fraction=0.0,
    )
    folder = weights.folder
    positions = read_architecture(folder).context_length
    positions -= soft_prompt_length(weights.adapter)
    options = data.for_model(options, positions)
    kind = KINDS[config.kind] if config.kind else data.first_kind(config.data, config)
    source = data.open_records(config.data, options, sides=kind.sides)
    tokenizer = data.load_tokenizer(folder, options.template_options)
    whole_turns = is_reward(weights)
    plan = data.make_splits(
        source, tokenizer, options, kind=kind, whole_turns=whole_turns
    )
    pairs = plan.train
    log_skipped(plan.skipped)
    plan.fields.check_ignored(config.ignore_fields)
    plan.fields.check_mapped(config.mapped)
    plan.fields.check_rendered(options.template_options, config.data)
    for line in (plan.describe(), plan.fields.describe()):
        log(f"{config.data}: {line}")
    if reference is not None:
        check_same_tokenizer(
            tokenizer,
            reference.folder,
            [([source], pairs)],
            options,
            name=str(config.reference),
            kind=kind,
        )
    return plan


def _check_foreign(out: Path) -> None:
    """Refuses a folder with files of these names that no evaluation wrote."""
    written = [kind for kind in results.ALL if (out / kind.file).exists()]
    if (out / METRICS).exists() and not written:
        raise InputError(
            f"--out {out}: has a {METRICS} without {results.PAIRS.file}, so another "
            "program wrote it; use another folder"
        )
    for kind in written:
        with (out / kind.file).open("rb") as file:
            first = file.readline(1_000_000)
        try:
            ours = not first or {"id", "row", kind.field} <= json.loads(first).keys()
        except (ValueError, AttributeError, RecursionError):
            ours = False
        if not ours:
            raise InputError(
                f"--out {out}: its {kind.file} was not written by `jaxpref evaluate`, "
                "which would overwrite it; use another folder"
            )


def _weights_scorer(
    weights: Weights,
    name: str,
    *,
    pairs: PreferenceDataset,
    config: EvaluateConfig,
    mesh: jax.sharding.Mesh,
    title: str,
) -> Callable[[Weights], np.ndarray]:
    """What gives one of the scores of every completion, float32 [N, K].

    It is a function of any weights with the architecture of these, and with a soft
    prompt as long as theirs.
    """
    architecture = read_architecture(weights.folder)
    pairs = pairs.prefixed(soft_prompt_length(weights.adapter))
    check_fits([config.data], pairs, str(weights.folder), architecture)
    make_model = RewardModel if name == "rewards" else build
    dtype = config.compute_dtype or default_compute_dtype()
    model = make_model(architecture, Numerics(compute_dtype=dtype))
    index, count = share_of_rows(mesh)
    layout = data.padded_layout(
        pairs, batch_size=config.batch_size, process_index=index, process_count=count
    )
    scorer = make_scorer(model, frozenset({name}))
    task = Scoring(scorer=scorer, mesh=mesh, layout=layout)

    def score(weights: Weights) -> np.ndarray:
        with jax.set_mesh(mesh):
            params = load_weights(weights, model)
            scores = task.score(task.score_step)(params, {}, pairs, title=title)
        check_finite([config.data], pairs, str(weights.folder), scores[name])
        return scores[name]

    return score
