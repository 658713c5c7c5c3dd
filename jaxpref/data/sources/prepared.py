"""Prepared TFDS datasets: which folder a name means, and whether it is safe to read.

TFDS imports the module of every feature class that `features.json` names.  A dataset
could thereby run its own code, so the names are checked before TFDS reads the file.
Datasets are always read from their folder: by name, TFDS would run the dataset's
preparation code, which for community datasets it even downloads.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxpref.errors import InputError, first_line

FEATURES = {
    f"tensorflow_datasets.core.features.{name}"
    for name in (
        "class_label_feature.ClassLabel",
        "feature.Tensor",  # in old files
        "features_dict.FeaturesDict",
        "scalar.Scalar",
        "sequence_feature.Sequence",
        "tensor_feature.Tensor",
        "text_feature.Text",
        "translation_feature.Translation",
        "translation_feature.TranslationVariableLanguages",
    )
}
"""The feature classes that are read: text and numbers.  Preference data has no others;
images, audio and video would be passed to decoders that are not made for hostile files.
"""
_CLASS_KEYS = {"type", "pythonClassName", "python_class_name"}
_LARGEST = 10_000_000  # bytes of features.json
_NAME = re.compile(r"(\w[\w.-]*)(?:/(\w[\w.+-]*))?(?::([\d.*]+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


def prepared_folder(name: str, data_dir: str | None) -> Any:
    """The folder of a prepared dataset, an `epath.Path`.

    Args:
      name: NAME[/CONFIG][:VERSION].  `*` may stand for a part of the version; without
        one, the newest is used.  Without CONFIG, the default or the only one is used.
      data_dir: the folder of all prepared datasets (default: that of TFDS, which
        `TFDS_DATA_DIR` names).

    Raises:
      InputError: if there is no such folder.
    """
    from etils import epath

    parts = _NAME.fullmatch(name)
    if parts is None:
        raise InputError(
            f"tfds:{name}: cannot be opened; expected tfds:NAME[/CONFIG][:VERSION], "
            "spelled as its folder is named, in upper and lower case"
        )
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = epath.Path(data_dir or default).expanduser() / parts[1]
    config = parts[2] or ""
    if not config and not _versions(root):
        config = _default_config(root)
    pattern = re.compile(re.escape(parts[3] or "*.*.*").replace(r"\*", r"\d+"))
    found = [v for v in _versions(root / config) if pattern.fullmatch(v)]
    if not found:
        raise InputError(
            f"tfds:{name}: cannot be opened; {root / config} holds no prepared version."
            f" Prepare it once (`tfds build {parts[1]} --file_format=array_record`)"
            " and give its data_dir"
        )
    return root / config / max(found, key=lambda v: [*map(int, v.split("."))])


def _versions(folder: Any) -> list[str]:
    if not folder.is_dir():
        return []
    found = [child.name for child in folder.iterdir()]
    return [name for name in found if _VERSION.fullmatch(name)]


def _default_config(root: Any) -> str:
    """The config that TFDS noted as the default, or else the only one."""
    try:
        noted = json.loads((root / ".config" / "metadata.json").read_text())
        if re.fullmatch(r"\w[\w.+-]*", noted["default_config_name"]):
            return noted["default_config_name"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    children = [*root.iterdir()] if root.is_dir() else []
    configs = sorted(child.name for child in children if _versions(child))
    if len(configs) > 1:
        raise InputError(
            f"tfds:{root.name}: cannot be opened without a config; choose one of "
            f"{', '.join(f'tfds:{root.name}/{c}' for c in configs)}"
        )
    return configs[0] if configs else ""


def check_features(folder: str | Path) -> None:
    """Checks that reading `features.json` imports only feature classes of TFDS itself.

    Raises:
      InputError: if it names another class, or cannot be read.
    """
    from etils import epath

    path = epath.Path(folder) / "features.json"
    try:
        if path.stat().length > _LARGEST:
            raise ValueError(f"larger than {_LARGEST // 10**6} MB")
        content = json.loads(path.read_text(), object_pairs_hook=_Pairs)
        names = set(_class_names(content))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: cannot be read ({first_line(error)}); prepare the dataset again"
        ) from None
    for name in sorted(map(str, names - FEATURES)):
        known = ", ".join(sorted({name.rpartition(".")[2] for name in FEATURES}))
        raise InputError(
            f"{path}: names the feature class {name[:100]!r}, but a dataset may not "
            f"bring its own code; only these classes of TFDS are read: {known}. Convert"
            " the dataset to JSON Lines"
        )


class _Pairs(list):
    """A JSON object as pairs, so that no repeated key is lost."""


def _class_names(content: Any) -> Iterator[Any]:
    """Everything that TFDS could take for the name of a class.

    Old files have JSON in strings, so every string that is JSON is searched, too.
    """
    if isinstance(content, _Pairs):
        for key, value in content:
            if key in _CLASS_KEYS and not isinstance(value, _Pairs):
                yield value if isinstance(value, str) else json.dumps(value)
            yield from _class_names(value)
    elif isinstance(content, list):
        for item in content:
            yield from _class_names(item)
    elif isinstance(content, str) and content.lstrip()[:1] in ("{", "[", '"'):
        try:
            inside = json.loads(content, object_pairs_hook=_Pairs)
        except ValueError:
            return  # not JSON, so TFDS cannot read it either
        yield from _class_names(inside)
