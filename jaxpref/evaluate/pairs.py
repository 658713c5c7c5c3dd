"""`jaxpref evaluate`: how a model ranks the answers of pairs, of lists, or by labels.

A language model by implicit rewards, beta times the log-ratio to its reference; a
reward model by its scores.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import numpy as np

from jaxpref import data
from jaxpref.data import DataOptions, PreferenceDataset
from jaxpref.data.bad_rows import log_skipped
from jaxpref.data.kinds import KINDS
from jaxpref.data.tokenizers import check_same_tokenizer
from jaxpref.errors import InputError
from jaxpref.evaluate.heads import RATED, answers_of, rated_kind
from jaxpref.models import Numerics, RewardModel, build
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.soft_prompt_files import soft_prompt_length
from jaxpref.models.weights import Weights, head_of, is_reward, load_weights
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
from jaxpref.scoring.checks import check_finite, check_fits
from jaxpref.scoring.hidden_sums import CHES, Ches
from jaxpref.scoring.reference import model_digest
from jaxpref.scoring.reward_scorer import RewardScorer
from jaxpref.scoring.run_weights import named_weights, reference_weights
from jaxpref.scoring.score_tables import FixedModel, ScoredSet, score_tables
from jaxpref.scoring.scorer import PolicyScorer, Scorer
from jaxpref.scoring.scores import OF_HEADS
from jaxpref.train.options import Dtype
from jaxpref.train.task import Scoring

STORED = frozenset({"rewards", "policy_logps", *CHES})
"""Scores that are stored for later evaluations: single numbers of a completion."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(data.RecordOptions):
    """What `jaxpref evaluate` reads."""

    model: str
    """Hugging Face model folder (such as OUT/export of a run), OUT of a run, one of its
    checkpoints, or a Hub ID; a language model or a reward model."""
    data: str
    """Preference file or dataset.  Every record in it is scored."""
    out: str
    """Folder for `metrics.json`, and `eval_pairs.jsonl`, `eval_answers.jsonl`,
    `eval_ratings.jsonl` or `eval_lists.jsonl`."""
    kind: Literal["pairs", "labeled", "rated", "lists"] | None = None
    """What is read of each record: pairs, single answers with labels or with ratings,
    or lists of answers with scores or ranks (default: what the first record is, but
    never rated; formats that stand for pairs or lists are read as pairs)."""
    attribute_weights: tuple[str, ...] = ()
    """Weight of each predicted rating in the reward of a model trained with
    --loss attribute_regression, as ATTRIBUTE=WEIGHT: helpfulness=1 verbosity=-0.2."""
    by: tuple[str, ...] = ()
    """Fields whose values group the records, separated by commas or spaces, for the
    accuracy of each group: annotator, length-bin (bins of the chosen answer's length
    minus the other's), or a field of the records, such as subset or meta.topic."""
    against: str | None = None
    """A second model, in the same ways as --model: the difference of the accuracies on
    the same records, with a paired interval and McNemar's test."""
    checkpoints: tuple[str, ...] = ()
    """Checkpoints of one or several runs (RUN/checkpoints/*) or exports, with the
    architecture of --model: the accuracy at each, the mean of each run, and the signal
    and the noise of the data as a benchmark."""
    text_baseline: bool = False
    """Also report what a logistic regression on TF-IDF and lengths achieves on the
    pairs, out of fold.  It needs scikit-learn, of the audit extra."""
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
        fields = (x.strip() for word in self.by for x in word.split(","))
        object.__setattr__(self, "by", tuple(dict.fromkeys(filter(None, fields))))
        at_least(1, self, "batch_size")
        at_least(2, self, "max_length", "max_prompt_length")
        if self.beta is not None and not 0 < self.beta < math.inf:
            raise InputError(f"beta {self.beta}: must be above 0 and finite")

    @property
    def implicit_beta(self) -> float:
        """The beta of implicit rewards."""
        return 0.1 if self.beta is None else self.beta


class RecordScores(NamedTuple):
    """What a model says of N records."""

    rewards: np.ndarray
    """float32 [N, K]; the rewards of the completions."""
    scores: dict[str, np.ndarray]
    """float32 [N, K] by name; the scores that the rewards come from."""
    pairs: dict[str, np.ndarray]
    """float32 [N] by name; numbers of each pair, not of its completions."""


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
    beta = config.implicit_beta
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
        head = head_of(weights)
        answers = answers_of(head, config.attribute_weights, splits.kind)
        score = prepare(weights, (head.score,), title="model scores")
        return splits, lambda given: RecordScores(
            *answers(score(given)[head.score]), {}
        )
    if config.attribute_weights:
        raise InputError(
            f"--attribute-weights {' '.join(config.attribute_weights)}: "
            f"{config.model} is a language model; leave it out"
        )
    of_pairs = CHES if splits.kind.sides == 2 else ()
    score = prepare(weights, ("policy_logps", *of_pairs), title="model log-probs")
    reference_logps = np.zeros(pairs.completion_lengths.shape, np.float32)
    if reference is not None:
        title = "reference log-probs"
        of_reference = prepare(reference, ("policy_logps",), title=title)
        reference_logps = of_reference(reference)["policy_logps"]

    def score_against_reference(given: Weights) -> RecordScores:
        found = score(given)
        logps = found["policy_logps"]
        scores = {"logps": logps, "reference_logps": reference_logps}
        ches = {name: found[name][:, 0] for name in of_pairs}
        return RecordScores(beta * (logps - reference_logps), scores, ches)

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
    if config.kind == RATED:
        kind = rated_kind(head_of(weights))
    elif config.kind:
        kind = KINDS[config.kind]
    else:
        kind = data.first_kind(config.data, config)
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


def _weights_scorer(
    weights: Weights,
    names: tuple[str, ...],
    *,
    pairs: PreferenceDataset,
    config: EvaluateConfig,
    mesh: jax.sharding.Mesh,
    title: str,
) -> Callable[[Weights], dict[str, np.ndarray]]:
    """What gives scores of every completion by name, float32 [N, K] or [N, K, n].

    It is a function of the weights of any model with the architecture of these, and
    with a soft prompt as long as theirs.  Numbers are stored, so that a model is loaded
    only if some are missing; vectors are not.
    """
    architecture = read_architecture(weights.folder)
    pairs = pairs.prefixed(soft_prompt_length(weights.adapter))
    check_fits([config.data], pairs, str(weights.folder), architecture)
    dtype = config.compute_dtype or default_compute_dtype()
    numerics = Numerics(compute_dtype=dtype)
    if OF_HEADS & set(names):
        model = RewardModel(architecture, numerics, head_of(weights))
        scorer: Scorer = RewardScorer(model)
    else:
        model = build(architecture, numerics)
        heads = Ches() if set(CHES) & set(names) else None
        scorer = PolicyScorer(model, frozenset({"policy_logps"}), heads=heads)
    index, count = share_of_rows(mesh)
    layout = data.padded_layout(
        pairs, batch_size=config.batch_size, process_index=index, process_count=count
    )
    task = Scoring(scorer=scorer, mesh=mesh, layout=layout)
    score = task.score(task.score_step)

    def compute(weights: Weights) -> dict[str, np.ndarray]:
        found = score(load_weights(weights, model), {}, pairs, title=title)
        for table in found.values():
            check_finite([config.data], pairs, str(weights.folder), table)
        return found

    def look_up(weights: Weights) -> dict[str, np.ndarray]:
        fixed = FixedModel(
            name=str(weights.folder),
            title=title,
            scores=names,
            digest=model_digest(weights, dtype),
            compute_dtype=dtype,
        )
        every = ScoredSet("pairs", pairs, (config.data,), np.arange(len(pairs)))
        found, _ = score_tables(
            fixed,
            [every],
            load=lambda: load_weights(weights, model),
            score=score,
            batch_size=config.batch_size,
            layout=f"{layout.rounding()}, mesh {dict(mesh.shape)}",
            expected=None,  # a digest of each file and of what made it is enough here
        )
        return found["pairs"]

    def of_weights(weights: Weights) -> dict[str, np.ndarray]:
        with jax.set_mesh(mesh):
            return (look_up if set(names) <= STORED else compute)(weights)

    return of_weights
