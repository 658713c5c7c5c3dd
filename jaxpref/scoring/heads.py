"""Heads that are trained with a policy, and that nothing but training uses."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from jaxpref.data.batch import PreferenceBatch
from jaxpref.models import Architecture, Model
from jaxpref.models.weights import Weights
from jaxpref.scoring.degrees import DegreeHead
from jaxpref.scoring.scorer import ExportOptions, Frozen, Params, Scorer
from jaxpref.scoring.scores import (
    AnswerDegrees,
    OfStates,
    Scored,
    TokenMasks,
    TokenValues,
)
from jaxpref.scoring.token_masks import ActivationMasks, LearnedMasks
from jaxpref.scoring.values import ValueHead

OfPolicy = TokenMasks | AnswerDegrees | TokenValues | None
"""What an objective may ask of the scorer of a policy."""
Asked = OfPolicy | OfStates
"""What an objective may ask of a scorer."""
TrainedHeads = LearnedMasks | DegreeHead | ValueHead
"""Heads with parameters."""


def heads_of(asked: OfPolicy) -> ActivationMasks | TrainedHeads | None:
    """How what an objective asks for is computed."""
    match asked:
        case None:
            return None
        case AnswerDegrees():
            return DegreeHead(asked.count)
        case TokenValues():
            return ValueHead()
        case TokenMasks(learned=0):
            return ActivationMasks()
        case TokenMasks():
            return LearnedMasks(shared=asked.learned == 1)


@dataclasses.dataclass(frozen=True)
class HeadScorer:
    """A policy and heads; "policy" and "heads" are the keys of the parameters.

    Only the policy is exported.
    """

    one: Any
    """The scorer of the policy, or of the part of it that is trained."""
    heads: TrainedHeads
    architecture: Architecture

    @property
    def models(self) -> frozenset[str]:
        """See `Scorer`."""
        return self.one.models

    def _with_heads(self, policy: Params, key: PRNGKeyArray) -> Params:
        new = self.heads.init(jax.random.fold_in(key, 1), self.architecture)
        return {"policy": policy, "heads": new}

    def init(self, key: PRNGKeyArray) -> Params:
        """See `Scorer`."""
        return self._with_heads(self.one.init(key), key)

    def load(self, folder: Path, key: PRNGKeyArray) -> Params:
        """See `Scorer`; the heads are new."""
        return self._with_heads(self.one.load(folder, key), key)

    def load_frozen(self, folder: Path, models: Mapping[str, Weights]) -> Frozen:
        """See `Scorer`."""
        return self.one.load_frozen(folder, models)

    def init_frozen(self, key: PRNGKeyArray) -> Frozen:
        """See `Scorer`."""
        return self.one.init_frozen(key)

    def reference_params(
        self, reference: Weights, frozen: Frozen, params: Params | None
    ) -> Params:
        """See `Scorer`."""
        policy = None if params is None else params["policy"]
        return self.one.reference_params(reference, frozen, policy)

    def __call__(
        self,
        params: Params,
        frozen: Frozen,
        batch: PreferenceBatch,
        *,
        totals: Collection[str] = (),
    ) -> Scored:
        """See `Scorer`."""
        heads = params["heads"]
        return self.one(params["policy"], frozen, batch, totals=totals, heads=heads)

    def policy(self, params: Params, frozen: Frozen) -> tuple[Model, Params]:
        """See `Scorer`."""
        return self.one.policy(params["policy"], frozen)

    def of_reference(self, stored: frozenset[str]) -> Scorer:
        """See `Scorer`."""
        return self.one.of_reference(stored)

    def with_scores(self, stored: frozenset[str]) -> Scorer:
        """See `Scorer`; also with heads, which it does not read."""
        return dataclasses.replace(self, one=self.one.with_scores(stored))

    def with_remat(self, policy: str) -> Scorer:
        """See `Scorer`."""
        return dataclasses.replace(self, one=self.one.with_remat(policy))

    def export(self, params: Params, folder: Path, options: ExportOptions) -> None:
        """See `Scorer`."""
        self.one.export(params["policy"], folder, options)
