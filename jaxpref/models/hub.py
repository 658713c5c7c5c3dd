"""Finding a model's folder by path or by its ID on the Hugging Face Hub."""

import hashlib
from pathlib import Path

from jaxpref.errors import InputError, first_line
from jaxpref.models.config_json import read_json

_WANTED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


def resolve_folder(model: str) -> Path:
    """The local folder of a model, which is downloaded if `model` is a Hub ID.

    Only safetensors weights are downloaded, and never code.

    Raises:
      InputError: if there is neither such a folder nor such a model on the Hub.
    """
    folder = Path(model)
    if folder.is_dir():
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
            f"{model}: no such folder, and no such model on the Hugging Face Hub "
            f"({first_line(error)})"
        ) from error


def weights_digest(folder: Path, dtypes: str) -> str:
    """SHA-256 (hex) of a model's config, weights and dtypes."""
    digest = hashlib.sha256(dtypes.encode())
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def stop_tokens(folder: Path) -> tuple[int, ...]:
    """The token ids that end a completion: one or several `eos_token_id`.

    Read from `generation_config.json`, or from `config.json` if it has none.

    Raises:
      InputError: if one of the files is malformed.
    """
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.exists():
            found = read_json(path).get("eos_token_id")
            if found is not None:
                tokens = found if isinstance(found, list) else [found]
                if not all(type(token) is int for token in tokens):
                    raise InputError(
                        f"{path}: field eos_token_id is {found!r}; give a token id "
                        "or a list of them"
                    )
                return tuple(tokens)
    return ()
