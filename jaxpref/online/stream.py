"""A stream of batches whose answers are sampled from the current policy."""

import base64
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int32

from jaxpref import data
from jaxpref.online.answers import (
    EVALUATION,
    Group,
    overlong_penalties,
    rewards_of,
    sample_groups,
    texts_of,
)
from jaxpref.online.batch import batch_of
from jaxpref.online.draws import draw_groups
from jaxpref.online.heldout import (
    Heldout,
    heldout_metrics,
    reference_kls,
    warn_of_missing,
)
from jaxpref.online.options import SamplingOptions
from jaxpref.online.pass_rates import PassRates
from jaxpref.online.samples import SamplesFile
from jaxpref.online.token_logps import REFERENCE_LOGPS, make_token_logps
from jaxpref.rewards.reward import Reward
from jaxpref.runtime import samples_file
from jaxpref.runtime.mesh import from_whole
from jaxpref.runtime.timings import Timings
from jaxpref.sampling import Answer
from jaxpref.scoring.scorer import Params
from jaxpref.sharding import fetched
from jaxpref.train.begin import Beginning
from jaxpref.train.state import TrainState
from jaxpref.train.task import Task


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
        heldout: Heldout | None,
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
          heldout: what is answered at each evaluation.
          log_every: steps between samples that are written to a file.
        """
        self._task, self._frozen, self._phases = task, begun.frozen, phases
        self._prompts, self._reward, self._sampling = prompts, reward, sampling
        self._tokenizer = data.load_tokenizer(task.export.source)
        self._train = task.datasets.splits.train
        self._heldout = heldout
        self._score = make_token_logps(task, begun.frozen)
        saved: Any = begun.saved.get("iterator") or {"next_index": 0, "pending": None}
        self._step = saved["next_index"]
        unknown = np.full(len(self._train), np.nan, np.float32)
        self._rates = _decoded_rates(saved.get("rates")) or PassRates(unknown)
        updates = sampling.updates_per_sample
        # The last step that learns from answers that the run already has.
        sampled = -(-self._step // updates) * updates
        self._file = SamplesFile(out / samples_file.FILE, before=sampled + 1)
        # A run that resumes begins with an evaluation.
        self._eval_file = SamplesFile(out / samples_file.EVAL_FILE, before=self._step)
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
        found = {
            "next_index": self._step,
            "pending": self._pending if between else None,
        }
        if self._sampling.prompt_target is not None:
            found["rates"] = _encoded_rates(self._rates)
        return found

    def state_before(self) -> None:
        """None: the batches are a function of the parameters, too."""

    def metrics(self) -> dict[str, float]:
        """What the step does not know of its answers.

        `ended`, the share that ends with a stop token; and `logps/mismatch`, the mean
        absolute difference in nats between the log-probability of an answer when it was
        sampled and when it is scored for training; rounding makes them differ slightly.
        And those of `draw_groups`.
        """
        return dict(self._metrics)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Metrics of answers to the held-out prompts, with the same random numbers.

        See `heldout_metrics`; empty without such prompts.  Long answers get no penalty.
        Writes the answers to `eval_samples.jsonl`.
        """
        heldout = self._heldout
        if heldout is None:
            return {}
        self._phases.mark("steps")
        every = range(len(heldout.prompts))
        groups = self._sampler(state.params)(
            heldout.dataset,
            every,
            number=EVALUATION,
            group_size=heldout.group_size,
            full=len(every),
        )
        texts = texts_of(groups, heldout.prompts, self._tokenizer)
        rewards = rewards_of(groups, texts, heldout.prompts, self._reward)
        kls = None
        if REFERENCE_LOGPS in self._task.objective.token_numbers:
            kls = reference_kls(
                self._task, state.params, groups, heldout.dataset, self._score
            )
        self._phases.mark("evaluation")
        warn_of_missing(rewards)
        step = int(state.step)
        self._eval_file.write(step, groups, texts, rewards, heldout.prompts)
        return heldout_metrics(groups, rewards, kls)

    def close(self) -> None:
        """Does nothing: nothing runs between two batches."""

    def _sample(self, state: TrainState) -> None:
        """Samples answers from the parameters of the state, and makes their batch."""
        task, sampling = self._task, self._sampling
        self._phases.mark("steps")
        number, size = self._step // sampling.updates_per_sample, task.layout.batch_size
        sampler = self._sampler(state.params)

        def answer(indices: Sequence[int], first: int) -> tuple[list[Group], Any, Any]:
            groups = sampler(
                self._train,
                indices,
                number=number,
                first=first,
                group_size=sampling.group_size,
                full=size,
            )
            self._phases.mark("sample")
            texts = texts_of(groups, self._prompts, self._tokenizer)
            rewards = rewards_of(groups, texts, self._prompts, self._reward)
            rewards += overlong_penalties(groups, sampling)
            self._phases.mark("reward")
            return groups, texts, rewards

        drawn = draw_groups(
            answer,
            task.order,
            self._rates,
            number=number,
            size=size,
            seed=task.seed,
            sampling=sampling,
        )
        del sampler, answer  # and the whole weights, which adapters are merged into
        self._rates, groups, rewards = drawn.rates, drawn.groups, drawn.rewards
        batch, places = self._placed(groups, rewards)
        logps, mismatch = self._token_logps(groups, state.params, batch, places)
        self._batch = dataclasses.replace(batch, token_numbers=logps)
        ended = [x.ended for group in groups for x in group.answers]
        self._metrics = {"ended": float(np.mean(ended)), "logps/mismatch": mismatch}
        self._metrics |= drawn.metrics
        count = sampling.log_samples
        for step in self._logged()[: 1 if count else 0]:
            some = groups[:count], drawn.texts[:count], rewards[:count]
            self._file.write(step, *some, self._prompts)
        if sampling.updates_per_sample > 1:
            self._pending = _encoded(groups, rewards, fetched(logps), self._metrics)
        self._phases.mark("score")

    def _sampler(self, params: Params) -> functools.partial[list[Group]]:
        """`sample_groups` with these parameters, and what is the same in all calls."""
        model, whole = self._task.scorer.policy(params, self._frozen)
        return functools.partial(
            sample_groups,
            model,
            whole,
            seed=self._task.seed,
            stop_tokens=self._task.export.stop_tokens,
            sampling=self._sampling,
            mesh=self._task.mesh,
        )

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
        layout = self._task.layout.of_all_processes()
        made, places = batch_of(groups, rewards, self._train, layout)
        reads = self._task.objective.numbers
        numbers = {name: x for name, x in made.numbers.items() if name in reads}
        made = dataclasses.replace(made, numbers=numbers)
        return from_whole(made, self._task.mesh), places

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
        of_answers, found = self._score(params, batch)
        logps = jax.device_get(of_answers)
        sampled = np.array([[x.logp for x in group.answers] for group in groups])
        real = places >= 0
        own = logps[real][:, -sampled.shape[1] :]  # those of pairs come before
        mismatch = float(np.abs(own - sampled[places[real]]).mean())
        return found, mismatch

    def _resume(self, pending: dict[str, Any]) -> None:
        """Takes the answers of a checkpoint between two updates."""
        self._pending, self._metrics = pending, pending["metrics"]
        groups, rewards, numbers = _decoded(pending)
        batch, _ = self._placed(groups, rewards)
        logps = {name: x.reshape(batch.targets.shape) for name, x in numbers.items()}
        logps = from_whole(logps, self._task.mesh)
        self._batch = dataclasses.replace(batch, token_numbers=logps)


def _encoded(
    groups: Sequence[Group],
    rewards: np.ndarray,
    token_numbers: Any,
    metrics: dict[str, float],
) -> dict[str, Any]:
    """Answers as JSON, exactly: numbers as the bytes of their arrays."""
    return {
        "groups": [
            [group.index, [[*answer] for answer in group.answers]] for group in groups
        ],
        "rewards": _text(rewards),
        "token_numbers": {name: _text(x) for name, x in token_numbers.items()},
        "metrics": metrics,
    }


def _decoded(pending: dict[str, Any]) -> tuple[list[Group], np.ndarray, dict[str, Any]]:
    """What `_encoded` was given; the token numbers are flat."""
    groups = [
        Group(index, tuple(Answer(*answer) for answer in answers))
        for index, answers in pending["groups"]
    ]
    numbers = {name: _array(x) for name, x in pending["token_numbers"].items()}
    rewards = _array(pending["rewards"]).reshape(len(groups), -1)
    return groups, rewards, numbers


def _encoded_rates(rates: PassRates) -> dict[str, Any]:
    """Pass rates as JSON, exactly."""
    return {
        "of_prompts": _text(rates.of_prompts),
        "of_new": _text(rates.of_new, np.float64),
    }


def _decoded_rates(saved: dict[str, Any] | None) -> PassRates | None:
    """What `_encoded_rates` was given."""
    if saved is None:
        return None
    (of_new,) = _array(saved["of_new"], np.float64)
    return PassRates(_array(saved["of_prompts"]), float(of_new))


def _text(values: Any, dtype: type = np.float32) -> str:
    return base64.b64encode(np.asarray(values, dtype).tobytes()).decode()


def _array(text: str, dtype: type = np.float32) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)
