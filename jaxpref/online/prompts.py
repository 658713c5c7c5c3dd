"""The prompts that are answered in training, and room for their answers."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

import numpy as np

from jaxpref import data
from jaxpref.data.bad_rows import BadRow
from jaxpref.data.mixing import read_mixture
from jaxpref.data.prompts import prompts_and_skipped
from jaxpref.errors import InputError
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.hub import resolve_folder
from jaxpref.online.options import SamplingOptions
from jaxpref.runtime.processes import log
from jaxpref.train.config import TrainConfig


def read(
    config: TrainConfig, sampling: SamplingOptions
) -> tuple[list[data.Prompt], list[BadRow]]:
    """The different prompts of a file, in its order, and the rows that are skipped.

    Longer ones are cut, so that each leaves room for an answer; the log says how many.

    Raises:
      InputError: if there are none, or the model has too few positions.
    """
    names = list(read_mixture(config.data).names)
    if len(names) > 1:
        raise InputError(f"--data {' '.join(names)}: give one file with prompts")
    folder = resolve_folder(config.model)
    positions = read_architecture(folder).context_length
    if positions < sampling.max_new_tokens + 2:
        raise InputError(
            f"--max-new-tokens {sampling.max_new_tokens}: the model has {positions} "
            "positions, for prompt and answer together"
        )
    options = config.options
    most = positions - sampling.max_new_tokens
    prompts, skipped = prompts_and_skipped(
        data.open_records(names[0], options, sides=2),
        data.load_tokenizer(folder, options.template_options),
        max_prompt_length=most,
        ignore_fields=options.ignore_fields,
        on_bad_row=options.on_bad_row,
    )
    if not prompts:
        raise InputError(f"{names[0]}: contains no prompts")
    if cut := sum(x.is_cut for x in prompts):
        log(
            f"warning: {cut:,} of {len(prompts):,} prompts are cut to {most} tokens to "
            "leave room for an answer"
        )
    return prompts, skipped


def digest(prompts: Sequence[data.Prompt]) -> str:
    """SHA-256 (hex) of the records, which rewards may read."""
    lines = (
        json.dumps(dict(x.source_record), sort_keys=True, default=str) for x in prompts
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def with_room(
    prompts: Sequence[data.Prompt],
    name: str,
    kind: data.Kind,
    sampling: SamplingOptions,
    skipped: Sequence[BadRow] = (),
) -> data.Datasets:
    """The prompts as training data, with answers of the maximum length, all token 0.

    So the layout of a run has room for any answers.

    Args:
      prompts: the prompts.
      name: their file.
      kind: what an objective reads of each record.
      sampling: how many answers there are, and their maximum length.
      skipped: the malformed rows of the file.
    """
    count, tokens = sampling.group_size, sampling.max_new_tokens
    builder = data.DatasetBuilder(count)
    for row, prompt in enumerate(prompts):
        own = f"{digest([prompt])[:16]}-1"
        builder.add(prompt.tokens, [()] * count, id=own, columns={"row": row})
    plain = builder.build()
    before = count * tokens * np.arange(len(prompts) + 1)
    # Pages of zeros that are never written take no memory.
    room = np.zeros(len(plain.tokens) + before[-1], np.int32)
    places = np.arange(len(plain.tokens)) + np.repeat(before[:-1], plain.packed_lengths)
    room[places] = plain.tokens
    train = dataclasses.replace(
        plain,
        tokens=room,
        offsets=plain.offsets + before,
        completion_lengths=np.full_like(plain.completion_lengths, tokens),
    )
    splits = data.Splits(
        train=train,
        heldout=train.take(np.arange(0)),
        report={"prompts": len(prompts)},
        digest=digest(prompts),
        kind=kind,
        skipped=tuple(skipped),
    )
    return data.Datasets(splits, (name,), (name,))
