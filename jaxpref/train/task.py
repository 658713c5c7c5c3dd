"""The task of a run: everything it computes with, built once from its config."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jaxpref import data
from jaxpref.data.batch import PreferenceBatch
from jaxpref.models.weights import Weights
from jaxpref.objectives.objective import Objective
from jaxpref.runtime.mesh import batch_sharding, on_devices
from jaxpref.runtime.saved_optimizer import SavedOptimizer
from jaxpref.scoring.moving_reference import MovingReference
from jaxpref.scoring.reference import Reference
from jaxpref.scoring.score_dataset import make_score_step, score_dataset
from jaxpref.scoring.scorer import ExportOptions, Frozen, Params, Scorer
from jaxpref.scoring.scores import policy_name, stored_scores
from jaxpref.train.evaluation import make_evaluation
from jaxpref.train.state import TrainState, init_state
from jaxpref.train.step import make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """What scores records, without parameters or records.

    Each program is built once, on first use.
    """

    scorer: Scorer
    """What is trained or evaluated, and how it scores a batch."""
    mesh: Mesh
    """The devices."""
    layout: data.Layout
    """How records become batches."""

    def abstract_params(self) -> Params:
        """Shapes, dtypes and shardings of the parameters."""
        # Make the key inside: the mesh may not contain a device of this process.
        params = jax.eval_shape(lambda: self.scorer.init(jax.random.key(0)))
        return on_devices(params, self.mesh)

    @functools.cached_property
    def score_step(self) -> Any:
        """The jitted `(params, frozen, batch) -> (scores, pairs)` of the scorer."""
        return make_score_step(self.scorer)

    def score(self, score_step: Callable) -> Callable:
        """`score_dataset` with a score step and these batches and mesh."""
        return functools.partial(
            score_dataset,
            score_step,
            eval_batches=self.layout.eval_batches,
            mesh=self.mesh,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Programs(Scoring):
    """The programs that a run compiles, without parameters or records."""

    objective: Objective
    """What is minimized."""
    optimizer: optax.GradientTransformation
    """Computes updates from gradients."""
    schedule: optax.Schedule
    """The learning rate of each step."""
    num_annotators: int = 0
    """Number of known annotators of the training pairs."""
    moving: MovingReference | None = None
    """The reference if it follows the policy, or None."""

    def new_state(self, params: Params) -> TrainState:
        """The state before the first step."""
        return init_state(
            params,
            self.optimizer,
            self.objective,
            num_annotators=self.num_annotators,
            moving=self.moving is not None,
        )

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        state = jax.eval_shape(self.new_state, self.abstract_params())
        return on_devices(state, self.mesh)

    def abstract_frozen(self) -> Frozen:
        """Shapes, dtypes and shardings of the frozen parameters."""
        frozen = jax.eval_shape(lambda: self.scorer.init_frozen(jax.random.key(0)))
        return on_devices(frozen, self.mesh)

    def abstract_batch(self) -> PreferenceBatch:
        """Shapes, dtypes and shardings of a training batch of all processes."""
        batch = self.layout.abstract_batch(
            numbers=sorted(self.objective.numbers),
            reference=sorted(stored_scores(self.objective.scores)),
        )
        blank = np.broadcast_to(np.float32(0), batch.targets.shape)
        names = sorted(self.objective.token_numbers)
        batch = dataclasses.replace(batch, token_numbers=dict.fromkeys(names, blank))
        sharding = batch_sharding(self.mesh)
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch
        )

    def compile_train_step(self) -> jax.stages.Compiled:
        """Compiles the train step, so that its first call does not have to."""
        with jax.set_mesh(self.mesh):
            return self.train_step.lower(
                self.abstract_state(), self.abstract_frozen(), self.abstract_batch()
            ).compile()

    @functools.cached_property
    def train_step(self) -> Any:
        """The jitted `(state, frozen, batch) -> (state, metrics)`."""
        return make_train_step(
            self.scorer, self.objective, self.optimizer, self.schedule, self.moving
        )

    @functools.cached_property
    def reference_scorer(self) -> Scorer:
        """The scorer of the reference, for use before training."""
        return self.scorer.of_reference(stored_scores(self.objective.scores))

    @functools.cached_property
    def reference_score_step(self) -> Any:
        """`score_step` for the reference; the same program if the scorers are equal."""
        if self.reference_scorer == self.scorer:
            return self.score_step
        return make_score_step(self.reference_scorer)

    @functools.cached_property
    def evaluation(self) -> Any:
        """The jitted `(scores, batch, objective's state) -> metrics`."""
        return make_evaluation(self.objective)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(Programs):
    """What is trained, how, and on which records; without parameters."""

    datasets: data.Datasets
    """The records."""
    order: data.Order
    """Which training records each step sees."""
    start: Weights
    """The weights before training."""
    reference: Reference | None
    """The reference model; None if the objective does not read one."""
    models: Mapping[str, Weights]
    """Where the weights of frozen models are that each step reads, by name."""
    export: ExportOptions
    """How the trained model is exported."""
    steps: int
    """Optimizer steps of the run."""
    schedule_of: Callable[[int], optax.Schedule]
    """The learning rates of a run with another number of steps."""
    seed: int = 0
    """Seed of weights that the folder lacks, such as a new reward head."""
    earlier: SavedOptimizer | None = None
    """The optimizer's state before training; None for that of a new optimizer."""

    def batches(
        self, *, reference: Any = None, processes: int = 0, whole: bool = False
    ) -> Any:
        """Endless training batches, with `get_state` and `set_state`.

        Args:
          reference: the reference's scores, float32 [N, K] by name.
          processes: number of processes that make batches; 0 uses threads.
          whole: whether to include the rows of all processes.
        """
        layout = self.layout.of_all_processes() if whole else self.layout
        train = self.datasets.splits.train
        return layout.batches(
            train, self.order, reference=reference, processes=processes
        )

    @property
    def starts_as_reference(self) -> bool:
        """Whether the reference is the model before training."""
        return self.reference is not None and self.reference.weights == self.start

    def records_seen(self) -> np.ndarray:
        """The training records that the run will see, int [M], in order."""
        return data.first_seen(
            self.order,
            self.datasets.splits.train,
            batch_size=self.layout.batch_size,
            num_steps=self.steps,
        )

    def scores_before_training(
        self, reference: Mapping[str, np.ndarray]
    ) -> Mapping[str, np.ndarray] | None:
        """The policy's scores at step 0, if the reference's are the same numbers.

        Args:
          reference: the reference's scores of a dataset, float32 [N, K] by name.

        Returns:
          The scores by the policy's names; None if they must be computed.
        """
        if (
            not self.starts_as_reference
            or "reference_logps" not in reference
            or self.reference_scorer != self.scorer
        ):
            return None
        return {policy_name(name): table for name, table in reference.items()}

    def with_remat(self, policy: str) -> "Task":
        """The task with another policy for recomputing activations."""
        scorer = self.scorer.with_remat(policy)
        if scorer == self.scorer:
            return self  # keeps its compiled programs
        return dataclasses.replace(self, scorer=scorer)
