"""`jaxpref score`: records with answers in, the same records with rewards out."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np
from jaxtyping import Float

from jaxpref.data import RecordOptions, open_source
from jaxpref.errors import InputError, show
from jaxpref.files import check_output, write_whole
from jaxpref.rewards.answered import (
    Answered,
    after,
    read_answered,
    with_rewards,
    with_uncertainty,
)
from jaxpref.rewards.combine import LEAST_ANSWERS
from jaxpref.rewards.combined import Rewards, Scored, combined_reward
from jaxpref.rewards.models import ModelOptions
from jaxpref.rewards.options import RewardOptions
from jaxpref.rewards.uncertain_command import UncertaintyOptions, uncertain_rewards
from jaxpref.rewards.uncertainty import Uncertain
from jaxpref.runtime import processes
from jaxpref.runtime.mesh import MeshConfig
from jaxpref.runtime.ranges import at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Options of `jaxpref score`."""

    data: str
    """Records with several answers, such as `jaxpref sample --out NAME.jsonl` writes;
    pairs; or records with one answer."""
    out: str
    """JSONL file: the records with scores, score, or chosen_score and
    rejected_score."""
    model: str | None = None
    """A reward model's folder or Hub ID: the same as --reward FOLDER."""
    fields: tuple[str, ...] = ()
    """Names of the fields in the file, as NAME=FIELD: prompt=question."""
    ignore_fields: tuple[str, ...] = ()
    """Fields of the records to ignore."""
    answer_after: str | None = None
    """Score only what follows this text in an answer, such as </think>; an answer
    without it is scored as an empty one."""
    on_bad_row: Literal["raise", "skip"] = "raise"
    """Whether a record that cannot be read, such as a pair with an empty answer, is an
    error, or is left out and counted."""
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

    @property
    def records(self) -> RecordOptions:
        """How the records are read."""
        return RecordOptions(
            fields=self.fields,
            ignore_fields=self.ignore_fields,
            on_bad_row=self.on_bad_row,
            template=self.template,
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


def run(
    config: ScoreConfig, options: RewardOptions, uncertain: UncertaintyOptions
) -> None:
    """Computes all rewards and writes the records with them.

    Args:
      config: the records, and how models read them.
      options: the rewards, besides `config.model`.
      uncertain: how their uncertainty is estimated, if it is.

    Raises:
      InputError: for anything that the caller can fix.
    """
    if config.model is not None:
        words = (config.model, *options.reward)
        options = dataclasses.replace(options, reward=words)
    uncertain.check(options)
    reads = {"--data": config.data, **uncertain.reads}
    reads |= {f"--reward {word}": word for word in options.reward}
    processes.together(lambda: check_output("--out", config.out, reads))
    reward = combined_reward(options, config.models)

    def read(path: str) -> list[Answered]:
        answered = read_answered(open_source(path), config.records)
        if config.answer_after is None:
            return answered
        return [after(one, config.answer_after) for one in answered]

    if not (answered := read(config.data)):
        raise InputError(f"{config.data}: contains no records")
    if options.combine == "lower_bound":
        _check_counts(answered, config.data)
    found = None
    if uncertain.uncertainty is None:
        scored = reward.scored(answered)
    else:
        found, parts = uncertain_rewards(uncertain, reward.parts, answered, read)
        scored = Scored([x.rewards for x in found], parts)
    if jax.process_index() == 0:
        _write(config, answered, scored, found)


def _check_counts(answered: Sequence[Answered], file: str) -> None:
    """Refuses records whose answers `lower_bound` penalizes all equally.

    Raises:
      InputError: if no record has enough answers; if some have, the log says how many
        have not.
    """
    few = sum(len(one.texts) < LEAST_ANSWERS for one in answered)
    why = (
        f"{file}: {few:,} of {len(answered):,} records have fewer than {LEAST_ANSWERS} "
        "answers, which --combine lower_bound penalizes equally"
    )
    if few == len(answered):
        raise InputError(f"{why}; give more answers, or use --combine sum")
    if few:
        processes.log(f"warning: {why}")


def _write(
    config: ScoreConfig,
    answered: Sequence[Answered],
    scored: Scored,
    uncertain: Sequence[Uncertain] | None,
) -> None:
    totals, parts, lines = scored.total, scored.parts, []
    for n, (one, total) in enumerate(zip(answered, totals, strict=True)):
        own = {word: found[n] for word, found in parts.items()}
        record = with_rewards(one, total, own)
        if uncertain is not None:
            of_one = uncertain[n]
            record = with_uncertainty(
                record, of_one.std, of_one.margin_std, of_one.p_chosen
            )
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_whole(config.out, "".join(lines))
    known, missing = _known(totals)
    left = f"; {missing:,} without a score, which cannot be read" if missing else ""
    show(f"{config.out}: {len(known):,} answers to {len(answered):,} prompts{left}")
    for word, found in [*parts.items(), *[("total", totals)] * (len(parts) > 1)]:
        if len(values := _known(found)[0]):
            low, mean, high = values.min(), values.mean(), values.max()
            show(f"  {word}: mean {mean:.4g}, from {low:.4g} to {high:.4g}")
    if scored.multipliers is not None:
        words = [
            f"{x:.4g} * {word}" for x, word in zip(scored.multipliers, [*parts][1:])
        ]
        show(f"  total = {' + '.join([next(iter(parts)), *words])}")


def _known(rewards: Rewards) -> tuple[Float[np.ndarray, " n"], int]:
    """The rewards that could be computed, and the number of others."""
    every = np.concatenate(rewards)
    known = every[np.isfinite(every)]
    return known, len(every) - len(known)
