"""Ten steps of training on a random model of every family, and its export."""

import jax
import numpy as np
import pytest

from jaxpref import losses
from jaxpref.data import DataOptions, MixOptions
from jaxpref.models import RewardModel, build
from jaxpref.models.folder import load_params, save
from jaxpref.models.folder_config import read_architecture
from jaxpref.models.lora import LoraOptions, adapted_paths
from jaxpref.models.low_rank import LowRank
from jaxpref.models.partition import ROUTER
from jaxpref.models.paths import by_path
from jaxpref.models.weights import Weights, load_weights
from jaxpref.objectives import bvpo, em, from_loss
from jaxpref.train import OptimizerConfig, TrainConfig, read_metrics, run
from tests.family_cases import CASES, architecture_of, random_params
from tests.test_bvpo_training import write_records
from tests.tiny import make_pairs_file, make_tokenizer

OBJECTIVES = {
    "rdpo": from_loss(losses.rdpo, flip_rate=0.2),
    "em": em(losses.dpo),
    "bvpo": bvpo(from_loss(losses.dpo)),
    "bradley_terry": from_loss(losses.bradley_terry),
}
FIRST = [case for case in CASES if " " not in case]


def make_folder(case, folder):
    folder.mkdir()
    make_tokenizer(folder)
    model = build(architecture_of(case))
    save(folder, model, random_params(model))
    return folder


def ten_steps(case, name, tmp_path, **options):
    """The model's folder, and which parameters of the export differ from it."""
    folder = make_folder(case, tmp_path / "model")
    path = tmp_path / "pairs.jsonl"
    if name == "bvpo":
        data = write_records(path, 80, traces=True)
    else:
        data = make_pairs_file(path, 80)
    run(
        TrainConfig(
            model=str(folder),
            data=str(data),
            out=str(tmp_path / "run"),
            objective=OBJECTIVES[name],
            mix=MixOptions() if name == "bvpo" else None,
            max_steps=10,
            batch_size=8,
            log_every=1,
            options=DataOptions(max_length=64),
            optimizer=OptimizerConfig(learning_rate=1e-2),
            **options,
        )
    )
    steps = [x for x in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in x]
    assert len(steps) == 10 and all(np.isfinite(x["loss"]) for x in steps)
    kind = RewardModel if name == "bradley_terry" else build
    model = kind(architecture_of(case))
    params = load_params(tmp_path / "run" / "export", model)
    before = load_params(folder, model, jax.random.key(0))
    moved = by_path(jax.tree.map(lambda a, b: bool((a != b).any()), params, before))
    return folder, moved


@pytest.mark.parametrize(
    "case, name",
    [
        pytest.param(
            case,
            name,
            marks=() if (case, name) == ("gemma3", "rdpo") else pytest.mark.slow,
        )
        for case in FIRST
        for name in OBJECTIVES
    ],
)
def test_ten_steps(case, name, tmp_path):
    _, moved = ten_steps(case, name, tmp_path)
    exported = tmp_path / "run" / "export"
    assert read_architecture(exported) == architecture_of(case)
    router = {ROUTER: False} if ROUTER in moved else {}
    if name == "bradley_terry":
        moved.pop("norm_bias", None)  # adds the same to both rewards
    assert moved == dict.fromkeys(moved, True) | router


LORA = {"rdpo": {}, "em": {"base": "nf4"}, "bvpo": {"dora": True}}
"""Kinds of adapters, one for each objective."""


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("case", FIRST)
def test_ten_steps_of_adapters(case, name, tmp_path):
    """The export differs where there are adapters, and a reward model in its head."""
    family = architecture_of(case).family
    targets = "attention" if ROUTER in family.tensors else "all"
    options = LoraOptions(rank=2, targets=targets, **LORA.get(name, {}))
    folder, moved = ten_steps(case, name, tmp_path, lora=options)
    adapted = {*adapted_paths(targets, family), "score"}
    assert moved == {path: path in adapted for path in moved}
    weights = Weights(folder, tmp_path / "run" / "adapter")
    kind = RewardModel if name == "bradley_terry" else build
    model = kind(architecture_of(case))
    joined = load_weights(weights, model)
    assert {*adapted} & {*moved} == {
        path
        for path in moved
        if isinstance(dict_at(joined, path), LowRank) or path == "score"
    }


def dict_at(tree, path):
    """What is at a path of nested dicts."""
    for name in path.split("."):
        tree = tree[name]
    return tree
