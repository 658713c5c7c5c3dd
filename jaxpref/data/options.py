"""Options of the data: lengths, splits, injected noise, markers, mixed traces."""

import dataclasses
from typing import Literal

from jaxpref.data.columns import EXCHANGED, FLAG
from jaxpref.data.record_options import RecordOptions
from jaxpref.data.records.mapping import read_fields
from jaxpref.data.render import THINK, TraceMarkers
from jaxpref.errors import InputError

MAX_LENGTH = 1024
"""Maximum tokens of prompt and completion, by default; see `max_length`."""
HELDOUT = 0.05
"""Share of the prompts held out by default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InjectOptions:
    """Wrong labels added to the training pairs on purpose, for experiments.

    A flip swaps the chosen and the rejected completion.  Held-out pairs keep the labels
    of the file.
    """

    flip_rate: float | None = None
    """Probability of flipping the label of a training pair (default: 0).  This corrupts
    your data; the rate that a loss assumes is an option of the loss, such as
    --loss.flip-rate."""
    seed: int | None = None
    """Seed of the choice of pairs to flip (default: 0)."""
    rates: str | None = None
    """JSON file of flip rates by annotator, such as {"ann": 0.1, "eve": 0.8}.  A rate
    above 1/2 makes an adversary.  All other pairs are flipped at --inject.flip-rate."""
    by: str | None = None
    """Field of the records whose values are the names in --inject.rates, such as source
    (default: annotator)."""
    annotators: str | None = None
    """JSON file of simulated annotators, such as {"ann": {"share": 0.7, "flip_rate":
    0.05}, "eve": {"share": 0.3, "prefer_longer": 0.5}}.  Every training pair gets one
    of them as its annotator, with their shares as probabilities."""
    prefer_longer: float | None = None
    """Share of the training labels that are given by length alone: the completion with
    more characters is chosen.  --inject.flip-rate applies to the others."""
    topic: str | None = None
    """Regular expression, such as (?i)tax.  Pairs whose prompt contains a match are
    flipped at --inject.topic-rate, all others at --inject.flip-rate."""
    topic_rate: float | None = None
    """Flip rate of the pairs that --inject.topic finds."""
    margins: str | None = None
    """Field of the records with a number that is large, positive or negative, for clear
    pairs.  The flip rate is 1 / (1 + exp(|number| / temperature))."""
    temperature: float | None = None
    """Scale of --inject.margins: a pair whose number equals it is flipped at a rate of
    0.27."""

    def __post_init__(self):
        for name in ("flip_rate", "prefer_longer", "topic_rate"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"inject.{name} {value} must be from 0 to 1")
        if self.temperature is not None and not self.temperature > 0:
            raise InputError(f"inject.temperature {self.temperature} must be positive")
        self._check_alone()
        self._check_together()
        noise = (self.flip_rate, self.prefer_longer, *self._own_rates.values())
        if self.seed is not None and all(option is None for option in noise):
            raise InputError(
                f"inject.seed {self.seed}: nothing is flipped, so it has no effect; "
                "give a rate, such as --inject.flip-rate, or leave it out"
            )

    @property
    def _own_rates(self) -> dict[str, str | None]:
        """The options that give pairs a flip rate of their own."""
        return {
            "rates": self.rates,
            "annotators": self.annotators,
            "topic": self.topic,
            "margins": self.margins,
        }

    def _check_alone(self):
        """Refuses options that contradict each other."""
        given = [name for name, value in self._own_rates.items() if value is not None]
        if len(given) > 1:
            raise InputError(
                f"inject.{given[0]} and inject.{given[1]} both set flip rates of pairs;"
                " give only one of them"
            )
        for name, others in (
            ("annotators", ("flip_rate", "prefer_longer")),
            ("margins", ("flip_rate",)),
        ):
            for other in others:
                if None not in (getattr(self, name), getattr(self, other)):
                    raise InputError(
                        f"inject.{other}: inject.{name} sets the flip rate of every "
                        "pair; give only one of them"
                    )

    def _check_together(self):
        """Refuses an option without the one that it belongs to."""
        for name, needed in (
            ("by", "rates"),
            ("topic", "topic_rate"),
            ("topic_rate", "topic"),
            ("margins", "temperature"),
            ("temperature", "margins"),
        ):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise InputError(
                    f"inject.{name} has no effect without inject.{needed}; give both, "
                    "or leave it out"
                )

    @property
    def active(self) -> bool:
        """Whether any pair may be flipped."""
        rates = (self.flip_rate, self.prefer_longer, *self._own_rates.values())
        return any(rates)

    def describe(self) -> str:
        """The noise in a few words, for a warning."""
        by = self.by or "annotator"
        parts = {
            f"flip rate {self.flip_rate}": self.flip_rate,
            f"rates by {by} from {self.rates}": self.rates,
            f"simulated annotators from {self.annotators}": self.annotators,
            f"{self.prefer_longer} of the labels by length alone": self.prefer_longer,
            f"flip rate {self.topic_rate} where the prompt matches {self.topic}": (
                self.topic
            ),
            f"rates by |{self.margins}| / {self.temperature}": self.margins,
        }
        return ", ".join(text for text, value in parts.items() if value)


@dataclasses.dataclass(frozen=True)
class DataOptions(RecordOptions):
    """How records become training and held-out data."""

    max_length: int | None = None
    """Maximum tokens of prompt and completion together, BOS and EOS included (default:
    1024, or the model's context if that is shorter).  Longer completions are cut."""
    max_prompt_length: int | None = None
    """Maximum tokens of a prompt, BOS included (default: what the completions leave of
    --max-length, at least half).  Longer prompts lose their earliest turns, or their
    first tokens."""
    heldout_fraction: float | None = None
    """Share of the prompts held out for evaluation, chosen by a hash of the prompt
    (default: 0.05, or 0 if there is separate data to evaluate on)."""
    allow_shared_prompts: bool = False
    """Allow more than 5% of the pairs of --eval-data to have prompts that are also in
    --data."""
    inject: InjectOptions = InjectOptions()
    """Wrong labels to add on purpose, for experiments."""
    max_pairs: int | None = None
    """Stop reading a file after this many usable pairs (default: read all).  All pairs
    of the last record are used."""
    drop_empty: bool = False
    """Drop and count records with an empty completion, instead of stopping with an
    error."""
    train_turns: Literal["last", "all"] = "last"
    """Which turns of the assistant are trained on in a conversation: the last one, or
    all of the completion, each up to its stop token.  The completion of messages begins
    with their first answer, and that of pairs where the two conversations differ."""
    columns: tuple[str, ...] = ()
    """Numbers of the records, as NAME=FIELD, separated by commas or spaces: weight=w
    beta=info.b.  The name is weight, which multiplies the loss of a training pair; what
    the loss or the objective reads (margin, strength, tie, chosen_rating,
    rejected_rating, chosen_first, flip_predictor, desirable); or an option of a
    pairwise loss, such as beta or flip_rate, which then differs between records."""
    trace_open: str = THINK.open
    """Text that the model writes before a reasoning trace, if records have traces."""
    trace_close: str = THINK.close
    """Text that the model writes after a reasoning trace.  Both together are the empty
    trace, unless the chat template supports `enable_thinking` and has its own."""

    def __post_init__(self):
        super().__post_init__()
        named = self.named_columns
        words = tuple(f"{name}={field}" for name, field in sorted(named.items()))
        object.__setattr__(self, "columns", words)
        for name, other in EXCHANGED.items():
            if name in named and other not in named:
                raise InputError(
                    f"{FLAG} {name}={named[name]}: {name} and {other} are swapped when "
                    "a pair is flipped; name the fields of both"
                )
        if not 2 <= self.longest:
            raise InputError(f"max_length {self.longest} must be at least 2")
        prompt = self.max_prompt_length
        if prompt is not None and not 2 <= prompt <= self.longest:
            raise InputError(
                f"max_prompt_length {prompt} must be from 2 to"
                f" max_length {self.longest}"
            )
        if not 0 <= self.heldout_share <= 1:
            raise InputError(
                f"heldout_fraction {self.heldout_fraction} must be from 0 to 1"
            )
        if self.max_pairs is not None and self.max_pairs < 1:
            raise InputError(f"max_pairs {self.max_pairs} must be positive")
        TraceMarkers(self.trace_open, self.trace_close)  # refuses blank ones

    @property
    def named_columns(self) -> dict[str, str]:
        """The field by column."""
        return read_fields(self.columns, FLAG, "weight=w") if self.columns else {}

    @property
    def heldout_share(self) -> float:
        """The share of the prompts held out: `heldout_fraction`, or its default."""
        return HELDOUT if self.heldout_fraction is None else self.heldout_fraction

    @property
    def longest(self) -> int:
        """Maximum tokens of prompt and completion, ignoring the model's limit."""
        return MAX_LENGTH if self.max_length is None else self.max_length

    @property
    def markers(self) -> TraceMarkers:
        """The markers before and after a trace."""
        return TraceMarkers(self.trace_open, self.trace_close)

    def without_injection(self) -> "DataOptions":
        """The options without injected noise."""
        return dataclasses.replace(self, inject=InjectOptions())


DEFAULTS = DataOptions()


def resolved_max_length(options: DataOptions, max_position_embeddings: int) -> int:
    """Maximum tokens of prompt and completion for a model with that many positions.

    Raises:
      InputError: if `max_length` exceeds the number of positions.
    """
    if options.max_length is None:
        return min(MAX_LENGTH, max_position_embeddings)
    if options.max_length > max_position_embeddings:
        raise InputError(
            f"max_length {options.max_length}: the model has "
            f"{max_position_embeddings} positions; give --max-length "
            f"{max_position_embeddings} or less, or leave it out"
        )
    return options.max_length


def for_model(options: DataOptions, max_position_embeddings: int) -> DataOptions:
    """The options with `max_length` resolved for a model; see `resolved_max_length`."""
    length = resolved_max_length(options, max_position_embeddings)
    return dataclasses.replace(options, max_length=length)


@dataclasses.dataclass(frozen=True)
class MixOptions:
    """Pairs with an empty trace, in a run that mixes them with pairs that have traces.

    See BVPO (arXiv:2510.05095), where both kinds are sampled and ranked independently.
    """

    empty_data: str | None = None
    """Preference data generated with thinking switched off (default: the answers of
    --data again, with an empty trace)."""
    empty_share: float = 0.5
    """Share of each batch's pairs that have an empty trace, rounded to whole pairs."""

    def __post_init__(self):
        if not 0 < self.empty_share < 1:
            raise InputError(
                f"empty_share {self.empty_share} must be between 0 and 1: a batch has"
                " pairs of both kinds"
            )
