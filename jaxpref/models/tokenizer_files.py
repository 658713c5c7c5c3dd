"""The files of a tokenizer in the folder of an exported model."""

import shutil
from collections.abc import Collection
from pathlib import Path

from jaxpref.files import read_json
from jaxpref.models.hub import TOKENIZER_FILES
from jaxpref.models.reward import Padding
from jaxpref.models.tensor_files import write_json

COPIED = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    *TOKENIZER_FILES,
)
"""Files that are copied from the source folder into a saved one."""


def copy_tokenizer(source: Path | None, folder: Path, padding: Padding | None) -> None:
    """Copies the tokenizer of a model folder, with another padding token if given."""
    if source is not None:
        for name in COPIED:
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)
    if padding is not None:
        _set_pad_token(folder, padding)


def _set_pad_token(folder: Path, padding: Padding) -> None:
    """Sets the padding token in the tokenizer files that lack or contradict it."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path := folder / name).exists():
            fields = read_json(path)
            written = name == "tokenizer_config.json" or "pad_token" in fields
            token = fields.get("pad_token")
            if isinstance(token, dict):  # as in older files
                token = token["content"]
            if written and token != padding.token:
                write_json(path, fields | {"pad_token": padding.token})


def add_stop_tokens(folder: Path, stop_tokens: Collection[int]) -> None:
    """Adds the stop tokens that the folder lacks to `generation_config.json`."""
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    stated = generation.get("eos_token_id")
    if stated is None:
        stated = read_json(folder / "config.json").get("eos_token_id")
    known = stated if isinstance(stated, list) else [stated] * (stated is not None)
    if missing := [token for token in stop_tokens if token not in known]:
        write_json(path, generation | {"eos_token_id": [*known, *missing]})
