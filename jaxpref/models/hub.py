"""Finding a model's folder by path or by its ID on the Hugging Face Hub."""

import functools
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jaxpref.errors import InputError, first_line
from jaxpref.files import check_regular

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that decide what text becomes which tokens."""

_WANTED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


def resolve_folder(model: str) -> Path:
    """The local folder of a model, which is downloaded if `model` is a Hub ID.

    Only safetensors weights are downloaded, and never code.

    Raises:
      InputError: if there is neither such a folder nor such a model on the Hub.
    """
    folder = Path(model)
    if folder.is_dir():
        for pattern in _WANTED:
            for path in sorted(folder.glob(pattern)):
                check_regular(path)
        return folder
    if folder.exists():
        raise InputError(
            f"{model}: is a file; pass the folder that contains config.json"
        )
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputError(f"{model}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=_WANTED))
    except Exception as error:
        raise InputError(
            f"{model}: no such folder, and not downloaded from the Hugging Face Hub "
            f"({first_line(error)})"
        ) from error


def model_digests(folder: Path) -> dict[str, str]:
    """SHA-256 (hex) of the parts of a model folder: config.json, weights, tokenizer."""
    tokenizer = [folder / name for name in TOKENIZER_FILES]
    tokenizer += sorted(folder.glob("additional_chat_templates/*.jinja"))
    return {
        "config.json": _digest_of([folder / "config.json"]),
        "weights": _digest_of(sorted(folder.glob("*.safetensors"))),
        "tokenizer": _digest_of(tokenizer),
    }


def adapter_digest(folder: Path) -> str:
    """SHA-256 (hex) of an adapter's folder: its config and weights."""
    return _digest_of([folder / "adapter_config.json", *folder.glob("*.safetensors")])


def weights_digest(folder: Path, dtypes: str, adapter: Path | None = None) -> str:
    """SHA-256 (hex) of a model's config, weights, adapter and dtypes."""
    found = model_digests(folder)
    if adapter is not None:
        dtypes += f"\n{adapter_digest(adapter)}"
    text = f"{dtypes}\n{found['config.json']}\n{found['weights']}"
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_of(paths: list[Path]) -> str:
    """SHA-256 of the names and contents of the files that exist."""
    found = [(path, path.stat()) for path in paths if path.exists()]
    digest_of = lambda entry: _file_digest(
        entry[0], (entry[1].st_ino, entry[1].st_size, entry[1].st_mtime_ns)
    )
    with ThreadPoolExecutor(8) as pool:  # hashing does not hold Python's lock
        digests = list(pool.map(digest_of, found))
    lines = [f"{path.name} {digest}\n" for (path, _), digest in zip(found, digests)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@functools.lru_cache(256)
def _file_digest(path: Path, version: tuple[int, ...]) -> str:
    """SHA-256 of a file; read once per process, and again if its `version` changes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
