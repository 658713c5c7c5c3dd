"""Two models that are trained together, and the scorer of any objective."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import cast

import jax
from jaxtyping import PRNGKeyArray

from jaxpref.data.batch import PreferenceBatch
from jaxpref.models import Model, RewardModel
from jaxpref.models.logprobs import Statistic
from jaxpref.models.weights import Weights
from jaxpref.scoring.heads import (
    Asked,
    HeadScorer,
    OfPolicy,
    TrainedHeads,
    heads_of,
)
from jaxpref.scoring.reward_scorer import RewardScorer
from jaxpref.scoring.scorer import (
    ExportOptions,
    Frozen,
    Params,
    PolicyScorer,
    Scorer,
)
from jaxpref.scoring.scores import OfStates, Scored, computed_scores


@dataclasses.dataclass(frozen=True)
class TwinScorer:
    """Two models of the same kind, trained together; "one" and "two" are the keys."""

    one: Scorer

    def init(self, key: PRNGKeyArray) -> Params:
        """See `Scorer`."""
        return {"one": self.one.init(key), "two": self.one.init(second(key))}

    def load(self, folder: Path, key: PRNGKeyArray) -> Params:
        """Loads both from one folder; missing parameters are drawn independently."""
        return {
            "one": self.one.load(folder, key),
            "two": self.one.load(folder, second(key)),
        }

    @property
    def models(self) -> frozenset[str]:
        """See `Scorer`."""
        return self.one.models

    def load_frozen(self, folder: Path, models: Mapping[str, Weights]) -> Frozen:
        """What both models share."""
        return self.one.load_frozen(folder, models)

    def reference_params(
        self, reference: Weights, frozen: Frozen, params: Params | None
    ) -> Params:
        """See `Scorer`; the first model's parameters."""
        one = None if params is None else params["one"]
        return self.one.reference_params(reference, frozen, one)

    def init_frozen(self, key: PRNGKeyArray) -> Frozen:
        """See `Scorer`."""
        return self.one.init_frozen(key)

    def __call__(
        self,
        params: Params,
        frozen: Frozen,
        batch: PreferenceBatch,
        *,
        totals: Collection[str] = (),
    ) -> Scored:
        """The scores and totals of both models."""
        one, two = (
            self.one(params[m], frozen, batch, totals=totals) for m in ("one", "two")
        )
        return Scored(
            {"one": one.scores, "two": two.scores},
            {"one": one.totals, "two": two.totals},
        )

    def policy(self, params: Params, frozen: Frozen) -> tuple[Model, Params]:
        """See `Scorer`."""
        return self.one.policy(params["one"], frozen)

    def of_reference(self, stored: frozenset[str]) -> Scorer:
        """The reference scorer of a single model."""
        return self.one.of_reference(stored)

    def with_scores(self, stored: frozenset[str]) -> Scorer:
        """The scorers of a reference of each model."""
        return TwinScorer(self.one.with_scores(stored))

    def with_remat(self, policy: str) -> Scorer:
        """See `Scorer`."""
        return TwinScorer(self.one.with_remat(policy))

    def export(self, params: Params, folder: Path, options: ExportOptions) -> None:
        """Exports the first model to `folder` and the second to `<folder>_two`."""
        self.one.export(params["one"], folder, options)
        two = folder.with_name(f"{folder.name}_two")
        self.one.export(params["two"], two, options)


def second(key: PRNGKeyArray) -> jax.Array:
    """The second model's random key."""
    return jax.random.fold_in(key, 1)


def make_scorer(
    model: Model | RewardModel,
    scores: frozenset[str],
    *,
    statistics: tuple[Statistic, ...] = (),
    heads: Asked = None,
    chunk_size: int | None = None,
    num_models: int = 1,
    trained: Callable[[PolicyScorer | RewardScorer], Scorer] = lambda whole: whole,
) -> Scorer:
    """The scorer for an objective that reads `scores`.

    Args:
      model: a language model, or a reward model if `scores` contains "rewards".
      scores: see `Objective.scores`.
      statistics: see `Objective.statistics`.
      heads: see `Objective.heads`.
      chunk_size: see `PolicyScorer`.
      num_models: 2 for two models trained together.
      trained: the scorer of a model of which a part is trained, from that of the whole
        model; see `partition`.
    """
    if isinstance(model, RewardModel):
        scorer = trained(RewardScorer(model, cast(OfStates, heads)))
    else:
        read = computed_scores(scores)
        made = heads_of(cast(OfPolicy, heads))
        scorer = trained(PolicyScorer(model, read, chunk_size, statistics, made))
        if isinstance(made, TrainedHeads):
            scorer = HeadScorer(scorer, made, model.architecture)
    return scorer if num_models == 1 else TwinScorer(scorer)
