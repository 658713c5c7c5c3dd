"""Options of the data: lengths, splits, injected noise, markers, mixed traces."""

import dataclasses

from jaxpref.data.labels import LabelFields
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
    annotators: str | None = None
    """JSON file of flip rates by annotator, such as {"ann": 0.1, "bob": 0.6}.  Pairs of
    other annotators are flipped at --inject.flip-rate."""
    longer: float | None = None
    """Flip rate of the training pairs whose chosen completion has more characters than
    the rejected one.  The others are flipped at --inject.flip-rate."""

    def __post_init__(self):
        if self.flip_rate is not None and not 0 <= self.flip_rate <= 1:
            raise InputError(f"inject.flip_rate {self.flip_rate} must be from 0 to 1")
        if self.longer is not None and not 0 <= self.longer <= 1:
            raise InputError(f"inject.longer {self.longer} must be from 0 to 1")
        if self.annotators and self.longer is not None:
            raise InputError(
                "inject.annotators and inject.longer both set flip rates of pairs; "
                "give one of them"
            )
        rates = (self.flip_rate, self.annotators, self.longer)
        if self.seed is not None and all(rate is None for rate in rates):
            raise InputError(
                f"inject.seed {self.seed}: nothing is flipped, so it has no effect; "
                "give a rate, such as --inject.flip-rate, or leave it out"
            )

    @property
    def active(self) -> bool:
        """Whether any pair may be flipped."""
        return bool(self.flip_rate or self.longer or self.annotators)


@dataclasses.dataclass(frozen=True)
class DataOptions:
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
    ignore_fields: tuple[str, ...] = ()
    """Fields of the records to ignore, even if they change what a record means."""
    labels: LabelFields = LabelFields()
    """Fields of the records with numbers that a loss reads besides the preference."""
    trace_open: str = THINK.open
    """Text that the model writes before a reasoning trace, if records have traces."""
    trace_close: str = THINK.close
    """Text that the model writes after a reasoning trace.  Both together are the empty
    trace, unless the chat template supports `enable_thinking` and has its own."""

    def __post_init__(self):
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
