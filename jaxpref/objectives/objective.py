"""The objective: what a run minimizes, independent of models and meshes.

An objective defines the loss of each pair, given the scores of a batch and the
objective's state, and how the state is updated.  `jaxpref.train.gradient` computes its
gradient.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxpref import losses
from jaxpref.data.batch import PreferenceBatch
from jaxpref.data.columns import OF_ANSWERS, RATING, accept
from jaxpref.data.kinds import Kind
from jaxpref.objectives.bound_loss import (
    Loss,
    arrays_of,
    bind,
    check_of,
    unknown_arrays,
)
from jaxpref.objectives.inputs import Inputs
from jaxpref.objectives.rewards import per_token_reward, reward_metrics
from jaxpref.scoring.scores import (
    DESCRIPTIONS,
    OF_HEADS,
    OF_SAMPLED_TOKENS,
    AnswerDegrees,
    OfStates,
    Statistic,
    TokenMasks,
    TokenValues,
    models_read,
    score_and_side,
    scores_read,
)

State = Any
"""What an objective learns besides the model: a pytree, checkpointed with it."""
Metrics = dict[str, jax.Array]
EMPTY_TRACE = "empty_trace"
"""What an objective reads that is in every batch; see `PreferenceBatch`."""


@dataclasses.dataclass(frozen=True)
class GradientProbe:
    """Gradients of single pairs along a random direction, for an objective to use.

    On steps that are due, the derivative of every pair's loss along one direction v of
    random signs, <g_i, v>, is computed before the step and passed to `learn`.
    """

    due: Callable[[State], Bool[Array, ""]]
    """Whether this step is probed."""
    key: Callable[[State], PRNGKeyArray]
    """The random key of the step's direction."""
    learn: Callable[[Float[Array, "A R S"], PreferenceBatch, State], State]
    """`learn(projections, batch, state) -> state`."""


@dataclasses.dataclass(frozen=True)
class Penalty:
    """A term of the loss that depends on the model's totals over the global batch."""

    name: str
    """Of its metric."""
    reads: tuple[str, ...]
    """Names from `scoring.scores.TOTALS`."""
    coefficient: float
    """What it is multiplied by in the loss."""
    value: Callable[[Mapping[str, Any]], Float[Array, ""]]
    """`value(totals)`, of the totals by name; of two models, by model and name."""


def no_state(num_annotators: int) -> State:
    """The state of an objective that learns nothing besides the model."""
    del num_annotators
    return {}


def learn_nothing(inputs: Inputs, state: State) -> tuple[State, Metrics]:
    """Leaves the state unchanged."""
    del inputs
    return state, {}


def count_labels(batch: PreferenceBatch) -> Int[Array, ""]:
    """The number of pairs in a batch, or of their votes."""
    exist = batch.pair_index >= 0 if batch.votes is None else batch.votes != 0
    return jnp.sum(exist)


def unit_weights(batch: PreferenceBatch, state: State) -> Float[Array, "A R S"]:
    """The weights already in the batch."""
    del state
    return cast(Array, batch.weights)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a run minimizes.

        [sum_i weight_i loss_i + scalar] / count + sum_j coefficient_j penalty_j

    over the pairs i of the global batch, so that the result does not depend on
    gradient accumulation, processes or mesh.  If pairs have several votes, i runs over
    the votes, each a slot of `Inputs`; see `by_vote`.
    """

    name: str
    """For `config.json` and messages."""
    options: Mapping[str, Any]
    """All hyperparameters, for `config.json`."""
    reads: tuple[str, ...]
    """Names of the arrays it takes from `Inputs`: scores with their sides, numbers of
    the records, and columns of every batch."""
    losses: Callable[[Inputs, State], Array]
    """`losses(inputs, state) -> [..., S]`; one per pair, unweighted.  Values in empty
    slots are ignored."""
    metrics: Callable[[Inputs], Metrics]
    """Log-probabilities and rewards of the trained model."""
    init: Callable[[int], State] = no_state
    """`init(num_annotators) -> state`, with the number of known annotators."""
    learn: Callable[[Inputs, State], tuple[State, Metrics]] = learn_nothing
    """`learn(inputs, state) -> (state, metrics)`, called with the whole batch after
    scoring.  The metrics describe the state before the step."""
    evaluate: Callable[[Inputs, State], tuple[Array, Metrics]] | None = None
    """`evaluate(inputs, state) -> (losses, metrics)` on held-out pairs, if that differs
    from `losses` and the metrics of `learn`."""
    count: Callable[[PreferenceBatch], Array] = count_labels
    """What the sum of the losses is divided by."""
    complete: Callable[[PreferenceBatch], PreferenceBatch] = lambda batch: batch
    """Adds numbers that depend on the whole batch, but not on the parameters, such as
    standardized advantages; before it is split into micro-batches."""
    compares_samples: bool = True
    """Whether the baseline of a sampled answer is made of the other answers to its
    prompt, so that a single one teaches nothing."""
    weigh: Callable[[PreferenceBatch, State], Array] = unit_weights
    """`weigh(batch, state) -> [A, R, S]`; the weights of the pairs; of several votes,
    [A, R, S, V]."""
    scalar: Callable[[Inputs, State], Array] | None = None
    """An additional term for each micro-batch.  Its mean over micro-batches, weighted
    by their number of pairs, is added to the loss."""
    couples: tuple[str, ...] = ()
    """The scores that a pair's loss needs from all pairs of the batch.  If there are
    any, micro-batches are first scored without gradients."""
    probe: GradientProbe | None = None
    """See `GradientProbe`."""
    penalties: tuple[Penalty, ...] = ()
    """Terms that depend on the model's totals.  If there are any, micro-batches are
    first scored without gradients, as with `couples`."""
    check: Callable[[str, float], None] = accept
    """`check(name, value)` raises ValueError if a hyperparameter that it reads from the
    records may not have a value."""
    matches_prompts: bool = False
    """Whether undesirable answers are weighted by their prompts; see
    `scoring.matched_prompts`."""
    num_models: int = 1
    """Models trained together.  The scores of two are in `Inputs.of("one")` and
    `Inputs.of("two")`."""
    statistics: tuple[Statistic, ...] = ()
    """Statistics of the logits of each token that it defines.  The score of the same
    name is their sum over a completion's tokens."""
    heads: TokenMasks | AnswerDegrees | TokenValues | OfStates = None
    """What it asks of a scorer besides the scores of every model; parts of it may be
    trained with the model."""

    @property
    def scores(self) -> frozenset[str]:
        """The scores it reads, named without their sides."""
        return scores_read(self.reads)

    @property
    def trains_reward_model(self) -> bool:
        """Whether it trains a reward model, and not a language model."""
        return bool(self.scores & OF_HEADS)

    @property
    def models(self) -> frozenset[str]:
        """The frozen models that it reads in every step, by name."""
        return models_read(self.scores, self.statistics)

    @property
    def totals(self) -> frozenset[str]:
        """The totals it reads; see `scoring.scores.TOTALS`."""
        return frozenset(name for penalty in self.penalties for name in penalty.reads)

    @property
    def token_numbers(self) -> frozenset[str]:
        """The numbers of sampled tokens that it reads; see `PreferenceBatch`."""
        return OF_SAMPLED_TOKENS & frozenset(self.reads)

    @property
    def numbers(self) -> frozenset[str]:
        """The numbers of the records that it reads; see `data.columns`."""
        own = {*DESCRIPTIONS, *(statistic.name for statistic in self.statistics)}
        own |= self.heads.scores if self.heads else set()
        return frozenset(
            name
            for name in self.reads
            if score_and_side(name)[0] not in own and name != EMPTY_TRACE
        )

    @property
    def kind(self) -> Kind:
        """What it reads of each record: a pair, a list, or a single answer."""
        reads = [name for name in self.reads if not name.startswith(RATING)]
        is_read = lambda word: any(word in name for name in reads)
        sides = 2 if is_read("rejected") else None if self.numbers & OF_ANSWERS else 1
        rationale = is_read("rationale")
        return Kind(
            sides,
            self.numbers,
            mismatched=is_read("mismatched"),
            joint=is_read("joint"),
            rationale=rationale,
            votes=sides == 2 and not rationale and not self.mixes_empty_traces,
            check=self.check,
        )

    @property
    def num_completions(self) -> int | None:
        """K, completions of a prompt in a batch; None if the lists decide."""
        return self.kind.num_completions

    @property
    def mixes_empty_traces(self) -> bool:
        """Whether it mixes pairs with reasoning traces and pairs with empty ones."""
        return EMPTY_TRACE in self.reads

    def evaluation(
        self, inputs: Inputs, state: State
    ) -> tuple[Float[Array, "*batch S"], Metrics]:
        """Losses [..., S] and learned quantities on held-out pairs."""
        if self.evaluate is not None:
            return self.evaluate(inputs, state)
        return self.losses(inputs, state), self.learn(inputs, state)[1]


def weighted_losses(
    objective: Objective, inputs: Inputs, state: State
) -> Float[Array, "*batch S"]:
    """The losses of a batch, each times its pair's weight; 0 in empty slots."""
    values = objective.losses(inputs, state)
    return jnp.where(inputs.is_pair, values * inputs.batch.weights, 0.0)


NOT_TRAINED_ALONE = (
    losses.center_rewards,
    losses.reward_accuracies,
    losses.reward_margins,
    losses.skew_symmetric_score,
)
"""Functions that cannot be trained alone: a penalty, metrics, and a score."""


def trainable(loss: Loss) -> bool:
    """Whether a batch of pairs provides everything that a loss reads."""
    reads = arrays_of(loss)
    chosen = {"policy_logps", "rewards", "embeddings"}
    of_pairs = {score_and_side(n)[0] for n in reads if "chosen" in n} & chosen
    return (
        bool(of_pairs) and loss not in NOT_TRAINED_ALONE and not unknown_arrays(reads)
    )


def from_loss(loss: Loss, **options: Any) -> Objective:
    """The objective "mean of `loss` over the pairs of the global batch".

    A loss that couples the pairs of a batch (it takes `where`) is evaluated on the
    whole batch.  With more than one micro-batch, log-probabilities are first computed
    without gradients.

    Args:
      loss: a per-pair loss; its positional parameter names say which arrays it reads.
      **options: its hyperparameters; `PER_RECORD` reads one from the records.

    Raises:
      InputError: if an option is unknown to the loss, missing or out of range, or the
        loss reads something that a batch of pairs does not have.
    """
    bound = bind(loss, **options)
    return Objective(
        name=bound.name,
        options=bound.options,
        reads=bound.reads,
        losses=lambda inputs, state: bound(inputs),
        metrics=reward_metrics(
            bound.reads, bound.options, per_token=per_token_reward(bound.function)
        ),
        couples=bound.reads if bound.couples_pairs else (),
        check=check_of(bound),
    )
