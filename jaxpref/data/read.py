"""The records of a run: its training and held-out data, and where they come from."""

import dataclasses
import functools
import hashlib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpref.data.bad_rows import log_skipped
from jaxpref.data.chunk_cache import tokens_folder
from jaxpref.data.columns import check_rated
from jaxpref.data.kinds import PAIRS, Kind
from jaxpref.data.mixing import Data, read_mixture
from jaxpref.data.options import DataOptions, MixOptions
from jaxpref.data.record_source import open_records
from jaxpref.data.shared_prompts import Shared, check_shared, count_shared
from jaxpref.data.splits import Splits, make_mixed_splits, make_splits
from jaxpref.data.tokenizers import check_same_tokenizer
from jaxpref.data.votes import share_votes
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

    def prefixed(self, count: int) -> "Datasets":
        """With placeholders before all prompts; see `PreferenceDataset.prefixed`."""
        names = "train", "heldout"
        sets = {name: getattr(self.splits, name).prefixed(count) for name in names}
        splits = dataclasses.replace(self.splits, **sets)
        return dataclasses.replace(self, splits=splits)


def read_datasets(
    tokenizer: Any,
    options: DataOptions,
    *,
    kind: Kind = PAIRS,
    mix: MixOptions | None,
    train: Data,
    heldout: str | None,
    whole_turns: bool = False,
    scored_by: Mapping[str, Path] = types.MappingProxyType({}),
) -> Datasets:
    """The records of a run; `heldout` data replaces the held-out share.

    Args:
      tokenizer: the model's tokenizer.
      options: how records become training and held-out data.
      kind: what is read of each record.
      mix: how pairs with an empty trace are mixed in.
      train: the training data, one or several files; see `read_mixture`.
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
        make_splits, kind=kind, whole_turns=whole_turns, folder=tokens_folder()
    )
    open_data = functools.partial(open_records, options=options, sides=kind.sides)
    mixture = read_mixture(train)
    files, sources = mixture.names, [open_data(name) for name in mixture.names]
    named = " and ".join(files)
    if len(files) > 1:
        make_train = functools.partial(make, more=sources[1:])
    if mix is not None:
        if len(files) > 1:
            raise InputError(f"--data {' '.join(files)}: bvpo reads one file only")
        make = make_train = functools.partial(make_mixed_splits, folder=tokens_folder())
        if mix.empty_data:
            files = (*files, mix.empty_data)
            sources.append(open_data(mix.empty_data))
            make_train = functools.partial(make, empty=sources[1])
    evaluated = sources
    if heldout is None:
        splits = make_train(sources[0], tokenizer, options)
    else:
        evaluated = [open_data(heldout)]
        whole = dataclasses.replace(options, heldout_fraction=0.0)
        splits = make_train(sources[0], tokenizer, whole)
        held = make(evaluated[0], tokenizer, whole.without_injection())
        log(f"{heldout}: {held.fields.describe()}")
        digest = splits.digest + held.digest
        # Lists of two files may have different lengths.
        most = max(x.train.num_completions for x in (splits, held))
        splits = dataclasses.replace(
            splits,
            train=splits.train.widened(most),
            heldout=held.train.widened(most),
            digest=digest,
            skipped=splits.skipped + held.skipped,
        )
    if not len(splits.train):
        raise InputError(
            f"{named}: no pair is left to train on ({splits.describe()}); lower "
            "--heldout-fraction"
        )
    check_rated(splits.train.numbers, kind.columns(options.named_columns), named)
    log(f"{' and '.join(files)}: {splits.describe()}")
    log_skipped(splits.skipped)
    _check_fields(splits, options, named)
    shared = count_shared(splits.train, splits.heldout, bos=tokenizer.bos_token_id)
    _report_shared(shared, named, heldout, allowed=options.allow_shared_prompts)
    if options.inject.active:
        flipped, count = splits.report["flipped"], len(splits.train)
        log(injection_warning(flipped, count, options.inject.describe()))
    read = [(sources, splits.train), (evaluated, splits.heldout)]
    for name, folder in scored_by.items():
        check_same_tokenizer(tokenizer, folder, read, options, name=name, kind=kind)
    if kind.votes:
        splits = _with_shared_votes(splits, named)
    if mixture.weights is not None:
        digest = hashlib.sha256(f"{splits.digest} {mixture.weights}".encode())
        splits = dataclasses.replace(
            splits, weights=mixture.weights, digest=digest.hexdigest()
        )
        shares = zip(files, mixture.weights, strict=True)
        log("shares of the pairs: " + ", ".join(f"{x} {w:.3g}" for x, w in shares))
    return Datasets(splits, files, (heldout,) if heldout else files)


def _check_fields(splits: Splits, options: DataOptions, files: str) -> None:
    """Checks options that name fields, and logs which fields were read."""
    splits.fields.check_ignored(options.ignore_fields)
    splits.fields.check_mapped(options.mapped)
    splits.fields.check_rendered(options.template_options, files)
    log(f"{files}: {splits.fields.describe()}")
    for line in splits.fields.warnings():
        log(f"{files}: {line}")


def _with_shared_votes(splits: Splits, files: str) -> Splits:
    """The splits with one row for all votes on a pair; logs how many there are."""
    train, heldout = share_votes(splits.train, splits.heldout)
    if train is splits.train:
        return splits
    log(
        f"{files}: {len(splits.train):,} votes on {len(train):,} training pairs, at "
        f"most {train.num_votes} on one; a pair is scored once for all its votes"
    )
    digest = hashlib.sha256(f"{train.digest()} {heldout.digest()}".encode())
    return dataclasses.replace(
        splits, train=train, heldout=heldout, digest=digest.hexdigest()
    )


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
