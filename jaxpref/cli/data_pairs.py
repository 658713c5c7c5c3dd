"""`jaxpref data pairs`."""

import dataclasses
import json
import math
from typing import Any

from jaxpref import data
from jaxpref.data.answers import read_answers
from jaxpref.data.make_pairs import (
    Usable,
    best_against_worst,
    joined_pairs,
    plain,
    ranked_pairs,
    with_traces,
)
from jaxpref.data.records.best_pair import Rule
from jaxpref.errors import InputError, show
from jaxpref.files import check_output, write_whole
from jaxpref.runtime.ranges import at_least


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Options of `jaxpref data pairs`."""

    data: str
    """Records with `completions` and `scores`, such as `jaxpref score` writes; or, with
    --against, answers without scores."""
    out: str
    """JSONL file to write."""
    rule: Rule | None = None
    """Which of a record's answers are paired: the best with the worst, the best with a
    random worse one, or all pairs with different scores; for scores of 1 and 0, every
    right answer with every wrong one (default: best-random; with --against, none)."""
    per_prompt: int | None = None
    """Maximum number of pairs of a prompt.  --rule all keeps a random subset of this
    size (default: all); best-worst also pairs the second best with the second worst,
    and so on (default: 1)."""
    min_gap: float = 0.0
    """Minimum difference between the two scores.  Equal scores never make a pair."""
    min_score: float | None = None
    """Minimum score of the chosen answer."""
    max_std: float | None = None
    """Leave out answers whose score has a larger standard deviation, from `jaxpref
    score --uncertainty`."""
    against: str | None = None
    """Records with another model's answers to the same prompts, which are rejected: the
    n-th answer in --data is preferred to the n-th of these, for example a weaker
    model's (delta learning); or, with --rule, the best to the worst or a random worse
    one by their scores, for example those of the model before training (temporal
    self-rewarding)."""
    trace_close: str | None = None
    """What ends the reasoning in an answer, such as </think>.  The pairs then are
    records with traces, as --objective bvpo reads them; pairs with an answer that does
    not contain it are left out."""
    keep_unfinished: bool = False
    """Keep pairs with an answer that was cut off (`ended` is false)."""

    def __post_init__(self):
        at_least(0, self, "min_gap", "max_std")
        at_least(1, self, "per_prompt")
        if self.per_prompt is not None and self.rule not in ("all", "best-worst"):
            raise InputError(
                "--per-prompt: only --rule all and best-worst make several pairs of a "
                "prompt; leave it out"
            )
        if self.against is None:
            return
        if self.rule == "all":
            raise InputError(
                "--against: pairs the best answer with one of the others; pass --rule "
                "best-worst or best-random, or none"
            )
        limits = (self.min_gap, self.min_score, self.max_std)
        if self.rule is None and limits != (0, None, None):
            raise InputError(
                "--against: scores are not used without --rule; leave out --min-gap, "
                "--min-score and --max-std, or pass --rule best-worst"
            )


def make_pairs(parsed: Any) -> None:
    """Writes the pairs."""
    config: PairsConfig = parsed.config
    reads = {"--data": config.data, "--against": config.against}
    check_output("--out", config.out, reads)
    source = data.open_source(config.data)
    usable = Usable(not config.keep_unfinished, config.trace_close)
    limits: dict[str, Any] = dict(
        rule=config.rule or "best-random",
        min_gap=config.min_gap,
        min_score=-math.inf if config.min_score is None else config.min_score,
        max_std=config.max_std,
        usable=usable,
    )
    if config.against is not None:
        other = data.open_source(config.against)
        names = f"{config.data} and {config.against}"
        if config.rule is None:
            pairs = list(joined_pairs(source, other, names, usable=usable))
        else:
            most = config.per_prompt or 1
            pairs = list(best_against_worst(source, other, names, **limits, most=most))
    else:
        places = map(source.location, range(len(source)))
        pairs = [
            pair
            for n, place in enumerate(places)
            for pair in ranked_pairs(
                read_answers(source[n], place), place, **limits, most=config.per_prompt
            )
        ]
    left_out = _left_out(source, usable)
    if not pairs:
        raise InputError(
            f"{config.data}: no pair is left of {len(source):,} records{left_out}; "
            "the other answers are equal, have equal scores, or are too close"
        )
    if (close := config.trace_close) is not None:
        pairs = [with_traces(pair, close) for pair in pairs]
    lines = (json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    write_whole(config.out, "".join(lines))
    show(f"{config.out}: {len(pairs):,} pairs of {len(source):,} records{left_out}")


def _left_out(source: data.Source, usable: Usable) -> str:
    """How many answers cannot be in a pair, in words; nothing if all can."""
    cut = empty = without = 0
    for n in range(len(source)):
        answers = read_answers(source[n], source.location(n))
        for k, text in enumerate(map(plain, answers.texts)):
            if not usable.allows(answers, k):
                close = usable.close
                empty += not text.strip()
                without += (
                    close is not None and bool(text.strip()) and close not in text
                )
                cut += answers.ended is not None and not answers.ended[k]
    counts = {
        "that were cut off (--keep-unfinished keeps them)": cut,
        "that are empty": empty,
        f"without {usable.close}": without,
    }
    said = [f"{count:,} {what}" for what, count in counts.items() if count]
    return f"; left out: {', '.join(said)}" if said else ""
