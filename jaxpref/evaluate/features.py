"""What a model says of every completion, cached on disk and resumable.

A language model gives features, and a reward model rewards.

Files in a feature folder are named by a digest of the model, and their rows by a digest
of prompt and completion tokens.  So only new completions are computed if rows are
added, removed, reordered, or flipped, if pairs have several votes, or after an
interruption.  Audits with the same model may share a folder.
"""

import dataclasses
import hashlib
import io
import itertools
import logging
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxpref.data import DatasetBuilder, PaddedLayout, PreferenceDataset
from jaxpref.errors import InputError
from jaxpref.files import write_whole
from jaxpref.models import Model, RewardModel
from jaxpref.models.layout import SPECS, reshard
from jaxpref.models.logprobs import token_logps
from jaxpref.runtime.cache_folder import make_private, warn_if_others_write
from jaxpref.runtime.mesh import to_global
from jaxpref.sharding import replicated

_log = logging.getLogger("jaxpref")

BLOCK = 512
"""Maximum number of completions per file; an interrupt loses at most one file."""
SHORTEST = 32
"""Smallest padded length, in tokens."""


@dataclasses.dataclass(frozen=True)
class Features:
    """Features of the completions of N pairs; index 0 is the preferred completion."""

    states: np.ndarray
    """float32 [N, 2, 2 D]; final hidden states: the mean over the completion, and the
    state at its last token."""
    logps: np.ndarray
    """float32 [N, 2]; log-prob in nats, summed over the completion."""
    lengths: np.ndarray
    """int32 [N, 2]; tokens of the completion, EOS included."""


def make_feature_step(model: Model, *, chunk_size: int | None = None) -> Callable:
    """Returns the jitted `(params, batch) -> (features [A * R, 2 D + 1], pairs)`.

    The columns are the mean of the final hidden states over the completion's tokens,
    the state at its last token, and its summed log-prob.  Batches have one completion
    per row; the pair indices are [A, R, 1].
    """

    def of_micro(params, batch):
        tokens, lengths = batch.tokens[:, 0], batch.lengths[:, 0]
        hidden = model.hidden(params, tokens)
        logps = token_logps(
            hidden,
            model.head(params),
            batch.predictors[:, 0],
            batch.targets[:, 0],
            chunk_size=chunk_size,
        )
        total = jnp.sum(jnp.where(batch.completions[:, 0] >= 0, logps, 0), axis=-1)
        sizes = batch.completion_lengths[:, 0, 0]
        position = jnp.arange(tokens.shape[1])[None]
        inside = (position >= (lengths - sizes)[:, None]) & (
            position < lengths[:, None]
        )
        last = position == (lengths - 1)[:, None]
        states = reshard(hidden, SPECS.hidden).astype(jnp.float32)
        pick = lambda mask: jnp.einsum("btd,bt->bd", states, mask.astype(jnp.float32))
        mean = pick(inside) / jnp.maximum(sizes, 1)[:, None]
        return jnp.concatenate([mean, pick(last), total[:, None]], axis=1)

    def feature_step(params, batch):
        out = jax.lax.map(lambda micro: of_micro(params, micro), batch)
        return jax.tree.map(replicated, (out, batch.pair_index))

    return jax.jit(feature_step)


def make_reward_step(model: RewardModel) -> Callable:
    """Returns the jitted `(params, batch) -> (rewards [A * R, 1], pairs)`.

    Batches are those of `make_feature_step`.
    """

    def of_micro(params, batch):
        rewards = model.rewards(params, batch.tokens[:, 0], batch.lengths[:, 0])
        return rewards.astype(jnp.float32)[:, None]

    def reward_step(params, batch):
        out = jax.lax.map(lambda micro: of_micro(params, micro), batch)
        return jax.tree.map(replicated, (out, batch.pair_index))

    return jax.jit(reward_step)


def features_of(values: np.ndarray, pairs: PreferenceDataset) -> Features:
    """The columns of `make_feature_step` for the completions of all pairs."""
    return Features(values[..., :-1], values[..., -1], pairs.completion_lengths)


def compute(
    pairs: PreferenceDataset,
    step: Callable,
    params: Any,
    *,
    source: str,
    folder: Path,
    digest: str,
    width: int,
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> np.ndarray:
    """Computes the columns of every completion, or reads them from `folder`.

    Args:
      pairs: N pairs.
      step: from `make_feature_step` or `make_reward_step`.
      params: the model's parameters.
      source: name of the pairs' source, for error messages.
      folder: folder of cached features; created if missing.
      digest: digest of the model, from `weights_digest`.
      width: number of columns of the step's result, 2 D + 1 or 1.
      batch_size: completions at the same time, over all devices.
      mesh: mesh on which the batches are placed.

    Returns:
      float32 [N, 2, width].

    Raises:
      InputError: if the folder cannot be written, or the model's outputs are not
        finite; the message names the row.
    """
    make_private(folder)
    warn_if_others_write(folder, holds="the model's features")
    keys = pairs.completion_keys()
    table = _load(folder, digest, width)
    missing = _first_of_each(keys, table)
    with tqdm(
        total=len(missing), desc="features", unit="completion", disable=None
    ) as bar:
        for layout, part in _blocks(pairs, missing, batch_size):
            values = _of_block(part, step, params, layout, mesh)
            wrong = ~np.isfinite(values).all(axis=1)
            if wrong.any():
                raise InputError(
                    f"{source} row {part.columns['row'][wrong][0] + 1}: the model's"
                    f" outputs for it are not finite ({wrong.sum()} such completions);"
                    " check the weights, or set --compute-dtype float32"
                )
            _save(folder, digest, part.ids, values)
            table |= zip(part.ids.tolist(), values)
            bar.update(len(part))
    values = np.stack([table[key] for key in keys.ravel().tolist()])
    return values.reshape(len(pairs), 2, width)


def _first_of_each(keys: np.ndarray, table) -> list[tuple[int, int, str]]:
    """(pair, side, key) of each distinct completion that is not in the table."""
    found = {}
    for (n, side), key in np.ndenumerate(keys):
        key = str(key)
        if key not in table and key not in found:
            found[key] = (n, side, key)
    return list(found.values())


def _blocks(
    pairs: PreferenceDataset, missing: list, batch_size: int
) -> Iterator[tuple[PaddedLayout, PreferenceDataset]]:
    """Groups completions of similar lengths to reduce padding.

    Lengths are rounded up to 2^k or 3 * 2^k, and predictions to these divided by powers
    of 2.  So at most a few dozen shapes are compiled.
    """

    def shape_of(entry) -> tuple[int, int]:
        n, side, _ = entry
        size = int(pairs.completion_lengths[n, side])
        length = _rounded(int(pairs.context_lengths[n, side]) + size)
        predictions = length
        while predictions % 2 == 0 and 2 * size <= predictions:
            predictions //= 2
        return length, predictions

    for shape, group in itertools.groupby(sorted(missing, key=shape_of), shape_of):
        group = list(group)
        length, predictions = shape
        layout = PaddedLayout(
            sequence_length=length,
            predictions=predictions,
            num_completions=1,
            batch_size=batch_size,
        )
        for start in range(0, len(group), BLOCK):
            part = DatasetBuilder(1)
            for n, side, key in group[start : start + BLOCK]:
                part.add(
                    pairs.context(n, side),
                    [pairs.completion(n, side)],
                    id=key,
                    columns={"row": int(pairs.columns["row"][n])},
                )
            yield layout, part.build()


def _rounded(length: int) -> int:
    size = SHORTEST
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def _of_block(
    part: PreferenceDataset, step, params, layout: PaddedLayout, mesh
) -> np.ndarray:
    out = []
    for batch in layout.eval_batches(part):
        values, index = jax.device_get(step(params, to_global(batch, mesh)))
        out.append(values.reshape(-1, values.shape[-1])[index.ravel() >= 0])
    return np.concatenate(out)


def _save(folder: Path, digest: str, ids: np.ndarray, values: np.ndarray) -> None:
    # Named by its content, so that passes over different data never collide.
    content = hashlib.sha256("".join(ids).encode()).hexdigest()[:16]
    file = io.BytesIO()
    np.savez(file, ids=ids, values=values, made_by=digest)
    write_whole(folder / f"{digest[:16]}-{content}.npz", file.getvalue())


def _load(folder: Path, digest: str, width: int) -> dict[str, np.ndarray]:
    table = {}
    for path in sorted(folder.glob(f"{digest[:16]}-*.npz")):
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                ids, values = stored["ids"], stored["values"]
                made_by = str(stored["made_by"])
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error):
            continue  # damaged: compute again
        if made_by != digest:
            _log.warning("%s: not used: its features are from another model", path)
        elif values.shape == (len(ids), width) and np.isfinite(values).all():
            table |= zip(ids.tolist(), values)
    return table
