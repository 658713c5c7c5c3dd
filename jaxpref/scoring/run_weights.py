"""The weights of a run by its folder: its export, or one of its checkpoints."""

import functools
from pathlib import Path
from typing import Any

from jaxpref.errors import InputError
from jaxpref.files import RUN, kind_of, read_json
from jaxpref.models import Model, RewardModel
from jaxpref.models.adapter_config import CONFIG as ADAPTER_CONFIG
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.hub import adapter_digest, model_digests, resolve_folder
from jaxpref.models.lora import LoraOptions
from jaxpref.models.saved import Saved
from jaxpref.models.weights import Weights, head_of, resolve_weights
from jaxpref.runtime.processes import together
from jaxpref.runtime.provenance import Provenance, from_json
from jaxpref.runtime.saved_parts import newest_step, read_meta
from jaxpref.scoring.partition import Trained

CHECKPOINTS = "checkpoints"


def named_weights(model: str, adapter: str | None) -> Weights:
    """The weights that `--model` and `--adapter` name: folders, Hub IDs, or a run.

    Raises:
      InputError: as `run_weights`, or if one cannot be found.
    """
    if (found := run_weights(model)) is None:
        return resolve_weights(model, adapter)
    if adapter is not None:
        raise InputError(
            f"--adapter {adapter}: {model} is a run, with weights of its own; pass the "
            "model that the adapter belongs to"
        )
    return found


def run_weights(name: str) -> Weights | None:
    """The weights of a run, or None if the name is not that of a run.

    Args:
      name: the folder RUN of a run, for its export or else its newest checkpoint, or
        the folder RUN/checkpoints/STEP.

    Raises:
      InputError: if the run has neither, or if its checkpoint cannot be read, is not
        one of a single language or reward model, or belongs to other files.
    """
    run, step = Path(name), None
    if run.parent.name == CHECKPOINTS and run.name.isdecimal() and run.is_dir():
        run, step = run.parent.parent, run
    if not run.is_dir() or kind_of(run) != RUN:
        return None
    if step is None and (run / "export").is_dir():
        return Weights(run / "export")
    if (step := step or newest_step(run / CHECKPOINTS)) is None:
        raise InputError(
            f"{name}: this run has no export and no checkpoint yet; let the same "
            "command continue it, or pass a model folder"
        )
    return _at_step(name, run, step)


def reference_weights(
    reference: str | None, start: Weights, *, flag: str = "--reference"
) -> Weights:
    """The weights that `--reference` or an option like it names.

    Args:
      reference: "start" or None for those before training, "base" for those without
        the initial adapter, the folder or Hub ID of a model, the folder of an
        adapter of the initial model, or what `run_weights` reads.
      start: the weights before training.
      flag: the option, for messages.

    Raises:
      InputError: if there is no such model, or it is a reward model in a checkpoint.
    """
    if reference is None or reference == "start":
        return start
    if reference == "base":
        return Weights(start.folder, quantization=start.quantization)
    if (found := run_weights(reference)) is not None:
        if found.saved is not None and found.saved.is_reward:
            raise InputError(
                f"{flag} {reference}: trains a reward model; name a language model"
            )
        return found
    folder = resolve_folder(reference)
    if (folder / ADAPTER_CONFIG).exists() and not (folder / "config.json").exists():
        return Weights(start.folder, folder, start.quantization)
    return Weights(folder)


def _at_step(name: str, run: Path, step: Path) -> Weights:
    config, meta = _config(name, run), read_meta(step)
    try:
        made_by, dtype = from_json(meta["made_by"]), str(config["param_dtype"])
        start = resolve_weights(config["model"], config["adapter"])
        lora = LoraOptions(**config["lora"])
        # Earlier versions had no soft prompts.
        train, soft = str(config["train"]), config.get("soft_prompt", {})
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{run / 'config.json'}: was written by another version ({error!r}); let "
            "that version finish the run, and pass its export"
        ) from None
    arrays = meta["digests"].keys()
    if any(x.startswith(".params['one']") for x in arrays):
        raise InputError(
            f"{name}: trains two models; let the run finish, and pass its export"
        )
    if any(soft.values()) or ".params['prompt']" in arrays:
        raise InputError(
            f"{name}: trains a soft prompt; let the run finish, and pass its model "
            "with --adapter RUN/adapter"
        )
    is_reward = ".params['score']" in arrays
    if is_reward and (config.get("head", {}).get("kind") or not _one_reward(config)):
        raise InputError(
            f"{name}: trains a reward model with another head; let the run finish, and "
            "pass its export"
        )
    kind = Model
    if is_reward:
        kind = functools.partial(RewardModel, head=head_of(Weights(start.folder)))
    # Adapters of quantized weights are added to the folder's own, as in the export.
    trained = Trained(train=train, lora=lora, start=start)
    partition = trained.partition(kind(read_architecture(start.folder)))
    together(lambda: _check_start(name, start, made_by, whole=partition is None))
    saved = Saved(step, meta["digest"], partition, dtype, is_reward)
    return Weights(start.folder, saved=saved)


def _one_reward(config: dict[str, Any]) -> bool:
    """Whether a run's objective trains rewards, and no ratings or embeddings."""
    objective = str(config.get("objective"))
    others = "attribute_regression", "general_preference"
    return not any(name in objective for name in others)


def _config(name: str, run: Path) -> dict[str, Any]:
    if not (run / "config.json").exists():
        raise InputError(
            f"{name}: the run has no config.json; copy it with the checkpoints"
        )
    return read_json(run / "config.json")


def _check_start(
    name: str, start: Weights, made_by: Provenance, *, whole: bool
) -> None:
    """Checks that the files which the run began with, and are read, are the same.

    Args:
      name: the run, for messages.
      start: the files.
      made_by: what the run began with.
      whole: whether it trains everything, so the initial weights are not read.
    """
    now = model_digests(start.folder)
    if start.adapter is not None:
        now["adapter"] = adapter_digest(start.adapter)
    if whole:
        del now["weights"]
    for part, digest in now.items():
        recorded = made_by.contents.get(f"the {part} of the model")
        if recorded is None or recorded.digest != digest:
            raise InputError(
                f"{name}: the {part} of {start.folder} has changed since the run began "
                "with it; put it back, or pass the run's export once it has finished"
            )
