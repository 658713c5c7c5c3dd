"""Features of the domain, from the fields of records."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from jaxpref.data import PreferenceDataset, Source
from jaxpref.data.columns import field_value
from jaxpref.errors import InputError, closest
from jaxpref.evaluate.groups import record_fields

SIDES = ("chosen", "rejected")


def domain_columns(
    source: Source, pairs: PreferenceDataset, names: Sequence[str]
) -> Float[np.ndarray, "pairs columns"]:
    """The columns of the chosen answer minus those of the rejected one.

    Args:
      source: the records that the pairs were read from.
      pairs: N pairs.
      names: a column NAME is read from the fields chosen_NAME and rejected_NAME.

    Raises:
      InputError: if a record lacks a field, or it holds no finite number.
    """
    found = np.zeros((len(pairs), 2, len(names)))
    for n, row in enumerate(pairs.columns["row"].tolist()):
        record = record_fields(source[row])
        for k, side in enumerate(SIDES):
            for c, name in enumerate(names):
                value = field_value(record, field := f"{side}_{name}")
                number = isinstance(value, int | float) and math.isfinite(value)
                if value is None:
                    raise InputError(
                        f"{source.location(row)}: --columns {name}: no field {field!r}"
                        f"{closest(field, list(record))}; every record needs "
                        f"chosen_{name} and rejected_{name}"
                    )
                if not number:
                    raise InputError(
                        f"{source.location(row)}: field {field!r} holds {value!r:.40}; "
                        "--columns needs finite numbers"
                    )
                found[n, k, c] = value
    return found[:, 0] - found[:, 1]
