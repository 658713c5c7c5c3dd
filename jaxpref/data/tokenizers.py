"""Whether two tokenizers turn the data of a run into the same tokens.

Models that score the same token ids must agree on what the ids mean.  Equal vocabulary
sizes do not show that.  So a sample of the records is rendered and tokenized by both,
and all tokens of the data are looked up in both vocabularies.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpref.data.dataset import PreferenceDataset
from jaxpref.data.kinds import PAIRS, Kind
from jaxpref.data.options import DataOptions
from jaxpref.data.sources import Source
from jaxpref.data.splits import make_splits
from jaxpref.data.tokenize import load_tokenizer
from jaxpref.errors import InputError

SAMPLE = 64
"""Records of each source that both tokenizers render."""
SHOWN = 12
"""Token ids shown in an error."""
FILES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
    *("tokenizer_config.json", "tekken.json"),
)
"""A model folder has a tokenizer if it has one of these files."""
CURE = "use a model with the same tokenizer"


def check_same_tokenizer(
    tokenizer: Any,
    other: Path,
    data: Sequence[tuple[Sequence[Source], PreferenceDataset]],
    options: DataOptions,
    *,
    name: str,
    kind: Kind = PAIRS,
) -> None:
    """Checks that another model's tokenizer gives the tokens that it will score.

    It must give the same ids for a sample of the records, each rendered by its own chat
    template; have the same BOS and EOS; and have the same text for every token of the
    data.  A model without a chat template is given the one of `tokenizer`.  Special
    tokens that the data does not contain may differ.

    Args:
      tokenizer: the tokenizer of the data, from `load_tokenizer`.
      other: the other model's folder.
      data: each dataset with its sources, by the column `source`.
      options: how the data was read.
      name: the other model, for messages.
      kind: what was read of each record.

    Raises:
      InputError: naming the first text with different ids, or if the folder has no
        tokenizer.  Such a folder is not trusted: wrong IDs would silently
        change every score, and copying the files states that they belong to it.
    """
    own = Path(tokenizer.name_or_path)
    if own == other:
        return
    if not any((other / file).exists() for file in FILES):
        raise InputError(
            f"{name}: the folder has no tokenizer, so nothing shows that its token IDs "
            f"mean the same as those of {own}; if they do, copy tokenizer.json and "
            "tokenizer_config.json there"
        )
    kind = dataclasses.replace(kind, mismatched=False)  # rows of other records
    theirs = load_tokenizer(other)
    if not theirs.chat_template:
        theirs.chat_template = tokenizer.chat_template
    theirs.template_options = options.template_options
    models = _Models(name, str(own))
    _check_ends(tokenizer, theirs, models)
    options = dataclasses.replace(
        options.without_injection(),
        heldout_fraction=0.0,
        max_pairs=None,
        drop_empty=True,
    )
    for sources, dataset in data:
        for number, source in enumerate(sources):
            rows = dataset.columns["row"][dataset.columns["source"] == number]
            sample = _Sample(source, _spread(rows))
            if len(sample):
                _check_rows(tokenizer, theirs, sample, kind, options, models)
        _check_vocabulary(tokenizer, theirs, dataset, models)


@dataclasses.dataclass(frozen=True)
class _Models:
    """The names of the two models, for messages."""

    theirs: str
    own: str


@dataclasses.dataclass(frozen=True)
class _Sample:
    """Some records of a source."""

    source: Source
    rows: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.source[self.rows[index]]

    def location(self, index: int) -> str:
        return self.source.location(self.rows[index])


def _spread(rows: np.ndarray) -> list[int]:
    """At most `SAMPLE` of the rows, evenly spaced."""
    distinct = np.unique(rows)
    count = min(len(distinct), SAMPLE)
    return distinct[np.linspace(0, len(distinct) - 1, count).astype(int)].tolist()


def _check_ends(tokenizer: Any, theirs: Any, models: _Models) -> None:
    """Checks that BOS and EOS are the same."""
    for what, key in (("beginning", "bos"), ("end", "eos")):
        ours, other = (
            (getattr(x, f"{key}_token"), getattr(x, f"{key}_token_id"))
            for x in (tokenizer, theirs)
        )
        if ours != other:
            raise InputError(
                f"{models.theirs}: its {what}-of-sequence token is {_token(*other)}, "
                f"but that of {models.own} is {_token(*ours)}; {CURE}"
            )


def _token(text: str | None, number: int | None) -> str:
    return "none" if text is None else f"{text!r} ({number})"


def _check_rows(
    tokenizer: Any,
    theirs: Any,
    sample: _Sample,
    kind: Kind,
    options: DataOptions,
    models: _Models,
) -> None:
    """Checks that both tokenizers give the same ids for the sampled records."""
    make = lambda tok: make_splits(sample, tok, options, kind=kind)
    ours = make(tokenizer).train
    try:
        other = make(theirs).train
    except InputError as error:
        raise InputError(
            f"{models.theirs}: its tokenizer cannot be used for the data ({error}); "
            f"{CURE}"
        ) from None
    at = {name: n for n, name in enumerate(other.ids.tolist())}
    for n, name in enumerate(ours.ids.tolist()):
        place = sample.location(int(ours.columns["row"][n]))
        if name not in at:
            raise InputError(
                f"{place}: the tokenizer of {models.theirs} drops it, but that of "
                f"{models.own} does not; {CURE}"
            )
        for mine, its in zip(_parts(ours, n), _parts(other, at[name])):
            if mine != its:
                raise _differ(mine, its, tokenizer, place, models)


def _parts(dataset: PreferenceDataset, index: int) -> Iterator[list[int]]:
    """The tokens of the prompts and of each completion."""
    yield dataset.prompt(index).tolist()
    for side in range(dataset.num_completions):
        yield dataset.side_prompt(index, side).tolist()
        yield dataset.completion(index, side).tolist()


def _differ(
    mine: list[int], its: list[int], tokenizer: Any, place: str, models: _Models
) -> InputError:
    """The error for two lists of ids, which shows the text where they differ."""
    same = (a == b for a, b in zip(mine, its))
    first = next((n for n, x in enumerate(same) if not x), min(len(mine), len(its)))
    part = slice(max(0, first - 2), max(0, first - 2) + SHOWN)
    text = tokenizer.decode(mine[part] or mine[-SHOWN:])
    return InputError(
        f"{place}: {text!r} is {_shortened(mine, part)} for {models.own}, but "
        f"{_shortened(its, part)} for {models.theirs}, so it would score other text; "
        f"{CURE}"
    )


def _shortened(ids: list[int], part: slice) -> str:
    before = ["..."] * bool(part.start)
    after = ["..."] * (len(ids) > part.stop)
    return f"[{', '.join([*before, *map(str, ids[part]), *after])}]"


def _check_vocabulary(
    tokenizer: Any, theirs: Any, dataset: PreferenceDataset, models: _Models
) -> None:
    """Checks that every token of the data is the same text in both vocabularies."""
    ids = np.unique(dataset.tokens).tolist()
    words = zip(ids, *(_words(x, ids) for x in (tokenizer, theirs)))
    for number, mine, its in words:
        if mine != its:
            raise InputError(
                f"{models.theirs}: its token {number} is {its!r}, but that of "
                f"{models.own} is {mine!r}, and the data contains it; {CURE}"
            )


def _words(tokenizer: Any, ids: list[int]) -> list[str | None]:
    size = len(tokenizer)
    known = iter(tokenizer.convert_ids_to_tokens([x for x in ids if x < size]))
    return [next(known) if x < size else None for x in ids]
