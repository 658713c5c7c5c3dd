"""The records of a run: its training and held-out data, and where they come from."""

import dataclasses
import functools
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpref.data.options import DataOptions, MixOptions
from jaxpref.data.shared_prompts import Shared, check_shared, count_shared
from jaxpref.data.sources import open_source
from jaxpref.data.splits import Splits, make_mixed_splits, make_splits
from jaxpref.data.tokenizers import check_same_tokenizer
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
    whole_turns: bool = False,
    scored_by: Mapping[str, Path] = types.MappingProxyType({}),
) -> Datasets:
    """The records of a run; `heldout` data replaces the held-out share.

    Args:
      tokenizer: the model's tokenizer.
      options: how records become training and held-out data.
      num_completions: K, completions of a prompt.
      mix: how pairs with an empty trace are mixed in.
      train: the training data.
      heldout: separate data to evaluate on.
      whole_turns: whether turns end as a reward model reads them; see `tokenize`.
      scored_by: other models that score the same tokens: their folders, by their names
        in messages.

    Raises:
      InputError: if a record is wrong, none is left to train on, the two files share
        too many prompts, or another model's tokenizer differs.
    """
    _check_heldout(options, heldout)
    make = make_train = functools.partial(
        make_splits, sides=num_completions, whole_turns=whole_turns
    )
    files, sources = (train,), [open_source(train)]
    if mix is not None:
        make = make_train = make_mixed_splits
        if mix.empty_data:
            files = (train, mix.empty_data)
            sources.append(open_source(mix.empty_data))
            make_train = functools.partial(make, empty=sources[1])
    evaluated = sources
    if heldout is None:
        splits = make_train(sources[0], tokenizer, options)
    else:
        evaluated = [open_source(heldout)]
        whole = dataclasses.replace(options, heldout_fraction=0.0)
        splits = make_train(sources[0], tokenizer, whole)
        held = make(evaluated[0], tokenizer, whole.without_injection())
        log(f"{heldout}: {held.fields.describe()}")
        digest = splits.digest + held.digest
        splits = dataclasses.replace(splits, heldout=held.train, digest=digest)
    if not len(splits.train):
        raise InputError(
            f"{train}: no pair is left to train on ({splits.describe()}); lower "
            "--heldout-fraction"
        )
    log(f"{' and '.join(files)}: {splits.describe()}")
    splits.fields.check_ignored(options.ignore_fields)
    log(f"{train}: {splits.fields.describe()}")
    shared = count_shared(splits.train, splits.heldout, bos=tokenizer.bos_token_id)
    _report_shared(shared, train, heldout, allowed=options.allow_shared_prompts)
    if options.inject.active:
        flipped, count = splits.report["flipped"], len(splits.train)
        log(injection_warning(flipped, count, options.inject.describe()))
    read = [(sources, splits.train), (evaluated, splits.heldout)]
    for name, folder in scored_by.items():
        check_same_tokenizer(tokenizer, folder, read, options, name=name)
    return Datasets(splits, files, (heldout,) if heldout else files)


def _check_heldout(options: DataOptions, heldout: str | None) -> None:
    """Raises InputError for an option that would not be read."""
    if heldout is not None and options.heldout_fraction is not None:
        raise InputError(
            f"--heldout-fraction {options.heldout_fraction} and --eval-data {heldout}: "
            "both set what is evaluated on; give only one of them"
        )
    if heldout is None and options.allow_shared_prompts:
        raise InputError(
            "--allow-shared-prompts: only --eval-data can share prompts with --data; "
            "leave it out"
        )


def _report_shared(
    shared: Shared, train: str, heldout: str | None, *, allowed: bool
) -> None:
    """Logs how many evaluation pairs have a training prompt, and checks the share."""
    if heldout is not None:
        log(f"{heldout}: {shared.describe()} have a prompt that is also in {train}")
        check_shared(shared, train, heldout, allowed=allowed)
    elif shared.pairs:
        log(
            f"warning: {shared.describe()} that are held out have a prompt that differs"
            " from a training prompt only in whitespace, in form, or in what was cut"
        )


def injection_warning(flipped: int, pairs: int, noise: str) -> str:
    """A line with the number of training labels that were flipped on purpose, and how.

    Args:
      flipped: number of flipped training labels.
      pairs: number of training pairs.
      noise: what was injected, from `InjectOptions.describe`.
    """
    return (
        f"warning: {flipped:,} of {pairs:,} training labels ({flipped / pairs:.1%}) "
        f"were flipped on purpose (--inject: {noise})"
    )
