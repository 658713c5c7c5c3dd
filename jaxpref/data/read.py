"""The records of a run: its training and held-out data, and where they come from."""

import dataclasses
import functools
from typing import Any

from jaxpref.data.options import DataOptions, MixOptions
from jaxpref.data.sources import open_source
from jaxpref.data.splits import Splits, make_mixed_splits, make_splits
from jaxpref.errors import InputError
from jaxpref.runtime.processes import log


@dataclasses.dataclass(frozen=True)
class Datasets:
    """The records of a run and where they come from."""

    splits: Splits
    """Training and held-out records."""
    train_sources: tuple[str, ...]
    """Files of the training records, by the column `source`."""
    heldout_sources: tuple[str, ...]
    """Files of the held-out records, by the column `source`."""


def read_datasets(
    tokenizer: Any,
    options: DataOptions,
    *,
    num_completions: int,
    mix: MixOptions | None,
    train: str,
    heldout: str | None,
) -> Datasets:
    """The records of a run; `heldout` data replaces the held-out share.

    Raises:
      InputError: if a record is wrong, or none is left to train on.
    """
    make = make_train = functools.partial(make_splits, sides=num_completions)
    train_sources = (train,)
    if mix is not None:
        make = make_train = make_mixed_splits
        if mix.empty_data:
            train_sources = (train, mix.empty_data)
            empty = open_source(mix.empty_data)
            make_train = functools.partial(make, empty=empty)
    if heldout is None:
        splits = make_train(open_source(train), tokenizer, options)
    else:
        whole = dataclasses.replace(options, heldout_fraction=0.0)
        splits = make_train(open_source(train), tokenizer, whole)
        held = make(open_source(heldout), tokenizer, whole.without_injection())
        digest = splits.digest + held.digest
        splits = dataclasses.replace(splits, heldout=held.train, digest=digest)
    if not len(splits.train):
        raise InputError(
            f"{train}: no pair is left to train on ({splits.describe()}); lower "
            "--heldout-fraction"
        )
    log(f"{' and '.join(train_sources)}: {splits.describe()}")
    if options.inject.active:
        log(injection_warning(splits.report["flipped"], len(splits.train)))
    return Datasets(splits, train_sources, (heldout,) if heldout else train_sources)


def injection_warning(flipped: int, pairs: int) -> str:
    """A line with the number of training labels that were flipped on purpose."""
    return (
        f"warning: {flipped:,} of {pairs:,} training labels ({flipped / pairs:.1%}) "
        "were flipped on purpose (--inject)"
    )
