"""What a language model says of every pair: CHES, states of prompts, gradients."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from jaxpref import data
from jaxpref.data import DataOptions, PaddedLayout, PreferenceDataset
from jaxpref.errors import InputError, visible
from jaxpref.models import Model, Numerics, build
from jaxpref.models.folder import load_params
from jaxpref.models.folder_config import is_reward_model, read_architecture
from jaxpref.models.hub import resolve_folder
from jaxpref.models.layout import SPECS, reshard
from jaxpref.models.logprobs import CHUNK_BYTES
from jaxpref.runtime.heartbeat import beat
from jaxpref.runtime.mesh import (
    check_rows,
    make_mesh,
    row_shards,
    rows_for,
    to_global,
)
from jaxpref.runtime.precision import default_compute_dtype
from jaxpref.scoring.checks import check_fits
from jaxpref.scoring.hidden_sums import CHES, Ches
from jaxpref.scoring.scores import flat_sequences
from jaxpref.select.donod import head_gradient_norms, topsis
from jaxpref.select.opened import Opened
from jaxpref.select.scores import Scores, by_row
from jaxpref.sharding import replicated

Params = Any
Batch = Any
"""A `PreferenceBatch` of a program's arrays, without the axis of micro-batches."""
OfBatch = Callable[[Model, Params, Batch], Float[Array, "R C"]]
"""The numbers of each row of a batch."""
SHORTEST = 32
"""Smallest padded length, in tokens."""


def by_ches(opened: Opened) -> Scores:
    """The CHES scores of pairs, per token if the method is normalized-ches.

    See `losses.ches` and `losses.length_normalized_ches`.
    """
    found, pairs, reasons = _scores(opened, "ches", _ches)
    first = CHES.index(opened.config.by.replace("-", "_"))
    columns = {"score": found[:, first]}
    columns |= {name: found[:, n] for n, name in enumerate(CHES)}
    return _of_rows(opened, pairs, columns, reasons)


def by_donod(opened: Opened) -> Scores:
    """The closeness of answers to the smallest changes of the LM head.

    Of pairs, the chosen answer counts.  Both changes are costs: a large norm of the
    change is a sign of a wrong or unlearnable sample, and a large change of the norm of
    harm to what the model knows.  See `head_gradient_norms` and `topsis`.
    """
    found, pairs, reasons = _scores(opened, "donod", head_gradient_norms)
    columns = {
        "score": topsis(found),
        "norm_of_delta": found[:, 0],
        "delta_of_norm": found[:, 1],
    }
    return _of_rows(opened, pairs, columns, reasons)


def prompt_states(opened: Opened) -> dict[int, np.ndarray]:
    """The mean final hidden state over the prompt's tokens, by number of the pair."""
    found, pairs, _ = _scores(opened, "prompts", _prompt_state)
    return {int(n): x for n, x in zip(pairs.columns["row"], found)}


def _of_rows(
    opened: Opened,
    pairs: PreferenceDataset,
    columns: Mapping[str, Any],
    reasons: Mapping[int, str],
) -> Scores:
    rows = [opened.records.row(int(n)) for n in pairs.columns["row"]]
    return by_row(rows, columns, reasons, len(opened.file))


def _ches(model: Model, params: Params, batch: Batch) -> Float[Array, "R 2"]:
    """Both CHES scores of each pair."""
    hidden = model.hidden(params, flat_sequences(batch, batch.tokens))
    found = Ches().scores(hidden, {}, batch)
    return jnp.stack([found[name][:, 0, 0] for name in CHES], axis=-1)


def _prompt_state(model: Model, params: Params, batch: Batch) -> Float[Array, "R D"]:
    """The mean final hidden state of each prompt."""
    tokens = batch.tokens[:, 0]
    states = reshard(model.hidden(params, tokens), SPECS.hidden).astype(jnp.float32)
    length = batch.lengths[:, 0] - batch.completion_lengths[:, 0, 0]
    inside = jnp.arange(tokens.shape[1])[None] < length[:, None]
    total = jnp.einsum("btd,bt->bd", states, inside.astype(jnp.float32))
    return total / jnp.maximum(length, 1)[:, None]


def _scores(
    opened: Opened, title: str, of_batch: OfBatch
) -> tuple[np.ndarray, PreferenceDataset, dict[int, str]]:
    """The numbers of every pair, the pairs, and why other rows have none.

    Raises:
      InputError: for a reward model, several processes, rows that cannot be read, or
        outputs that are not finite.
    """
    config = opened.config
    if jax.process_count() > 1:
        raise InputError("data select runs in a single process; use one machine")
    folder = resolve_folder(str(config.model))
    if is_reward_model(folder):
        raise InputError(
            f"--model {config.model}: is a reward model; name a language model"
        )
    architecture = read_architecture(folder)
    mesh = make_mesh(config.mesh)
    check_rows(config.batch_size, 1, mesh)
    pairs, reasons = _tokenized(opened, folder, architecture.context_length)
    check_fits(config.files, pairs, str(config.model), architecture)
    dtype = config.compute_dtype or default_compute_dtype()
    with jax.set_mesh(mesh):
        model = build(architecture, Numerics(compute_dtype=dtype))
        params = load_params(folder, model)
        step = _make_step(model, of_batch)
        most = rows_for(len(pairs), config.batch_size, mesh)
        values: np.ndarray | None = None
        with tqdm(
            total=len(pairs), desc=visible(title), unit="record", disable=None
        ) as bar:
            for layout, some in _groups(pairs, most, mesh, architecture.vocab_size):
                for batch in layout.eval_batches(pairs, indices=some):
                    out = step(params, to_global(batch, mesh))
                    found, index = jax.device_get(out)
                    if values is None:
                        values = np.zeros((len(pairs), found.shape[1]), np.float32)
                    real = index >= 0
                    values[index[real]] = found[real]
                    bar.update(int(real.sum()))
                    beat(f"{bar.n} records of {config.named}")
    assert values is not None  # there is at least one pair
    wrong = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(wrong):
        place = opened.records.location(int(pairs.columns["row"][wrong[0]]))
        raise InputError(
            f"{place}: the model's outputs for it are not finite ({len(wrong)} such"
            " records); check the weights, or set --compute-dtype float32"
        )
    return values, pairs, reasons


def _tokenized(
    opened: Opened, folder: Path, context: int
) -> tuple[PreferenceDataset, dict[int, str]]:
    """The tokens of all pairs, and why other rows have none."""
    config = opened.config
    options = DataOptions(
        max_length=config.max_length,
        heldout_fraction=0.0,
        drop_empty=True,
        **config.for_other(),
    )
    splits = data.make_splits(
        opened.records,
        data.load_tokenizer(folder, config.template_options),
        data.for_model(options, context),
        kind=opened.kind,
    )
    splits.fields.check_ignored(config.ignore_fields)
    splits.fields.check_mapped(config.mapped)
    splits.fields.check_rendered(config.template_options, ", ".join(config.files))
    have = set(splits.train.columns["row"].tolist())
    bad = {x.row: "malformed" for x in splits.skipped}
    reasons: dict[int, str] = {}
    for index in range(len(opened.records)):
        if index not in have:
            place = opened.records.location(index)
            reason = bad.get(place) or opened.reason(index)
            reasons.setdefault(opened.records.row(index), reason)
    return splits.train, reasons


def _make_step(model: Model, of_batch: OfBatch) -> Callable:
    """The jitted `(params, batch) -> (numbers [R, C], pairs [R])`."""

    def step(params, batch):
        one = jax.tree.map(lambda x: x[0], batch)  # a single micro-batch
        out = of_batch(model, params, one)
        return replicated(out), replicated(one.pair_index[:, 0])

    return jax.jit(step)


def _groups(
    pairs: PreferenceDataset, most: int, mesh: jax.sharding.Mesh, vocabulary: int
) -> Iterator[tuple[PaddedLayout, np.ndarray]]:
    """Layouts for pairs of similar lengths, and the indices of these pairs.

    Lengths are rounded up to 2^k or 3 * 2^k, so that few shapes are compiled.  A batch
    has fewer rows than `most` if the logits of its answers would need more memory than
    those of a training step.
    """
    answers = pairs.completion_lengths.max(axis=1)
    shapes = [_rounded(int(n)) for n in pairs.prompt_lengths + answers]
    order = sorted(range(len(pairs)), key=lambda n: (shapes[n], n))
    for length, group in itertools.groupby(order, lambda n: shapes[n]):
        group = np.array([*group])
        answer = _rounded(int(answers[group].max()))
        rows = max(CHUNK_BYTES // (4 * answer * vocabulary), 1) * row_shards(mesh)
        layout = PaddedLayout(
            sequence_length=length,
            predictions=min(answer, length),
            num_completions=pairs.num_completions,
            batch_size=min(most, rows),
        )
        yield layout, group


def _rounded(length: int) -> int:
    size = SHORTEST
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size
