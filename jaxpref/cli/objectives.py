"""`--loss`, `--correct` and `--objective`: their names, options and functions.

The options of a loss, a correction or an objective are the keyword-only parameters of
its function, with the function's defaults and the help in its docstring.  They are
`--loss.NAME`, `--correct.NAME` and `--objective.NAME`.  Those of the loss and of the
correction, and a verifier's error rates, may be named in `--columns` instead.
"""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_origin

from jaxpref import losses, objectives
from jaxpref.cli.options import Part, Parts
from jaxpref.cli.words import Given, canonical, closest
from jaxpref.data.columns import ARRAYS, FLAG, RATING, WEIGHT
from jaxpref.data.options import DataOptions
from jaxpref.errors import InputError
from jaxpref.objectives import (
    PER_RECORD,
    Objective,
    crm,
    from_loss,
    goal_contrast,
    more,
    rationale,
    spo,
    trainable,
)
from jaxpref.objectives.sampled import Rates

FACTORIES = {make.__name__: make for make in objectives.FACTORIES}
"""`make(**options)`: losses whose objective is not their mean over the pairs."""

LOSSES: dict[str, Callable[..., Any]] = {
    name: FACTORIES.get(name) or getattr(losses, name)
    for name in sorted({*losses.__all__, *FACTORIES})
    if name in FACTORIES or trainable(getattr(losses, name))
}
"""For `--loss`: every public loss that can be trained."""

WRAPPERS = {wrap.__name__: wrap for wrap in objectives.WRAPPERS}
"""For `--objective`: `wrap(loss, **options)`, learns something besides the model."""

CORRECTIONS = {correct.__name__: correct for correct in objectives.CORRECTIONS}
"""For `--correct`: `correct(loss, **options)`, for any pairwise loss."""

MIXTURES = {mix.__name__: mix for mix in objectives.MIXTURES}
"""For `--objective` too: `mix(objective, **options)`, for any objective."""

SAMPLED = {make.__name__: make for make in objectives.SAMPLED}
"""For `--objective` too: `make(**options)`, learns from answers sampled in training."""

OTHERS = crm, goal_contrast, more, rationale, spo
NOISE = {name: make for name, make in WRAPPERS.items() if make not in OTHERS}
"""For `--objective.noise`: wrappers whose gradients can be mixed."""

KINDS = {
    "DPO and variants": ("_pairwise", "_ipo", "_weights"),
    "for noisy labels": ("_robust", "_symmetric"),
    "batch-dependent": ("_batch", "_dynamic_beta", "_dynamic_targets"),
    "each answer separately": ("_asymmetric", "_sides"),
    "other divergences": ("_divergence", "_token"),
    "length control": ("_length",),
    "without a reference": ("_reference_free",),
    "likelihood and teachers": ("_likelihood", "_distillation"),
    "of labeled answers": ("_unpaired",),
    "of lists of answers": ("_listwise",),
    "for reward models": ("_reward_models", "_general_preference"),
}
"""Kinds of losses, and the files of `jaxpref.losses` that define them."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The values of `--loss` and `--objective`, which determine the options."""

    loss: str = "dpo"
    wrapper: str | None = None
    """A name in `WRAPPERS`."""
    mixture: str | None = None
    """A name in `MIXTURES`."""
    correction: str | None = None
    """A name in `CORRECTIONS`."""
    sampled: str | None = None
    """A name in `SAMPLED`, which has no loss."""
    per_record: frozenset[str] = frozenset()
    """Options of the parts in `FROM_RECORDS` that are read from the records."""

    @property
    def reads_pairs(self) -> bool:
        """Whether its sampled answers are to the prompts of pairs."""
        return self.sampled is not None and SAMPLED[self.sampled]().kind.sides == 2

    @property
    def words(self) -> dict[str, str]:
        """The options that make this choice."""
        if self.sampled:
            return {"objective": self.sampled}
        objective = self.mixture or self.wrapper
        words = {"loss": self.loss}
        if self.correction:
            words["correct"] = self.correction
        if objective:
            words["objective"] = objective
        if self.mixture and self.wrapper:
            words["objective.noise"] = self.wrapper
        return words

    @property
    def about(self) -> str:
        """The same as one text, for messages and help."""
        return "".join(f" --{name} {word}" for name, word in self.words.items())

    @property
    def functions(self) -> dict[str, tuple[str, Callable]]:
        """By field, the namespace of its options and the function that reads them."""
        if self.sampled:
            return {"sampled": ("objective", SAMPLED[self.sampled])}
        found = {"loss": ("loss", LOSSES[self.loss])}
        if self.correction:
            found["correction"] = ("correct", CORRECTIONS[self.correction])
        if self.mixture:
            found["mixture"] = ("objective", MIXTURES[self.mixture])
        if self.wrapper:
            prefix = "objective.noise" if self.mixture else "objective"
            found["wrapper"] = (prefix, WRAPPERS[self.wrapper])
        return found

    @property
    def parts(self) -> Parts:
        """The options of the loss and of the objective."""
        own = lambda field: self.per_record if field in FROM_RECORDS else frozenset()
        return {
            field: Part(options_type(function, own(field)), prefix)
            for field, (prefix, function) in self.functions.items()
        }

    def objective(self, parsed: Any, sources: Sequence[str] = ()) -> Objective:
        """The objective.

        Args:
          parsed: the parsed options of each part.
          sources: names of the files of the training data, for a wrapper that reads
            them.
        """

        def of(field: str) -> dict[str, Any]:
            read = self.read_from_records(field)
            return dict(vars(getattr(parsed, field))) | dict.fromkeys(read, PER_RECORD)

        if self.sampled:
            return SAMPLED[self.sampled](**of("sampled"))
        if self.loss in FACTORIES:
            objective = FACTORIES[self.loss](**of("loss"))
        else:
            loss = functools.partial(LOSSES[self.loss], **of("loss"))
            if self.correction:
                loss = CORRECTIONS[self.correction](loss, **of("correction"))
            wrap = WRAPPERS[self.wrapper] if self.wrapper else from_loss
            own = of("wrapper") if self.wrapper else {}
            if "sources" in inspect.signature(wrap).parameters:
                own["sources"] = sources
            objective = wrap(loss, **own)
        if self.mixture:
            objective = MIXTURES[self.mixture](objective, **of("mixture"))
        return objective

    def refuse_sampled(self) -> None:
        """Raises InputError if answers are to be sampled in training."""
        if self.sampled:
            raise InputError(
                f"--objective {self.sampled}: only `jaxpref train` samples answers; "
                "choose another objective"
            )

    def read_from_records(self, field: str) -> frozenset[str]:
        """The options of a part that are read from the records."""
        if field not in FROM_RECORDS:
            return frozenset()
        return self.per_record & _from_records(field, self.functions[field][1])


def choose(given: Given) -> tuple[Choice, Given]:
    """The choice of loss and objective, and all other options.

    Raises:
      InputError: if there is no such name, or the names cannot be combined.
    """
    rest = dict(given)
    objective = _named("objective", "objective", rest, WRAPPERS | MIXTURES | SAMPLED)
    if objective in SAMPLED:
        for flag in ("loss", "correct"):
            if flag in rest:
                raise InputError(
                    f"--{flag} {' '.join(rest[flag])}: {objective} learns from sampled "
                    "answers; leave it out"
                )
        choice = Choice(sampled=objective)
        own = _per_record(choice, rest)
        return dataclasses.replace(choice, per_record=own), rest
    loss = _named("loss", "loss", rest, LOSSES) or "dpo"
    wrapper, mixture = objective, None
    if objective in MIXTURES:
        mixture = objective
        wrapper = _named("objective.noise", "objective", rest, NOISE)
    correction = _named("correct", "correction", rest, CORRECTIONS)
    for flag, name in (("objective", wrapper), ("correct", correction)):
        if name and loss in FACTORIES:
            raise InputError(
                f"--{flag} {name}: {loss} has its own objective; leave it out"
            )
    if correction and wrapper in NOISE:
        raise InputError(
            f"--correct {correction}: --objective {wrapper} corrects for wrong labels "
            "too; give only one of them"
        )
    choice = Choice(loss, wrapper, mixture, correction)
    return dataclasses.replace(choice, per_record=_per_record(choice, rest)), rest


def _per_record(choice: Choice, given: Given) -> frozenset[str]:
    """The options of the parts in `FROM_RECORDS` that `--columns` names.

    Raises:
      InputError: if one is also given as an option, or is one number for all records,
        or a name is that of no column at all.
    """
    named = DataOptions(columns=tuple(given.get("columns", ()))).named_columns
    found: set[str] = set()
    known = set() if choice.sampled else {*ARRAYS, WEIGHT}
    for field, (prefix, function) in choice.functions.items():
        if field not in FROM_RECORDS:
            continue
        own = _from_records(field, function)
        known |= own
        for name in sorted(named.keys() & own):
            column, flag = f"{FLAG} {name}={named[name]}", canonical(f"{prefix}.{name}")
            if choice.loss in FACTORIES and not choice.sampled:
                raise InputError(
                    f"{column}: {choice.loss} has one {name} for all records; give "
                    f"--{flag} instead"
                )
            if flag in given:
                raise InputError(
                    f"--{flag} {' '.join(given[flag])}: {column} has one for each "
                    "record; give only one of them"
                )
            found.add(name)
    ratings = {name for name in named if name.startswith(RATING)}
    for name in sorted(named.keys() - known - ratings):
        column = f"{FLAG} {name}={named[name]}"
        if choice.sampled and name in Rates._fields:
            readers = [k for k, f in SAMPLED.items() if name in hyperparameters(f)]
            raise InputError(f"{column}: only {' and '.join(readers)} read it")
        raise InputError(
            f"{column}: {choice.sampled or choice.loss} has no {name}"
            f"{closest(name, known)}"
        )
    return frozenset(found)


def _named(
    option: str, what: str, given: Given, table: Mapping[str, Any]
) -> str | None:
    """Removes an option from `given` and returns the name that is its value."""
    if option not in given:
        return None
    words = given.pop(option)
    if len(words) != 1:
        raise InputError(f"--{option}: expected the name of one {what} after it")
    (name,) = words
    if name not in table:
        near = closest(name, table) or f"; expected one of {', '.join(table)}"
        raise InputError(f"--{option} {name}: no such {what}{near}")
    return name


FROM_RECORDS = ("loss", "correction", "sampled")
"""The parts whose options may be read from the records."""


def _from_records(field: str, function: Callable) -> frozenset[str]:
    """The options of a part that may be read from the records."""
    own = hyperparameters(function)
    return own & frozenset(Rates._fields) if field == "sampled" else own


def hyperparameters(function: Callable) -> frozenset[str]:
    """The names of a function's keyword-only parameters, but `where`.

    Those that are None by default are arrays, for callers of the function alone.
    """
    parameters = inspect.signature(function).parameters.values()
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    return frozenset(p.name for p in keywords if p.default is not None) - {"where"}


@functools.cache
def options_type(function: Callable, but: frozenset[str] = frozenset()) -> type:
    """A dataclass of a function's keyword-only parameters, with help for each.

    Args:
      function: the function.
      but: parameters to leave out.
    """
    documented = _documented_arguments(function)
    fields = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name not in hyperparameters(function) - but:
            continue
        # A loss's options may be arrays; on the command line they are numbers.
        known = (int, bool, float | Literal["auto"], tuple[str, ...])
        typed = parameter.annotation in known
        typed |= get_origin(parameter.annotation) is Literal
        kind = parameter.annotation if typed else float
        field = dataclasses.field(metadata={"help": documented[parameter.name]})
        if parameter.default is not parameter.empty:
            field.default = parameter.default
        fields.append((parameter.name, kind, field))
    return dataclasses.make_dataclass(
        f"{function.__name__}_options", fields, frozen=True, kw_only=True
    )


def _documented_arguments(function: Callable) -> dict[str, str]:
    """Name -> text of the `Args:` section of a Google-style docstring."""
    section = _docstring(function).split("Args:\n", 1)[-1].split("\n\n", 1)[0]
    entries = re.findall(
        r"^ +(\w+)(?: \([^)]*\))?: (.*(?:\n {3,}(?!\w+: ).*)*)", section, re.MULTILINE
    )
    return {name: " ".join(text.split()) for name, text in entries}


def _docstring(function: Callable) -> str:
    return inspect.getdoc(function) or ""


def losses_by_kind() -> dict[str, list[str]]:
    """Title of a kind -> names of its losses."""
    kinds: dict[str, list[str]] = {title: [] for title in KINDS}
    for name in LOSSES:
        file = getattr(losses, name).__module__.rpartition(".")[2]
        kinds[next(title for title, files in KINDS.items() if file in files)].append(
            name
        )
    return kinds


def summary(function: Callable) -> str:
    """The first line of a docstring."""
    return _docstring(function).splitlines()[0]


def description(function: Callable) -> str:
    """A docstring without its arguments: the equation and its source."""
    text = _docstring(function)
    about = text.split("\n\nArgs:", 1)[0].split("\n\nReturns:", 1)[0]
    references = re.search(r"References:\n(?: .*\n?)*", text)
    return about + (f"\n\n{references[0].rstrip()}" if references else "")
