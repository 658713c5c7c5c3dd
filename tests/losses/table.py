"""The rows of all losses: one table for each file of jaxpref/losses."""

from tests.losses import (
    rows_likelihood,
    rows_pairwise,
    rows_reference_free,
    rows_robust,
)

TABLE = (
    *rows_likelihood.ROWS,
    *rows_pairwise.ROWS,
    *rows_reference_free.ROWS,
    *rows_robust.ROWS,
)
