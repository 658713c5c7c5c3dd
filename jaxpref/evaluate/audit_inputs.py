"""What an audit reads: the pairs of a file, and what models say of them."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxpref import data
from jaxpref.data import DataOptions, PreferenceDataset
from jaxpref.data.bad_rows import BadRow, log_skipped
from jaxpref.data.kinds import LABELED
from jaxpref.data.shared_prompts import grouped_keys
from jaxpref.errors import InputError
from jaxpref.evaluate import features
from jaxpref.evaluate.audit_config import AuditConfig
from jaxpref.evaluate.audit_records import (
    RenamedSource,
    example_at,
    named_annotators,
    texts_of,
)
from jaxpref.evaluate.judges import Part
from jaxpref.models import Model, Numerics, RewardModel, build
from jaxpref.models.architecture import Architecture
from jaxpref.models.folder import load_params
from jaxpref.models.folder_config import (
    is_reward_model,
    read_architecture,
    read_head,
)
from jaxpref.models.hub import resolve_folder, weights_digest
from jaxpref.models.reward import check_one_reward
from jaxpref.models.reward_head import Head
from jaxpref.runtime.mesh import check_rows, make_mesh, rows_for
from jaxpref.runtime.precision import default_compute_dtype
from jaxpref.runtime.processes import log
from jaxpref.scoring.checks import check_fits


@dataclasses.dataclass(frozen=True)
class Opened:
    """An opened preference file, with the pairs that can be judged."""

    name: str
    """The file, as the user gave it."""
    source: RenamedSource
    pairs: PreferenceDataset
    report: dict[str, int]
    """Counts of rows read and dropped."""
    skipped: tuple[BadRow, ...]
    """Malformed rows."""

    def texts(self, n: int) -> dict[str, str]:
        """`prompt`, `chosen` and `rejected` of pair n."""
        return texts_of(example_at(self.source, int(self.pairs.columns["row"][n])))


def open_pairs(
    name: str, config: AuditConfig, folder: Path, annotator_field: str | None
) -> Opened:
    """Reads and tokenizes a preference file.

    Args:
      name: the file or dataset.
      config: the options.
      folder: the language model's folder.
      annotator_field: the field that names the annotator; None for the default.

    Raises:
      InputError: if it has no pairs, or several traces per answer, or holds single
        answers.
    """
    if data.first_kind(name, config) == LABELED:
        raise InputError(
            f"{name}: holds single answers with labels, but an audit judges which of "
            "two answers is better; compare the labels with a model's rewards by "
            "jaxpref evaluate, which writes both for every answer, or write pairs"
        )
    source = named_annotators(
        data.open_records(name, config, sides=2),
        annotator_field,
        config.ignore_fields,
    )
    plan = _tokenized(source, config, folder, whole_turns=False)
    pairs = plan.train
    rows, first = np.unique(pairs.columns["row"], return_index=True)
    if len(rows) < len(pairs):
        twice = np.setdiff1d(np.arange(len(pairs)), first)[0]
        raise InputError(
            f"{name} row {pairs.columns['row'][twice] + 1}: has several traces "
            "per answer; an audit judges each record once, so keep only one trace"
        )
    plan.fields.read_too(config.source_field)
    for line in (plan.describe(), plan.fields.describe(), *plan.fields.warnings()):
        log(f"{name}: {line}")
    log_skipped(plan.skipped)
    plan.fields.check_mapped(config.mapped)
    plan.fields.check_rendered(config.template_options, name)
    return Opened(name, source, pairs, plan.report, plan.skipped)


def part_of(opened: Opened, config: AuditConfig, folder: Path) -> Part:
    """The texts of pairs, their features, and their rewards if there is a model."""
    pairs, source = opened.pairs, opened.source
    examples = [example_at(source, int(row)) for row in pairs.columns["row"]]
    texts = [texts_of(example) for example in examples]
    return Part(
        features.features_of(
            _outputs(opened.name, pairs, config, folder, _language_model), pairs
        ),
        [text["prompt"] for text in texts],
        [(text["chosen"], text["rejected"]) for text in texts],
        grouped_keys(example.prompt for example in examples),
        _rewards(opened, config) if config.reward_model else None,
    )


def reward_folder(config: AuditConfig) -> Path:
    """The folder of the reward model.

    Raises:
      InputError: if it holds another model.
    """
    folder = resolve_folder(str(config.reward_model))
    if not is_reward_model(folder):
        raise InputError(
            f"--reward-model {config.reward_model}: holds a language model; name a "
            "reward model, such as the export of a run with --loss bradley_terry"
        )
    check_one_reward(read_head(folder), f"--reward-model {config.reward_model}")
    return folder


def _rewards(opened: Opened, config: AuditConfig) -> Float[np.ndarray, "pairs 2"]:
    """The reward of each answer.

    The reward model may have another tokenizer and a shorter context.  Answers that
    are equal up to the maximum length, as it reads them, get equal rewards.
    """
    folder = reward_folder(config)
    positions = read_architecture(folder).context_length
    if config.max_length is not None and config.max_length > positions:
        config = dataclasses.replace(config, max_length=None, max_prompt_length=None)
    read = _tokenized(opened.source, config, folder, whole_turns=True).train
    make = functools.partial(_reward_model, head=read_head(folder))
    values = _outputs(opened.name, read, config, folder, make)[..., 0]
    place = {int(row): n for n, row in enumerate(read.columns["row"])}
    found = np.zeros((len(opened.pairs), 2))
    for n, row in enumerate(opened.pairs.columns["row"]):
        if int(row) in place:
            found[n] = values[place[int(row)]]
    return found


def _tokenized(
    source: RenamedSource, config: AuditConfig, folder: Path, *, whole_turns: bool
) -> data.Splits:
    options = DataOptions(
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        heldout_fraction=0.0,
        # An audit expects empty answers; pairs that cannot be judged are counted.
        drop_empty=True,
        **config.for_other(),
    )
    positions = read_architecture(folder).context_length
    return data.make_splits(
        source,
        data.load_tokenizer(folder, config.template_options),
        data.for_model(options, positions),
        whole_turns=whole_turns,
    )


def _language_model(
    architecture: Architecture, numerics: Numerics
) -> tuple[Model, Callable, int]:
    """A model, the step that reads its features, and their number."""
    model = build(architecture, numerics)
    return model, features.make_feature_step(model), 2 * architecture.hidden_size + 1


def _reward_model(
    architecture: Architecture, numerics: Numerics, *, head: Head
) -> tuple[RewardModel, Callable, int]:
    """The same for a reward model, whose one column is the reward."""
    model = RewardModel(architecture, numerics, head)
    return model, features.make_reward_step(model), 1


def _outputs(
    name: str,
    pairs: PreferenceDataset,
    config: AuditConfig,
    folder: Path,
    make: Callable[[Architecture, Numerics], tuple[Any, Callable, int]],
) -> np.ndarray:
    """What a model says of each answer, [N, 2, columns]; cached."""
    architecture = read_architecture(folder)
    check_fits([name], pairs, str(folder), architecture)
    dtype = config.compute_dtype or default_compute_dtype()
    mesh = make_mesh(config.mesh)
    check_rows(config.batch_size, 1, mesh)
    with jax.set_mesh(mesh):
        model, step, width = make(architecture, Numerics(compute_dtype=dtype))
        return features.compute(
            pairs,
            step,
            load_params(folder, model),
            source=name,
            folder=Path(config.features or Path(config.out) / "features"),
            digest=weights_digest(folder, dtype),
            width=width,
            batch_size=rows_for(2 * len(pairs), config.batch_size, mesh),
            mesh=mesh,
        )
