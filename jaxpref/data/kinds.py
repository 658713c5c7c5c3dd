"""What a run reads of each record: a pair, one answer, or a list of answers."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxpref.data.columns import accept, fields_to_read


@dataclasses.dataclass(frozen=True)
class Kind:
    """What an objective needs of each record."""

    sides: int | None = 2
    """Answers of a record: 2 for pairs, 1 for single answers, None for lists, which
    have as many as the record holds."""
    numbers: frozenset[str] = frozenset()
    """Numbers that are read besides the order of the answers; see `data.columns`."""
    mismatched: bool = False
    """Whether each prompt also gets the answer of another one; see `mismatched`."""
    check: Callable[[str, float], None] = accept
    """`check(name, value)` raises ValueError if a hyperparameter that is read from the
    records may not have a value."""
    joint: bool = False
    """Whether prompts are trained on like answers; see `joint`."""
    rationale: bool = False
    """Whether the reason for the preference is a third completion; see `rationales`."""
    votes: bool = False
    """Whether all votes on a pair are one row; see `votes`."""

    @property
    def num_completions(self) -> int | None:
        """K, completions of a prompt in a batch; None if the data decides."""
        if self.sides is None:
            return None
        return self.sides + self.mismatched + self.rationale

    @property
    def num_read(self) -> int | None:
        """Those completions that come from the record itself."""
        return None if self.sides is None else self.sides + self.rationale

    def of_record(self, record: Any) -> "Kind":
        """What is read of one record: a pair is two labeled answers."""
        labeled = "desirable" in self.numbers and isinstance(record, Mapping)
        if labeled and record.get("rejected") is not None:
            numbers = self.numbers - {"desirable"}
            return dataclasses.replace(self, sides=2, numbers=numbers, mismatched=False)
        return self

    def columns(self, named: Mapping[str, str]) -> dict[str, str]:
        """The fields with the numbers of a record, by column.

        Args:
          named: the field by column; see `DataOptions.named_columns`.
        """
        return fields_to_read(named, self.numbers)

    @property
    def can_flip(self) -> bool:
        """Whether the label of a record can be turned into its opposite."""
        return self.sides == 2 or "desirable" in self.numbers


PAIRS = Kind()
"""A chosen and a rejected answer."""
ANSWERS = Kind(sides=1)
"""One answer each, without a label."""
LABELED = Kind(1, frozenset({"desirable"}))
"""One answer each, with a label."""
LISTS = Kind(None, frozenset({"qualities"}))
"""Lists of answers with scores or ranks."""
KINDS = {"pairs": PAIRS, "answers": ANSWERS, "labeled": LABELED, "lists": LISTS}
"""The kinds that `--kind` of `jaxpref data` may name."""
