"""Opens data of any supported kind by its name."""

import dataclasses
import glob
import re
import urllib.parse
from collections.abc import Callable
from pathlib import Path

from jaxpref.data.sources import external
from jaxpref.data.sources.array_records import SUFFIXES as ARRAY_RECORD
from jaxpref.data.sources.array_records import ArrayRecords
from jaxpref.data.sources.arrow import ARROW, PARQUET, open_arrow, open_parquet
from jaxpref.data.sources.contents import COMPRESSIONS
from jaxpref.data.sources.csv_files import DELIMITERS, open_csv
from jaxpref.data.sources.json_files import LINES, open_json
from jaxpref.data.sources.remote import copied, find_urls, is_url
from jaxpref.data.sources.source import Joined, Source
from jaxpref.errors import InputError
from jaxpref.files import check_regular

TEXTS = (*LINES, ".json", *DELIMITERS)
"""Suffixes of files that may be compressed."""
SUFFIXES = (
    *(f"{text}{end}" for text in TEXTS for end in ("", *COMPRESSIONS)),
    *(*PARQUET, *ARROW, *ARRAY_RECORD),
)
_KINDS = (
    "a .jsonl, .json, .csv, .tsv, .parquet, .arrow or .array_record file (the first"
    " four also as .gz or .zst), a folder of them, a folder written by"
    " datasets.save_to_disk or by TFDS, hf:OWNER/NAME, or tfds:NAME"
)
_SPLIT = re.compile(
    r"(?:^|[/_.-])(train|test|validation|valid|val|dev|eval)(?:[/_.-]|$)"
)


@dataclasses.dataclass(frozen=True)
class _Options:
    """What may follow a name after "?"."""

    split: str | None = None
    data_dir: str | None = None
    revision: str | None = None

    def refuse(self, name: str, why: str, *fields: str) -> None:
        """Raises InputError if one of the fields is given."""
        for field in fields:
            value = getattr(self, field)
            if value is not None:
                raise InputError(f"{name}: {why}; leave out {field} {value!r}")


def open_source(
    data: str | Path,
    *,
    split: str | None = None,
    data_dir: str | None = None,
    revision: str | None = None,
) -> Source:
    """Opens preference data of any supported kind.

    Args:
      data: one of
        - a file: .jsonl, .ndjson, .json, .csv or .tsv, each also as .gz or .zst;
          .parquet; .arrow; .array_record with JSON records;
        - several files of one kind: a pattern such as "pairs/*.jsonl", or a folder;
        - the URL of a file, or a pattern of URLs: "gs://bucket/pairs-*.parquet";
        - a folder written by `datasets.save_to_disk`, or of a prepared TFDS dataset;
        - "hf:OWNER/NAME", "hf:OWNER/NAME:CONFIG" or a bare OWNER/NAME for the Hugging
          Face hub;
        - "tfds:NAME" or "tfds:NAME/CONFIG:VERSION".
        "?split=test", "?data_dir=DIR" and "?revision=COMMIT" (or several with "&") may
        follow any name but that of a single file.
      split: the split of a dataset that has splits (default: "train"); an error for
        others.  Files in a folder belong to the split that their names contain.
      data_dir: where a TFDS dataset was prepared, or the folder inside a hub dataset
        (Anthropic/hh-rlhf has "helpful-base"); an error for others.
      revision: the commit, branch or tag of a hub dataset; an error for others.

    Raises:
      InputError: if there is nothing usable, or an optional package is missing.
    """
    text = str(data)
    options = _Options(split, data_dir, revision)
    if is_url(text):
        options.refuse(text, "it is a file", "split", "data_dir", "revision")
        return _join(find_urls(text), lambda url: _open_file(copied(url), url))
    if "?" in text and not _exists(text):
        text, options = _after_question_mark(text, options)
    if text.startswith("tfds:"):
        options.refuse(text, "TFDS has versions instead", "revision")
        return external.open_tfds(
            text[5:], split=options.split or "train", data_dir=options.data_dir
        )
    if text.startswith("hf:"):
        return _open_hub(text[3:], options)
    if _exists(text):
        options.refuse(text, "it is on disk", "data_dir", "revision")
        path = Path(text)
        if path.is_dir():
            return _open_folder(path, options.split)
        options.refuse(text, "a file has no splits", "split")
        return _open_file(path, text)
    if {"*", "["} & set(text):
        options.refuse(text, "a pattern names files", "split", "data_dir", "revision")
        files = sorted(glob.glob(text, recursive=True))
        if not files:
            raise InputError(f"{text}: no file matches this pattern; check it")
        return _join(files, lambda name: _open_file(Path(name), name))
    looks_like_hub_id = (
        text.count("/") == 1
        and not text.startswith((".", "/", "~"))
        and not text.endswith(SUFFIXES)
        and not _exists(text.split("/")[0])
    )
    if looks_like_hub_id:
        return _open_hub(text, options)
    raise InputError(f"{text}: no such file or folder; give {_KINDS}")


def _after_question_mark(text: str, options: _Options) -> tuple[str, _Options]:
    name, _, query = text.partition("?")
    given = dict(urllib.parse.parse_qsl(query))
    known = {field.name for field in dataclasses.fields(_Options)}
    if not given or given.keys() - known:
        raise InputError(
            f"{text}: only split=NAME, data_dir=DIR and revision=COMMIT may follow '?'"
        )
    return name, dataclasses.replace(options, **given)


def _open_hub(name: str, options: _Options) -> Source:
    return external.open_hub(
        name,
        split=options.split or "train",
        data_dir=options.data_dir,
        revision=options.revision,
    )


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError) as error:
        raise InputError(f"{text[:200]}: cannot be read ({error})") from None


def _open_folder(path: Path, split: str | None) -> Source:
    for file in path.rglob("*"):
        if not file.is_dir():
            check_regular(file)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return external.open_saved(path, split=split)
    if (path / "features.json").is_file():
        return external.open_tfds_folder(path, split=split or "train")
    return _join(_of_split(path, split), lambda name: _open_file(Path(name), name))


def _of_split(folder: Path, split: str | None) -> list[str]:
    """The data files of one split in a folder; of all if their names have no split."""
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.name.endswith(SUFFIXES) and not _hidden(file.relative_to(folder))
    )
    if not files:
        raise InputError(f"{folder}: this folder holds no dataset; give {_KINDS}")
    kinds = sorted({_suffix(file.name) for file in files})
    if len(kinds) > 1:
        raise InputError(
            f"{folder}: holds files of several kinds ({', '.join(kinds)}); give a"
            f" pattern, such as {folder}/*{kinds[0]}"
        )
    splits: dict[str, list[str]] = {}
    for file in files:
        found = _SPLIT.search(str(file.relative_to(folder)).lower())
        splits.setdefault(found[1] if found else "", []).append(str(file))
    names = ", ".join(sorted(name for name in splits if name))
    if not names:
        if split is not None:
            raise InputError(
                f"{folder}: the names of its files have no splits; leave out split"
                f" {split!r}"
            )
        return splits[""]
    wanted = split or "train"
    if wanted not in splits:
        raise InputError(f"{folder}: no split {wanted!r}; it has {names}")
    if "" in splits:
        raise InputError(
            f"{folder}: some names of its files have a split ({names}), and"
            f" {Path(splits[''][0]).name} has none; give a pattern"
        )
    return splits[wanted]


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _join(names: list[str], open_one: Callable[[str], Source]) -> Source:
    parts = [open_one(name) for name in names]
    return parts[0] if len(parts) == 1 else Joined(parts)


def _suffix(name: str) -> str:
    """The kind of a file: ".jsonl" for pairs.jsonl.gz."""
    for end in COMPRESSIONS:
        name = name.removesuffix(end)
    return Path(name).suffix


def _open_file(path: Path, name: str) -> Source:
    suffix = _suffix(path.name)
    if not path.name.endswith(SUFFIXES):
        raise InputError(f"{name}: unknown kind of file; give {_KINDS}")
    if suffix in PARQUET:
        source: Source = open_parquet(path, name)
    elif suffix in ARROW:
        source = open_arrow(path, name)
    elif suffix in ARRAY_RECORD:
        source = ArrayRecords(path, name)
    elif suffix in DELIMITERS:
        source = open_csv(path, name, suffix)
    else:
        source = open_json(path, name)
    if not len(source):
        raise InputError(f"{name}: holds no records")
    return source
