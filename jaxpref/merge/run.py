"""`jaxpref merge`: checks the models, merges them, and says what was done."""

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxpref import __version__
from jaxpref.errors import InputError, show
from jaxpref.evaluate import pairs
from jaxpref.evaluate.metrics import accuracy
from jaxpref.files import MODEL, check_output_folder
from jaxpref.merge import greedy
from jaxpref.merge.adapter import AdapterMerge, with_adapter
from jaxpref.merge.arrays import add_task_vectors, slerp, weighted_mean
from jaxpref.merge.inputs import ModelFolder, open_folders
from jaxpref.merge.options import (
    Adapter,
    Greedy,
    Linear,
    MergeConfig,
    Method,
    Slerp,
    Task,
    Weights,
    read_weights,
)
from jaxpref.merge.output import RECORD, Merge, write_merge
from jaxpref.models import weights as model_weights
from jaxpref.models.hub import adapter_digest, model_digests, resolve_folder
from jaxpref.models.tensor_files import INDEX, WEIGHTS
from jaxpref.models.tokenizer_files import COPIED
from jaxpref.runtime.processes import log, only_first_process, together

WRITES = ("config.json", WEIGHTS, INDEX, RECORD, *COPIED)
"""Names of what a merge writes; of several weight files, only the index."""


def run(config: MergeConfig, method: Method) -> None:
    """Merges the models and writes the result to `out`.

    If there are several processes, the first one merges; all of them score pairs.

    Raises:
      InputError: for anything that the caller can fix.
    """
    _check_count(config, method)
    out = _check_out(config, method)
    base = [method.base] if isinstance(method, Task) else []
    folders = open_folders([*config.models, *base])
    models = folders[: len(config.models)]
    trials = _tried(config, method, models, out) if isinstance(method, Greedy) else []
    match method:
        case Greedy():
            merge = _uniform(models, [trial.model for trial in trials if trial.kept])
        case Linear():
            weights = _weights(method, models)
            merge = Merge(models, models[0], weighted_mean, weights)
        case Slerp():
            weights = _weights(method, models)
            merge = Merge(models, models[0], _slerp, weights)
        case Task():
            weights = _weights(method, models)
            merge = Merge(folders[-1:] + models, models[0], _task, weights)
        case Adapter():
            merge = with_adapter(models[0], method.adapter)
    together(lambda: _write(config, method, merge, trials, out))


def _check_count(config: MergeConfig, method: Method) -> None:
    given = len(config.models)
    match method:
        case Slerp():
            fits, needed = given == 2, "exactly two models"
        case Adapter():
            fits, needed = given == 1, "one model"
        case Task():
            fits, needed = given >= 1, "at least one model"
        case _:
            fits, needed = given >= 2, "at least two models"
    if not fits:
        raise InputError(
            f"--models {' '.join(config.models)}: --method {config.method} takes "
            f"{needed}, not {given}"
        )


def _check_out(config: MergeConfig, method: Method) -> Path:
    """Checks the output folder; an earlier merge in it may be replaced."""
    reads = {
        f"--{name}": getattr(method, name, None)
        for name in ("base", "data", "reference", "adapter")
    }
    what = MODEL if (Path(config.out) / RECORD).is_file() else None
    for model in config.models:
        reads["--models"] = model
        check_output_folder("--out", config.out, WRITES, reads, what=what)
    return Path(config.out)


def _weights(method: Linear | Slerp | Task, models: Sequence[ModelFolder]) -> Weights:
    return read_weights(method, len(models), models[0].architecture.num_layers)


def _slerp(tensors: Iterator[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    start, end = tensors
    return slerp(start, end, weights[1])


def _task(tensors: Iterator[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    return add_task_vectors(next(tensors), tensors, weights)


def _uniform(models: Sequence[ModelFolder], kept: Sequence[int]) -> Merge:
    """The mean of some of the models, added up in their order."""
    folders = [models[index] for index in sorted(kept)]
    weights = Weights((1 / len(kept),) * len(kept))
    return Merge(folders, models[0], weighted_mean, weights)


def _tried(
    config: MergeConfig, method: Greedy, models: Sequence[ModelFolder], out: Path
) -> list[greedy.Trial]:
    """Scores every model, and the means that a greedy soup tries."""
    given = {x.name: getattr(method, x.name) for x in dataclasses.fields(method)}
    _, score = pairs.open_pairs(
        pairs.EvaluateConfig(
            model=config.models[0], out=config.out, kind="pairs", **given
        )
    )
    soup = out.resolve().parent / f".{out.resolve().name}.soup"

    def accuracy_of(folder: Path) -> float:
        rewards = score(model_weights.Weights(folder)).rewards
        return accuracy(rewards[:, 0] - rewards[:, 1])

    def accuracy_of_mean(kept: Sequence[int]) -> float:
        merge = _uniform(models, kept)
        together(lambda: write_merge(soup, merge, config.dtype, {}))
        return accuracy_of(soup)

    try:
        alone = []
        for model in models:
            alone.append(accuracy_of(model.path))
            log(f"{model.name}: accuracy {alone[-1]:.4f}")
        return greedy.greedy_soup(alone, accuracy_of_mean)
    finally:
        only_first_process(shutil.rmtree, soup, ignore_errors=True)


def _write(
    config: MergeConfig,
    method: Method,
    merge: Merge | AdapterMerge,
    trials: Sequence[greedy.Trial],
    out: Path,
) -> None:
    """Writes the merged model with its record, and says what was done."""
    folders, weights = [merge.source], Weights((1.0,))
    if isinstance(merge, Merge):
        folders, weights = merge.folders, merge.weights
    record = {
        "jaxpref": __version__,
        "method": config.method,
        "models": [
            {"model": folder.name, "weights_sha256": _weights_digest(folder)}
            for folder in folders
        ],
        "weights": weights.elsewhere,
        "layer_weights": [dataclasses.asdict(block) for block in weights.blocks],
        "dtype": config.dtype,
    }
    if isinstance(method, Adapter):
        digest = adapter_digest(resolve_folder(method.adapter))
        record |= {"adapter": {"adapter": method.adapter, "sha256": digest}}
    if isinstance(method, Task):
        record |= {"base": record["models"].pop(0)}
    if isinstance(method, Greedy):
        record |= {"data": method.data, "reference": method.reference}
        record["trials"] = [
            dataclasses.asdict(trial) | {"model": config.models[trial.model]}
            for trial in trials
        ]
        show(greedy.table(trials, config.models))
    size = write_merge(out, merge, config.dtype, record)
    count = len(record["models"])
    of = f" of {len(config.models)}" if isinstance(method, Greedy) else ""
    listed = " ".join(f"{weight:.4g}" for weight in weights.elsewhere)
    layers = ", and others for layers" if weights.blocks else ""
    models = f"{count}{of} model{'s' if count > 1 or of else ''}"
    show(
        f"{out}: merged {models} ({config.method}, weights {listed}{layers}), "
        f"{size.tensors} tensors, {size.weights:,} weights, {size.bytes:,} bytes"
    )


def _weights_digest(folder: ModelFolder) -> str:
    return model_digests(folder.path)["weights"]
