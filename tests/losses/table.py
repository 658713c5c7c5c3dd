"""The rows of all losses: a table for each kind, as in jaxpref/losses."""

from tests.losses import (
    rows_batch,
    rows_divergence,
    rows_dynamic,
    rows_length,
    rows_likelihood,
    rows_pairwise,
    rows_reference_free,
    rows_reward_models,
    rows_robust,
    rows_sides,
    rows_symmetric,
    rows_token,
    rows_weights,
)

TABLE = (
    *rows_batch.ROWS,
    *rows_divergence.ROWS,
    *rows_dynamic.ROWS,
    *rows_length.ROWS,
    *rows_likelihood.ROWS,
    *rows_pairwise.ROWS,
    *rows_reference_free.ROWS,
    *rows_reward_models.ROWS,
    *rows_robust.ROWS,
    *rows_sides.ROWS,
    *rows_symmetric.ROWS,
    *rows_token.ROWS,
    *rows_weights.ROWS,
)
