"""A model's folder, by path or by its id on the Hugging Face hub."""

from pathlib import Path

from jaxpref.errors import InputError

_WANTED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


def resolve_folder(model: str) -> Path:
    """The local folder of a model, downloaded first where `model` is a hub id.

    Weights in other formats than safetensors are never downloaded, nor is code.

    Raises:
      InputError: if there is no such folder and the hub does not give one.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{model}: is a file; give the folder that holds config.json")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputError(f"{model}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=_WANTED))
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise InputError(
            f"{model}: no such folder, and the hub gave no model of that name ({reason})"
        ) from error
