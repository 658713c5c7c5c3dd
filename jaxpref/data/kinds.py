"""What a run reads of each record: a pair, one answer, or a list of answers."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Kind:
    """What an objective needs of each record."""

    sides: int | None = 2
    """Answers of a record: 2 for pairs, 1 for single answers, None for lists, which
    have as many as the record holds."""
    labels: frozenset[str] = frozenset()
    """Labels that are read besides the order of the answers; see `labels.LABELS`."""
    mismatched: bool = False
    """Whether each prompt also gets the answer of another one; see `mismatched`."""

    @property
    def num_completions(self) -> int | None:
        """K, completions of a prompt in a batch; None if the data decides."""
        return None if self.sides is None else self.sides + self.mismatched

    def of_record(self, record: Any) -> "Kind":
        """What is read of one record: a pair is two labeled answers."""
        labeled = "desirable" in self.labels and isinstance(record, Mapping)
        if labeled and record.get("rejected") is not None:
            return Kind(sides=2, labels=self.labels - {"desirable"})
        return self

    @property
    def can_flip(self) -> bool:
        """Whether the label of a record can be turned into its opposite."""
        return self.sides == 2 or "desirable" in self.labels


PAIRS = Kind()
"""A chosen and a rejected answer."""
ANSWERS = Kind(sides=1)
"""One answer each, without a label."""
