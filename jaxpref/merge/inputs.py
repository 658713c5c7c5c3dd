"""The model folders that are merged, and whether they fit together."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpref.data import load_tokenizer
from jaxpref.data.tokenizers import FILES
from jaxpref.errors import InputError
from jaxpref.models import Architecture
from jaxpref.models.folder import check_folder, open_model
from jaxpref.models.folder_config import is_reward_model, read_head
from jaxpref.models.hub import resolve_folder
from jaxpref.runtime.heartbeat import beat

ROWS = 4096
"""Rows of an embedding that are compared at once."""


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A model folder whose tensors are read one at a time."""

    name: str
    """As the user wrote it."""
    path: Path
    architecture: Architecture
    is_reward_model: bool
    stored: Mapping[str, Any]
    """All tensors of its files by the family's names; indexing reads from disk."""

    @property
    def weights(self) -> list[str]:
        """The names of its parameters: neither a buffer nor a tied LM head."""
        family = self.architecture.family
        tied = {family.tensors["head"].template}
        skipped = tied if self.architecture.tie_word_embeddings else set()
        return [
            name
            for name in self.stored
            if name not in skipped and not name.endswith(family.ignored_tensors)
        ]

    @property
    def buffers(self) -> list[str]:
        """The names of its tensors that are not parameters, such as frequencies."""
        ignored = self.architecture.family.ignored_tensors
        return [name for name in self.stored if name.endswith(ignored)]

    def read(self, tensor: str) -> np.ndarray:
        """One of its tensors, in the stored dtype."""
        beat(f"reading {self.name}: {tensor}")
        return self.stored[tensor][:]


def open_folders(names: Sequence[str]) -> list[ModelFolder]:
    """Opens model folders that are to be merged; reads headers, but no weights.

    Raises:
      InputError: naming the folder that cannot be loaded, or that has another kind of
        model, architecture, tensor, or vocabulary than the first.
    """
    folders = [_opened(name) for name in names]
    first, *others = folders
    for other in others:
        _check_same_model(first, other)
    vocabulary = _vocabulary(first)
    for other in others:
        _check_same_vocabulary(first, vocabulary, other)
    return folders


def _opened(name: str) -> ModelFolder:
    path = resolve_folder(name)
    architecture = check_folder(path)
    folder = ModelFolder(
        name=name,
        path=path,
        architecture=architecture,
        is_reward_model=is_reward_model(path),
        stored=open_model(path, architecture.family),
    )
    if not folder.is_reward_model:
        _check_tied_head(folder)
    return folder


def _check_tied_head(folder: ModelFolder) -> None:
    """Checks that a stored LM head equals the embedding to which it is tied."""
    tensors = folder.architecture.family.tensors
    head, embed = (tensors[name].template for name in ("head", "embed"))
    if not folder.architecture.tie_word_embeddings or head not in folder.stored:
        return
    size = folder.architecture.vocab_size
    for row in range(0, size, ROWS):
        rows = slice(row, min(row + ROWS, size))
        if not np.array_equal(folder.stored[head][rows], folder.stored[embed][rows]):
            raise InputError(
                f"{folder.name}: tensor {head} differs from {embed}, but config.json "
                "says tie_word_embeddings; set it to false"
            )


def _check_same_model(first: ModelFolder, other: ModelFolder) -> None:
    if first.is_reward_model != other.is_reward_model:
        what = {True: "a reward model", False: "a language model"}
        raise InputError(
            f"{other.name}: is {what[other.is_reward_model]}, but {first.name} is "
            f"{what[first.is_reward_model]}; merge models of one kind"
        )
    if first.is_reward_model and read_head(first.path) != read_head(other.path):
        raise InputError(
            f"{other.name}: has another head than the reward model {first.name}; merge "
            "reward models with the same head"
        )
    if type(first.architecture) is not type(other.architecture):
        types = [x.architecture.family.model_type for x in (other, first)]
        raise InputError(
            f"{other.name}: its model_type is {types[0]}, but that of {first.name} is "
            f"{types[1]}; only models of one architecture can be merged"
        )
    for field in dataclasses.fields(first.architecture):
        ours, theirs = (
            getattr(folder.architecture, field.name) for folder in (first, other)
        )
        if ours != theirs and field.name != "initializer_range":
            raise InputError(
                f"{other.name}: config.json says {field.name}={theirs}, but that of "
                f"{first.name} says {ours}; only models of one architecture can be "
                "merged"
            )
    # Their shapes are those of the architecture, which `check_folder` has checked.
    for name in sorted({*first.weights} ^ {*other.weights}):
        one, rest = (first, other) if name in first.stored else (other, first)
        raise InputError(
            f"{rest.name}: has no tensor {name}, but {one.name} has; only models of "
            "one architecture can be merged"
        )


def _vocabulary(folder: ModelFolder) -> dict[str, int]:
    if not any((folder.path / file).exists() for file in FILES):
        raise InputError(
            f"{folder.name}: the folder has no tokenizer, so nothing shows that its "
            "token IDs mean the same as those of the other models; if they do, copy "
            "tokenizer.json and tokenizer_config.json there"
        )
    return load_tokenizer(folder.path).get_vocab()


def _check_same_vocabulary(
    first: ModelFolder, ours: dict[str, int], other: ModelFolder
) -> None:
    theirs = _vocabulary(other)
    if ours == theirs:
        return
    differing = {*ours.items()} ^ {*theirs.items()}
    token = min(differing, key=lambda item: (item[1], item[0]))[0]
    said = [f"{x[token]} in" if token in x else "not in" for x in (theirs, ours)]
    raise InputError(
        f"{other.name}: token {token!r} is {said[0]} its vocabulary, but {said[1]} "
        f"that of {first.name}; merge models with the same vocabulary"
    )
