"""Digests of the files that a run computes with, for its checkpoints."""

import hashlib
import json
from collections.abc import Mapping

import jax

from jaxpref.data.end_of_turn import read_stop_tokens
from jaxpref.data.read import Datasets
from jaxpref.models.hub import adapter_digest, model_digests
from jaxpref.models.logprobs import REFERENCE
from jaxpref.models.weights import Weights
from jaxpref.runtime.processes import broadcast_text
from jaxpref.runtime.provenance import Content
from jaxpref.runtime.saved_optimizer import SavedOptimizer
from jaxpref.scoring.moving_reference import NAME as MOVING
from jaxpref.scoring.reference import Reference


def contents(
    start: Weights,
    reference: Reference | None,
    models: Mapping[str, Weights],
    datasets: Datasets,
    optimizer: SavedOptimizer | None = None,
) -> dict[str, Content]:
    """The models and the pairs of a run, by name for messages.

    The pairs are those that a run sees, so the format of the file does not matter.
    All processes must call this; the first one reads the models.

    Args:
      start: the initial weights.
      reference: the reference, or None.
      models: other frozen models, by name.
      datasets: the records.
      optimizer: the optimizer's state before training; None for a new one.
    """
    read = {"model": start, **models}
    if reference is not None:
        read[REFERENCE] = reference.weights
    digests = {}
    if jax.process_index() == 0:
        for name, weights in read.items():
            digests[name] = model_digests(weights.folder)
            if weights.adapter is not None:
                digests[name]["adapter"] = adapter_digest(weights.adapter)
            if weights.saved is not None:
                digests[name]["checkpoint"] = weights.saved.digest
        # They decide where answers end, and are exported.
        digests["model"]["stop tokens"] = str(sorted(read_stop_tokens(start.folder)))
    digests = json.loads(broadcast_text(json.dumps(digests)))
    found = {
        f"the {part} of the {name}": Content(digest, str(read[name].folder))
        for name, parts in digests.items()
        for part, digest in parts.items()
        # Every model reads the tokens of the trained one.
        if name == "model" or part != "tokenizer"
    }
    if reference is not None and reference.name == MOVING:
        found["how the reference moves"] = Content(MOVING, f"--reference {MOVING}")
    if optimizer is not None:
        found["the optimizer's state before training"] = optimizer.content
    splits = datasets.splits
    sets = {
        "the training pairs": (splits.train, datasets.train_sources),
        "the held-out pairs": (splits.heldout, datasets.heldout_sources),
    }
    for name, (dataset, sources) in sets.items():
        text = dataset.digest() + json.dumps(dataset.annotator_names)
        digest = hashlib.sha256(text.encode()).hexdigest()
        found[name] = Content(digest, " and ".join(sources))
    return found
