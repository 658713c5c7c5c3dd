"""Features of prompts: the mean of a model's final hidden states over their tokens."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxpref.data import DatasetBuilder, PaddedLayout, PreferenceDataset
from jaxpref.models import Model
from jaxpref.models.layout import SPECS, reshard
from jaxpref.runtime.heartbeat import beat
from jaxpref.runtime.mesh import row_shards, share_of_rows, to_global
from jaxpref.sharding import replicated

BLOCK = 1024
"""Prompts whose features are on the host at once."""


def make_prompt_step(model: Model) -> Callable:
    """Returns the jitted `(params, batch) -> (features [A R, D], pairs [A, R, 1])`.

    Batches have one sequence per row.
    """

    def of_micro(params, batch):
        tokens, lengths = batch.tokens[:, 0], batch.lengths[:, 0]
        hidden = model.hidden(params, tokens)
        states = reshard(hidden, SPECS.hidden).astype(jnp.float32)
        inside = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
        total = jnp.einsum("btd,bt->bd", states, inside.astype(jnp.float32))
        return total / jnp.maximum(lengths, 1)[:, None]

    def step(params, batch):
        features = jax.lax.map(lambda micro: of_micro(params, micro), batch)
        return jax.tree.map(replicated, (features, batch.pair_index))

    return jax.jit(step)


def prompt_features(
    dataset: PreferenceDataset,
    records: Int[np.ndarray, " M"],
    step: Callable,
    params: Any,
    *,
    mesh: jax.sharding.Mesh,
    batch_size: int,
) -> Iterator[tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n D"]]]:
    """The features of the prompts of some records, in blocks of similar lengths.

    Args:
      dataset: the records.
      records: which ones.
      step: from `make_prompt_step`.
      params: the model's parameters.
      mesh: the devices.
      batch_size: prompts at the same time, over all devices; rounded up.

    Yields:
      Places in `records`, and the float32 features of the prompts there; the same on
      every process.
    """
    lengths = dataset.prompt_lengths[records]
    order = np.argsort(lengths, kind="stable")
    shards, (index, count) = row_shards(mesh), share_of_rows(mesh)
    rows = -(-batch_size // shards) * shards
    for start in range(0, len(order), BLOCK):
        places = order[start : start + BLOCK]
        builder = DatasetBuilder(1)
        for place in places.tolist():
            # Of a row, both parts are read alike, but none may be empty.
            prompt = dataset.prompt(int(records[place]))
            rest = prompt[1:] if len(prompt) > 1 else prompt
            builder.add(prompt[:1], [rest], id=str(place))
        block = builder.build()
        # Powers of two, so that few shapes are compiled.
        length = 1 << max(int(block.longest) - 1, 15).bit_length()
        layout = PaddedLayout(
            sequence_length=length,
            predictions=length,
            num_completions=1,
            batch_size=rows,
            process_index=index,
            process_count=count,
        )
        found = []
        for batch in layout.eval_batches(block):
            values, pairs = jax.device_get(step(params, to_global(batch, mesh)))
            found.append(values.reshape(-1, values.shape[-1])[pairs.ravel() >= 0])
        beat(f"{start + len(places)} of {len(order)} prompts")
        yield places, np.concatenate(found)
