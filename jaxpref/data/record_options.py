"""Options of every command that reads records: field names, formats, bad rows."""

import contextlib
import dataclasses
import json
from typing import Any, Literal

from jaxpref.data.records import FORMATS
from jaxpref.data.records.adapters import ADAPTERS, Adapter, PairRules
from jaxpref.data.records.best_pair import Rule
from jaxpref.data.records.mapping import read_fields
from jaxpref.data.records.template import RESERVED
from jaxpref.errors import InputError, closest

NAMES = (*FORMATS, *(adapter.name for adapter in ADAPTERS))
"""The formats that `--format` may name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """How the records of a file are read."""

    fields: tuple[str, ...] = ()
    """Names of the fields in the file, as NAME=FIELD, separated by commas or spaces:
    prompt=question chosen=a rejected=b.  A dotted path leads into objects and lists:
    prompt=turns.0.text.  Other fields keep their names."""
    format: str | None = None
    """The format of all records, such as ultrafeedback (default: detect it for each
    record); docs/data.md lists them."""
    pairs: Rule = "best-random"
    """Which pairs are made from a record with several scored answers: the best with the
    worst, the best with a random worse one, or all with different scores."""
    votes: Literal["each", "majority"] = "each"
    """What is made from a record with several votes: a pair for each vote with its
    annotator, or one for their majority.  Training scores a pair once for all votes
    (not bvpo, rationale and hypo)."""
    own_prompts: bool = False
    """Allow the answers of a record to follow different prompts in any format, such as
    messages in chosen and rejected (default: drop and count such records, unless the
    prompts are in chosen_prompt and rejected_prompt)."""
    ignore_fields: tuple[str, ...] = ()
    """Fields of the records to ignore, even if they change what a record means."""
    on_bad_row: Literal["raise", "skip"] = "raise"
    """Whether a malformed record is an error, or is skipped and counted.  train,
    evaluate and audit list skipped records in OUT/skipped_rows.jsonl."""

    template: tuple[str, ...] = ()
    """Variables of the chat template for all records, as NAME=VALUE or --template.NAME
    VALUE: --template.enable_thinking false.  A value is JSON, or else text.  A record's
    own chat_template_kwargs come first."""

    def __post_init__(self):
        for name in self.template_options:
            if name in RESERVED:
                raise InputError(
                    f"--template.{name}: only the run itself sets this; leave it out"
                )
        ignored = (x.strip() for word in self.ignore_fields for x in word.split(","))
        object.__setattr__(self, "ignore_fields", tuple(x for x in ignored if x))
        for name, path in self.mapped.items():
            if path in self.ignore_fields:
                raise InputError(
                    f"--ignore-fields {path}: --fields {name}={path} reads it; remove"
                    " one of the two"
                )
        if self.format is not None and self.format not in NAMES:
            raise InputError(
                f"--format {self.format}: no such format{closest(self.format, NAMES)};"
                f" choose from {', '.join(NAMES)}"
            )

    @property
    def mapped(self) -> dict[str, str]:
        """The path in the file by our name."""
        example = "prompt=question,chosen=a,rejected=b"
        return read_fields(self.fields, "--fields", example) if self.fields else {}

    @property
    def template_options(self) -> dict[str, Any]:
        """The variables of the chat template, by name."""
        found = {}
        for word in self.template:
            name, equals, value = word.partition("=")
            if not (name.isidentifier() and equals):
                raise InputError(
                    f"--template {word}: expected NAME=VALUE, such as "
                    "enable_thinking=false"
                )
            found[name] = value
            with contextlib.suppress(ValueError, RecursionError):
                found[name] = json.loads(value)
        return found

    @property
    def adapter(self) -> Adapter | None:
        """The adapter of the format, if one is named."""
        return next((x for x in ADAPTERS if x.name == self.format), None)

    def rules(self, sides: int | None) -> PairRules:
        """Which pairs are made for K completions of a prompt; None is a list of any K.

        Of a record with several answers, a single completion is the best of them.
        """
        if sides == 1:
            return PairRules("best-worst", "majority")
        if sides is None:
            return PairRules("list", self.votes)
        return PairRules(self.pairs, self.votes)

    def for_other(self) -> dict[str, Any]:
        """These options alone, to be passed to another dataclass that has them."""
        names = [x.name for x in dataclasses.fields(RecordOptions)]
        return {name: getattr(self, name) for name in names}

    def changed(self) -> dict[str, Any]:
        """Those of these options that are not the default."""
        default = RecordOptions()
        given = self.for_other().items()
        return {name: x for name, x in given if x != getattr(default, name)}
