"""`jaxpref score`: records with answers in, the same records with rewards out."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float

from jaxpref.data import RecordOptions, open_source
from jaxpref.errors import InputError, show
from jaxpref.files import check_output, write_whole
from jaxpref.rewards.answered import Answered, read_answered, with_rewards
from jaxpref.rewards.choice import RewardOptions, reward_of
from jaxpref.rewards.combine import log_sigmoid_centered, weighted_sum
from jaxpref.rewards.models import ModelOptions
from jaxpref.runtime import processes
from jaxpref.runtime.mesh import MeshConfig
from jaxpref.runtime.ranges import at_least

Rewards = list[Float[np.ndarray, " K"]]
"""For each prompt, the reward of each answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Options of `jaxpref score`."""

    data: str
    """Records with answers: in completions or, from `jaxpref sample --out NAME.jsonl`,
    in answers; pairs; or records with one answer."""
    out: str
    """JSONL file: the records with scores, score, or chosen_score and
    rejected_score."""
    model: str | None = None
    """A reward model's folder or Hub ID: the same as --reward FOLDER."""
    reward: tuple[str, ...] = ()
    """A reward model's folder or Hub ID; rule:NAME (words, characters, distinct:3,
    regex:PATTERN, exact, number); log-ratio:STRONG:WEAK; judge:DIR; follow-up:TEXT; or
    module:function, with arguments prompt, answer and record.  May be given several
    times."""
    combine: Literal["sum", "log_sigmoid"] = "sum"
    """How several rewards become one: their sum, or the sum of log sigmoid(reward -
    reference), in which no reward makes up for a bad one."""
    weights: tuple[float, ...] = ()
    """Weight of each reward in the sum, in the order of --reward (default: 1)."""
    reference_quantile: float = 0.85
    """The reference of log_sigmoid: this quantile of the rewards of the prompt's
    answers or, if prompts have fewer than four, of all answers in the file."""
    answer_field: str = "answer"
    """Field of the records with the right answer, for rule:exact and rule:number."""
    follow_up_model: str | None = None
    """Language model that says how likely the text of follow-up:TEXT is."""
    principle: str | None = None
    """What makes an answer better, in words, for judge:DIR."""
    fields: tuple[str, ...] = ()
    """Names of the fields in the file, as NAME=FIELD: prompt=question."""
    ignore_fields: tuple[str, ...] = ()
    """Fields of the records to ignore."""
    template: tuple[str, ...] = ()
    """Variables of the chat template for all records, as --template.NAME VALUE."""
    batch_size: int = 16
    """Prompts whose answers a model scores at once, over all devices."""
    max_length: int | None = None
    """Maximum tokens of prompt and answer together (default: 1024, or the model's
    context if that is shorter)."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of matrix products and activations (default: bfloat16 on TPU and GPU,
    float32 on CPU)."""
    mesh: MeshConfig = MeshConfig()
    """How the devices are used."""

    def __post_init__(self):
        at_least(1, self, "batch_size")
        at_least(2, self, "max_length")
        if not self.words:
            raise InputError("--reward: name at least one reward, or a --model")
        if len(set(self.words)) < len(self.words):
            raise InputError("--reward: the same reward is given twice; use --weights")
        if self.weights and len(self.weights) != len(self.words):
            raise InputError(
                f"--weights: {len(self.weights)} numbers for {len(self.words)} "
                "rewards; give one for each"
            )
        if not all(map(math.isfinite, self.weights)):
            raise InputError("--weights: must be finite")
        for name, kind in (("follow_up_model", "follow-up"), ("principle", "judge")):
            used = any(word.startswith(f"{kind}:") for word in self.words)
            if getattr(self, name) is not None and not used:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{flag}: only --reward {kind}:... reads it")
        if self.answer_field != "answer" and not {"rule:exact", "rule:number"} & {
            *self.words
        }:
            raise InputError("--answer-field: only rule:exact and rule:number read it")
        if self.reference_quantile != 0.85 and self.combine == "sum":
            raise InputError("--reference-quantile: --combine sum does not read it")
        if not 0 <= self.reference_quantile <= 1:
            raise InputError(
                f"reference_quantile {self.reference_quantile}: must be from 0 to 1"
            )

    @property
    def words(self) -> tuple[str, ...]:
        """All rewards as the user wrote them."""
        return (*([] if self.model is None else [self.model]), *self.reward)

    @property
    def records(self) -> RecordOptions:
        """How the records are read."""
        return RecordOptions(
            fields=self.fields,
            ignore_fields=self.ignore_fields,
            template=self.template,
        )

    @property
    def options(self) -> RewardOptions:
        """What rewards of some kinds read."""
        return RewardOptions(
            answer_field=self.answer_field,
            follow_up_model=self.follow_up_model,
            principle=self.principle or "",
        )

    @property
    def models(self) -> ModelOptions:
        """How models compute rewards."""
        return ModelOptions(
            batch_size=self.batch_size,
            max_length=self.max_length,
            compute_dtype=self.compute_dtype,
            mesh=self.mesh,
            template=self.records.template_options,
        )


def run(config: ScoreConfig) -> None:
    """Computes all rewards and writes the records with them.

    Raises:
      InputError: for anything that the caller can fix.
    """
    reads = {"--data": config.data}
    reads |= {f"--reward {word}": word for word in config.words}
    processes.together(lambda: check_output("--out", config.out, reads))
    rewards = {
        word: reward_of(word, config.models, config.options) for word in config.words
    }
    answered = read_answered(open_source(config.data), config.records)
    if not answered:
        raise InputError(f"{config.data}: contains no records")
    parts = {word: reward(answered) for word, reward in rewards.items()}
    weights = config.weights or (1.0,) * len(parts)
    if config.combine == "log_sigmoid":
        scaled = [_centered(x, config.reference_quantile) for x in parts.values()]
    else:
        scaled = [*parts.values()]
    totals = [weighted_sum(own, weights) for own in zip(*scaled, strict=True)]
    if jax.process_index() == 0:
        _write(config, answered, totals, parts)


def _centered(rewards: Rewards, quantile: float) -> Rewards:
    """Log sigmoid(reward - reference); see `ScoreConfig.reference_quantile`."""
    if min(map(len, rewards)) >= 4:
        return [log_sigmoid_centered(x, _quantile(x, quantile)) for x in rewards]
    reference = _quantile(np.concatenate(rewards), quantile)
    return [log_sigmoid_centered(x, reference) for x in rewards]


def _quantile(values: Float[np.ndarray, " n"], quantile: float) -> float:
    """The quantile of the rewards that could be computed; NaN if there are none."""
    known = values[np.isfinite(values)]
    return float(np.quantile(known, quantile)) if len(known) else math.nan


def _write(
    config: ScoreConfig,
    answered: Sequence[Answered],
    totals: Rewards,
    parts: Mapping[str, Rewards],
) -> None:
    lines = []
    for n, (one, total) in enumerate(zip(answered, totals, strict=True)):
        own = {word: found[n] for word, found in parts.items()}
        record = with_rewards(one, total, own)
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_whole(config.out, "".join(lines))
    known, missing = _known(totals)
    left = f"; {missing:,} without a score, which cannot be read" if missing else ""
    show(f"{config.out}: {len(known):,} answers to {len(answered):,} prompts{left}")
    for word, found in [*parts.items(), *[("total", totals)] * (len(parts) > 1)]:
        if len(values := _known(found)[0]):
            low, mean, high = values.min(), values.mean(), values.max()
            show(f"  {word}: mean {mean:.4g}, from {low:.4g} to {high:.4g}")


def _known(rewards: Rewards) -> tuple[Float[np.ndarray, " n"], int]:
    """The rewards that could be computed, and the number of others."""
    every = np.concatenate(rewards)
    known = every[np.isfinite(every)]
    return known, len(every) - len(known)
