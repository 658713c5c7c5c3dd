"""A stream of batches whose answers are sampled from the current policy."""

import base64
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int32

from jaxpref import data
from jaxpref.models.logprobs import REFERENCE
from jaxpref.online.answers import Group, rewards_of, sample_groups, texts_of
from jaxpref.online.batch import batch_of
from jaxpref.online.options import SamplingOptions
from jaxpref.online.samples import SamplesFile
from jaxpref.rewards.reward import Reward
from jaxpref.runtime.mesh import batch_sharding, to_global
from jaxpref.runtime.timings import Timings
from jaxpref.sampling import Answer
from jaxpref.scoring.score_dataset import make_score_step
from jaxpref.scoring.scorer import Frozen, Params
from jaxpref.train.begin import Beginning
from jaxpref.train.state import TrainState
from jaxpref.train.task import Task

TOKEN_LOGPS = "token_logps"


class SampledStream:
    """Samples answers, computes their rewards and log-probabilities, and batches them.

    The batch of step s holds answers that the parameters of the step
    s - s mod `updates_per_sample` give, so a run that resumes draws the same ones.  If
    it resumes between updates, they come from the checkpoint.
    """

    def __init__(
        self,
        task: Task,
        begun: Beginning,
        out: Path,
        phases: Timings,
        *,
        prompts: Sequence[data.Prompt],
        reward: Reward,
        sampling: SamplingOptions,
        log_every: int,
    ):
        """Begins at the run's current position.

        Args:
          task: what the run computes; its training data are the prompts.
          begun: the start of the run.
          out: the run's folder.
          phases: where the time of each phase is counted.
          prompts: the prompts with their records.
          reward: says how good answers are.
          sampling: how answers are sampled.
          log_every: steps between samples that are written to a file.
        """
        self._task, self._frozen, self._phases = task, begun.frozen, phases
        self._prompts, self._reward, self._sampling = prompts, reward, sampling
        self._tokenizer = data.load_tokenizer(task.export.source)
        self._train = task.datasets.splits.train
        names = task.objective.token_numbers
        self._of_reference: Callable | None = None
        if f"{REFERENCE}_{TOKEN_LOGPS}" in names:
            self._of_reference = _reference_logps(task, begun.frozen)
        saved: Any = begun.saved.get("iterator") or {"next_index": 0, "pending": None}
        self._step = saved["next_index"]
        updates = sampling.updates_per_sample
        sampled = -(-self._step // updates) * updates
        self._file = SamplesFile(out, count=sampling.log_samples, sampled=sampled)
        self._log_every = log_every
        self._metrics: dict[str, float] = {}
        self._pending: dict[str, Any] | None = None
        self._batch: data.PreferenceBatch | None = None
        if saved["pending"] is not None:
            self._resume(saved["pending"])

    def await_state(self, state: TrainState) -> None:
        """Waits for the parameters if the next batch is sampled from them."""
        if self._step % self._sampling.updates_per_sample == 0:
            jax.block_until_ready(state.params)

    def draw(self, state: TrainState) -> data.PreferenceBatch:
        """The batch of the next step, on the devices."""
        if self._step % self._sampling.updates_per_sample == 0:
            self._sample(state)
        self._step += 1
        assert self._batch is not None
        return self._batch

    def get_state(self) -> dict[str, Any]:
        """The position, and the answers from which later steps learn."""
        between = self._step % self._sampling.updates_per_sample
        pending = self._pending if between else None
        return {"next_index": self._step, "pending": pending}

    def state_before(self) -> dict[str, Any]:
        """The position before the last batch drawn, without answers."""
        return {"next_index": self._step - 1, "pending": None}

    def metrics(self) -> dict[str, float]:
        """What the step does not know of its answers.

        `ended`, the share that ends with a stop token; and `logps/mismatch`, the mean
        absolute difference in nats between the log-probability of an answer when it was
        sampled and when it is scored for training; rounding makes them differ slightly.
        """
        return dict(self._metrics)

    def close(self) -> None:
        """Does nothing: nothing runs between two batches."""

    def _sample(self, state: TrainState) -> None:
        """Samples answers from the parameters of the state, and makes their batch."""
        task, sampling = self._task, self._sampling
        self._phases.mark("steps")
        number = self._step // sampling.updates_per_sample
        indices = task.order(number, task.layout.batch_size).tolist()
        model, whole = task.scorer.policy(state.params, self._frozen)
        groups = sample_groups(
            model,
            whole,
            self._train,
            indices,
            number=number,
            seed=task.seed,
            stop_tokens=task.export.stop_tokens,
            sampling=sampling,
            mesh=task.mesh,
        )
        del whole
        self._phases.mark("sample")
        texts = texts_of(groups, self._prompts, self._tokenizer)
        rewards = rewards_of(groups, texts, self._prompts, self._reward, sampling)
        self._phases.mark("reward")
        batch, places = self._placed(groups, rewards)
        logps, mismatch = self._token_logps(groups, state.params, batch, places)
        self._batch = dataclasses.replace(batch, token_numbers=logps)
        ended = [answer.ended for group in groups for answer in group.answers]
        self._metrics = {"ended": float(np.mean(ended)), "logps/mismatch": mismatch}
        for step in self._logged()[:1]:
            self._file.write(step, groups, texts, rewards, self._prompts)
        if sampling.updates_per_sample > 1:
            self._pending = _encoded(groups, rewards, logps, self._metrics)
        self._phases.mark("score")

    def _logged(self) -> list[int]:
        """The numbers of the steps that learn from a new sample and are logged."""
        first = self._step + 1
        steps = range(first, first + self._sampling.updates_per_sample)
        always = 1, self._task.steps
        return [x for x in steps if x % self._log_every == 0 or x in always]

    def _placed(
        self, groups: Sequence[Group], rewards: Float[np.ndarray, "B K"]
    ) -> tuple[data.PreferenceBatch, Int32[np.ndarray, "A R S"]]:
        """The batch of the answers on the devices, and the places of the prompts."""
        made, places = batch_of(groups, rewards, self._train, self._task.layout)
        return to_global(made, self._task.mesh), places

    def _token_logps(
        self,
        groups: Sequence[Group],
        params: Params,
        batch: data.PreferenceBatch,
        places: Int32[np.ndarray, "A R S"],
    ) -> tuple[Any, float]:
        """The log-probabilities of the sampled tokens, [A, R, Q, P] by name.

        And how far those of the answers are from what they were when sampled.
        """
        scores, _ = self._task.score_step(params, self._frozen, batch)
        logps = jax.device_get(scores["policy_logps"])
        sampled = np.array([[x.logp for x in group.answers] for group in groups])
        real = places >= 0
        mismatch = float(np.abs(logps[real] - sampled[places[real]]).mean())
        found = {f"sampler_{TOKEN_LOGPS}": scores[f"policy_{TOKEN_LOGPS}"]}
        if self._of_reference is not None:
            found[f"{REFERENCE}_{TOKEN_LOGPS}"] = self._of_reference(batch)
        # The dtype that the train step is compiled for.
        cast = lambda x: jax.device_put(
            x.astype(np.float32), batch_sharding(self._task.mesh)
        )
        return jax.tree.map(cast, found), mismatch

    def _resume(self, pending: dict[str, Any]) -> None:
        """Takes the answers of a checkpoint between two updates."""
        self._pending, self._metrics = pending, pending["metrics"]
        groups, rewards, numbers = _decoded(pending)
        batch, _ = self._placed(groups, rewards)
        logps = {name: x.reshape(batch.targets.shape) for name, x in numbers.items()}
        logps = to_global(logps, self._task.mesh)
        self._batch = dataclasses.replace(batch, token_numbers=logps)


def _reference_logps(task: Task, frozen: Frozen) -> Callable:
    """The function that gives the reference's log-probabilities of a batch's tokens."""
    assert task.reference is not None
    name = f"{REFERENCE}_{TOKEN_LOGPS}"
    step = make_score_step(task.scorer.of_reference(frozenset({name})))
    params = task.scorer.reference_params(task.reference.weights, frozen, None)
    return lambda batch: step(params, {}, batch)[0][f"policy_{TOKEN_LOGPS}"]


def _encoded(
    groups: Sequence[Group],
    rewards: np.ndarray,
    token_numbers: Any,
    metrics: dict[str, float],
) -> dict[str, Any]:
    """Answers as JSON, exactly: numbers as the bytes of their arrays."""
    text = lambda x: base64.b64encode(np.asarray(x, np.float32).tobytes()).decode()
    return {
        "groups": [
            [group.index, [[*answer] for answer in group.answers]] for group in groups
        ],
        "rewards": text(rewards),
        "token_numbers": {name: text(x) for name, x in token_numbers.items()},
        "metrics": metrics,
    }


def _decoded(pending: dict[str, Any]) -> tuple[list[Group], np.ndarray, dict[str, Any]]:
    """What `_encoded` was given; the token numbers are flat."""
    array = lambda x: np.frombuffer(base64.b64decode(x), np.float32)
    groups = [
        Group(index, tuple(Answer(*answer) for answer in answers))
        for index, answers in pending["groups"]
    ]
    numbers = {name: array(x) for name, x in pending["token_numbers"].items()}
    rewards = array(pending["rewards"]).reshape(len(groups), -1)
    return groups, rewards, numbers
