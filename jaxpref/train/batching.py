"""How a run's pairs become batches, and which share of them this process makes."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxpref import data
from jaxpref.runtime.mesh import check_rows, row_shards, share_of_rows
from jaxpref.train.config import TrainConfig
from jaxpref.train.elsewhere import begun_rows
from jaxpref.train.programs import row_length_for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batching:
    """Makes batches of one shape: padded, mixed of traces and empty ones, or packed."""

    split: Mapping[str, Any]
    """Arguments of all makers: shape, micro-batches, this process's share and, where
    each pair has a row, how many there are in a step."""
    shards: int
    """Parts the rows of a step are split into, devices times micro-batches."""
    packed: bool
    """Whether several pairs share a row."""
    empty_share: float | None
    """Of pairs with an empty trace, where a second stream draws them."""

    @property
    def shape(self) -> data.BatchShape | data.PackedShape:
        """Of the batches."""
        return self.split["shape"]

    @property
    def rows(self) -> int | None:
        """Packed rows of a step; None where each pair has one."""
        return self.shape.rows if self.packed else None

    def batches(self, pairs: data.Pairs, **options: Any) -> Iterator:
        """Those to train on, without end; `options` as of `jaxpref.data.batches`."""
        if self.packed:
            return data.packed_batches(pairs, **self.split, **options)
        if self.empty_share is not None:
            options["empty_share"] = self.empty_share
            return data.mixed_batches(pairs, **self.split, **options)
        return data.batches(pairs, **self.split, **options)

    def eval_batches(self, pairs: data.Pairs, **options: Any) -> Iterator:
        """Each pair once; `options` as of `jaxpref.data.eval_batches`."""
        make = data.packed_eval_batches if self.packed else data.eval_batches
        return make(pairs, **self.split, **options)

    def of_all_processes(self) -> "Batching":
        """The same, with every process's share."""
        alone = {"process_index": 0, "process_count": 1}
        return dataclasses.replace(self, split={**self.split, **alone})


def _row_length(config: TrainConfig, plan: data.Plan, shards: int) -> int | None:
    """Tokens of a packed row, None for one pair per row."""
    if config.row_length != "auto":
        return None if config.row_length == "none" else config.row_length
    if config.mix is not None:
        return None
    row_length = row_length_for(
        plan.train, plan.heldout, batch_size=config.batch_size, shards=shards
    )
    if jax.process_index() == 0:
        print(f"row length {row_length}, chosen from the data; --row-length changes it")
    return row_length


def make_batching(
    config: TrainConfig, plan: data.Plan, mesh: jax.sharding.Mesh, out: Path
) -> Batching:
    """The run's.

    A packed run that was begun on other devices keeps its rows where these can share
    them: the mesh decides how many there are, and then they stay as they were.

    Raises:
      InputError: if the devices cannot share the rows evenly.
    """
    index, count = share_of_rows(mesh)
    split = {
        "process_index": index,
        "process_count": count,
        "accumulation": config.accumulation,
    }
    shards = config.accumulation * row_shards(mesh)
    row_length = _row_length(config, plan, shards)
    packed = row_length is not None
    if packed:
        shape = data.packed_shape(
            plan.train,
            plan.heldout,
            row_length=row_length,
            batch_size=config.batch_size,
            parts=shards,
        )
        begun = begun_rows(out / "checkpoints")
        if begun is not None and begun % shards == 0:
            shape = dataclasses.replace(shape, rows=begun)
        check_rows(shape.rows, config.accumulation, mesh)
        split["shape"] = shape
    else:
        split["shape"] = data.batch_shape(plan.train, plan.heldout)
        split["batch_size"] = config.batch_size
    return Batching(
        split=split,
        shards=shards,
        packed=packed,
        empty_share=None if config.mix is None else config.mix.empty_share,
    )
