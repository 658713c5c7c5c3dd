"""Options of `jaxpref compare`."""

import dataclasses
from typing import Literal

from jaxpref.errors import InputError
from jaxpref.rewards import ModelOptions, RewardOptions
from jaxpref.runtime.mesh import MeshConfig
from jaxpref.runtime.ranges import at_least

OF_RECORDS = ("rule:exact", "rule:number", "rule:code", "follow-up:")
"""Rewards that read more than a prompt and an answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Options of `jaxpref compare`."""

    answers: tuple[str, ...]
    """Files of answers, one for each model, as `jaxpref sample --out`, AlpacaEval or
    Arena-Hard write them; the last model is the baseline.  They may also come before
    the options: jaxpref compare A.json B.json --judge RM."""
    out: str
    """Folder for `compare.json`, `verdicts.jsonl` and `compare.html`."""
    judge: str | None = None
    """What decides which answer is better: a reward model's folder or Hub ID, judge:DIR
    for a language model, or another --reward of jaxpref score."""
    verdicts: str | None = None
    """Verdicts to use instead of a judge: annotations of AlpacaEval, `verdicts.jsonl`
    of another comparison, or judgments of Arena-Hard."""
    gold: str | None = None
    """A trusted judge, named as for --judge: the report says how much higher --judge
    rates each model than this one (for the judge's own answers, self-preference)."""
    reference: str | None = None
    """Language model before training, for the KL divergence of each model from it, from
    the log-probabilities of its own answers."""
    answer_after: str | None = None
    """Compare only what follows this text in an answer, such as </think>.  An answer
    with nothing after it, or without it, loses to any other."""
    tie_margin: float = 0.0
    """Rewards that differ by at most this, or a judge's probabilities that are at most
    this far from 1/2, are a tie."""
    principle: str | None = None
    """What makes an answer better, in words, for judge:DIR."""
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
        if self.answer_after == "":
            raise InputError("--answer-after: is empty; write a text, such as </think>")
        at_least(1, self, "batch_size")
        at_least(2, self, "max_length")
        at_least(0, self, "tie_margin")
        if len(self.answers) < 2:
            raise InputError(
                "--answers: name the files of at least two models: jaxpref compare "
                "A.json B.json"
            )
        if len(set(self.answers)) < len(self.answers):
            raise InputError("--answers: the same file is given twice; remove one")
        if (self.judge is None) == (self.verdicts is None):
            raise InputError(
                "--judge: name a reward model, judge:DIR, or another reward; or pass "
                "--verdicts FILE instead"
            )
        for option in ("judge", "gold"):
            word = getattr(self, option) or ""
            if word.startswith(OF_RECORDS):
                raise InputError(
                    f"--{option} {word}: reads fields or options that jaxpref compare "
                    "does not have; score the answers with jaxpref score instead"
                )
        asked = [x for x in (self.judge, self.gold) if (x or "").startswith("judge:")]
        if self.principle is not None and not asked:
            raise InputError("--principle: only judge:DIR reads it; leave it out")

    @property
    def rewards(self) -> RewardOptions:
        """What rewards of some kinds read."""
        return RewardOptions(principle=self.principle or "")

    @property
    def models(self) -> ModelOptions:
        """How models compute rewards."""
        return ModelOptions(
            batch_size=self.batch_size,
            max_length=self.max_length,
            compute_dtype=self.compute_dtype,
            mesh=self.mesh,
        )
