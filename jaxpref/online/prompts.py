"""The prompts that are answered in training, and room for their answers."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpref import data
from jaxpref.data.bad_rows import BadRow
from jaxpref.data.mixing import read_mixture
from jaxpref.data.records import prompt_key
from jaxpref.errors import InputError
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.hub import resolve_folder
from jaxpref.online.options import SamplingOptions
from jaxpref.runtime.processes import log
from jaxpref.train.config import TrainConfig


def file_of(config: TrainConfig) -> str:
    """The file with the prompts of a run.

    Raises:
      InputError: if there are several.
    """
    names = list(read_mixture(config.data).names)
    if len(names) > 1:
        raise InputError(
            f"{len(names)} files with prompts, {' '.join(names)}: give one"
        )
    return names[0]


def read(
    file: str, config: TrainConfig, sampling: SamplingOptions
) -> tuple[list[data.Prompt], list[BadRow]]:
    """The different prompts of a file, in its order, and the rows that are skipped.

    Longer ones are cut, so that each leaves room for an answer; the log says how many.

    Raises:
      InputError: if there are none, or the model has too few positions.
    """
    folder = resolve_folder(config.model)
    positions = read_architecture(folder).context_length
    if positions < sampling.max_new_tokens + 2:
        raise InputError(
            f"--max-new-tokens {sampling.max_new_tokens}: the model has {positions} "
            "positions, for prompt and answer together"
        )
    options = config.options
    most = positions - sampling.max_new_tokens
    prompts, skipped = data.read_prompts(
        data.open_records(file, options, sides=2),
        data.load_tokenizer(folder, options.template_options),
        max_prompt_length=most,
        ignore_fields=options.ignore_fields,
        on_bad_row=options.on_bad_row,
    )
    if not prompts:
        raise InputError(f"{file}: contains no prompts")
    if cut := sum(x.is_cut for x in prompts):
        log(
            f"warning: {cut:,} of {len(prompts):,} prompts of {file} are cut to {most} "
            "tokens to leave room for an answer"
        )
    return prompts, skipped


def digest(records: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 (hex) of records, which rewards may read."""
    lines = (json.dumps(dict(x), sort_keys=True, default=str) for x in records)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def warn_of_shared(
    heldout: Sequence[data.Prompt], train: Sequence[data.Prompt], file: str
) -> None:
    """Warns if prompts to evaluate on are also trained on."""
    seen = {prompt_key(x.example.prompt) for x in train}
    if shared := sum(prompt_key(x.example.prompt) in seen for x in heldout):
        log(
            f"warning: {shared:,} of {len(heldout):,} prompts of --eval-data {file} "
            "are also trained on"
        )


def with_room(
    prompts: Sequence[data.Prompt],
    sampling: SamplingOptions,
    numbers: Sequence[Mapping[str, float]],
) -> data.PreferenceDataset:
    """The prompts as data, with answers of the maximum length, all token 0.

    So the layout of a run has room for any answers.

    Args:
      prompts: the prompts.
      sampling: how many answers there are, and their maximum length.
      numbers: what an objective reads of each record.
    """
    builder = data.DatasetBuilder(0)
    for row, (prompt, own) in enumerate(zip(prompts, numbers, strict=True)):
        id = f"{digest([prompt.source_record])[:16]}-1"
        builder.add(prompt.tokens, (), id=id, columns={"row": row, **own})
    return with_answers(builder.build(), sampling)


def with_answers(
    records: data.PreferenceDataset, sampling: SamplingOptions
) -> data.PreferenceDataset:
    """The records with K further completions of the maximum length, all token 0."""
    count, tokens = sampling.group_size, sampling.max_new_tokens
    given = records.num_completions
    before = count * tokens * np.arange(len(records) + 1)
    # Pages of zeros that are never written take no memory.
    room = np.zeros(len(records.tokens) + before[-1], np.int32)
    places = np.arange(len(records.tokens))
    places += np.repeat(before[:-1], records.packed_lengths)
    room[places] = records.tokens
    trained = None
    if records.trained is not None:
        trained = np.ones(len(room), bool)
        trained[places] = records.trained
    wide = records.widened(given + count)
    lengths = wide.completion_lengths.copy()
    lengths[:, given:] = tokens
    return dataclasses.replace(
        wide,
        tokens=room,
        trained=trained,
        offsets=records.offsets + before,
        completion_lengths=lengths,
    )
