"""Adapters and soft prompts of reward models with every head: stored and read back."""

import json

import jax
import numpy as np
import pytest

from jaxpref.data import RecordOptions, open_source
from jaxpref.errors import InputError
from jaxpref.evaluate.evaluation import run as evaluate
from jaxpref.evaluate.pairs import EvaluateConfig
from jaxpref.models import RewardModel, build
from jaxpref.models.folder import save
from jaxpref.models.folder_config import HEAD_FILE
from jaxpref.models.lora import LoraOptions
from jaxpref.models.paths import by_path
from jaxpref.models.reward import reward_model
from jaxpref.models.reward_head import Head
from jaxpref.models.tensor_files import open_file
from jaxpref.models.weights import (
    Weights,
    head_of,
    is_reward,
    load_weights,
    model_or_adapter,
)
from jaxpref.rewards.answered import read_answered
from jaxpref.rewards.models import ModelOptions, attribute_reward, model_reward
from jaxpref.scoring import make_scorer
from jaxpref.scoring.partition import Trained
from jaxpref.scoring.scorer import ExportOptions
from tests.tiny import (
    make_model_folder,
    make_pairs_file,
    tiny_config,
    tiny_params,
)

HEADS = {
    "reward": Head(),
    "mlp": Head("mlp"),
    "rating": Head(attributes=("helpful",)),
    "ratings": Head(attributes=("helpful", "short")),
    "mlp of ratings": Head("mlp", ("helpful", "short")),
    "embedding": Head(embedding=4, temperature=0.1),
    "mlp of an embedding": Head("mlp", embedding=4, temperature=0.5),
}
WAYS = {
    "adapters": {"lora": LoraOptions(rank=2, targets="attention")},
    "soft prompt": {"soft_prompt": (5, 6, 7)},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A language model's folder, without a head."""
    folder = tmp_path_factory.mktemp("base")
    model = build(tiny_config())
    save(folder, model, tiny_params(model))
    return folder


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", HEADS)
def test_what_is_trained_is_read_back(name, way, base, tmp_path):
    head, model = HEADS[name], RewardModel(tiny_config(), head=HEADS[name])
    trained = Trained(start=Weights(base), **WAYS[way])
    scorer = make_scorer(model, frozenset({head.score}), trained=trained)
    start = scorer.load(base, jax.random.key(0))
    # The head is trained in full, and from the start of a language model it is new.
    assert set(head.paths) <= by_path(start).keys()
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype("f"), start)
    scorer.export(params, tmp_path / "export", ExportOptions(base, str(base)))
    weights = Weights(base, tmp_path / "adapter")
    assert is_reward(weights) and head_of(weights) == head
    # Also for the plain head: the folder may hold the description of another.
    assert (tmp_path / "adapter" / HEAD_FILE).exists()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    # As `peft` names a head, which may be a `Sequential`.
    assert config["modules_to_save"] == ["score"]
    stored = set(open_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    own = {x for x in stored if "score" in x}
    assert len(own) == len(head.paths) and all(x.endswith("weight") for x in own)

    found = load_weights(weights, model)
    expected = scorer.partition.join(params, scorer.load_frozen(base, {})["base"])
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    if way == "adapters":  # and the whole model
        assert reward_model(tmp_path / "export") == model
        merged = load_weights(Weights(tmp_path / "export"), model)
        for path in head.paths:
            np.testing.assert_array_equal(merged[path], params[path])
    # Training can start from it.
    again = make_scorer(
        model, frozenset({head.score}), trained=Trained(start=weights)
    ).load(base, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, again, params)


@pytest.mark.parametrize("way", WAYS)
def test_rewards_of_an_adapters_folder(way, tmp_path):
    """On the base that it names, as `jaxpref evaluate` scores the same answers."""
    base = make_model_folder(tmp_path / "base")
    head = HEADS["mlp of ratings"]
    model = RewardModel(tiny_config(), head=head)
    trained = Trained(start=Weights(base), **WAYS[way])
    scorer = make_scorer(model, frozenset({"attributes"}), trained=trained)
    start = scorer.load(base, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1, start)
    scorer.export(params, tmp_path / "export", ExportOptions(base, str(base)))
    pairs = make_pairs_file(tmp_path / "pairs.jsonl", 3)
    options = dict(data=str(pairs), out=str(tmp_path / "eval"), max_length=32)
    asked = dict(attribute_weights=("short=2",), adapter=str(tmp_path / "adapter"))
    evaluate(EvaluateConfig(model=str(base), **options, **asked))
    lines = (tmp_path / "eval" / "eval_pairs.jsonl").read_text().splitlines()
    margins = [json.loads(line)["margin"] for line in lines]
    models = ModelOptions(batch_size=4, max_length=32)
    reward = attribute_reward("short", str(tmp_path / "adapter"), models)
    found = reward(read_answered(open_source(str(pairs)), RecordOptions()))
    ours = [2 * (chosen - rejected) for chosen, rejected in found]
    np.testing.assert_allclose(ours, margins, rtol=1e-3, atol=1e-5)
    assert np.abs(margins).min() > 0
    with pytest.raises(InputError, match="predicts ratings of helpful, short; name"):
        model_reward(str(tmp_path / "adapter"), models)
    path = tmp_path / "adapter" / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"base_model_name_or_path": None}))
    with pytest.raises(InputError, match="base_model_name_or_path is None; write the"):
        model_reward(str(tmp_path / "adapter"), models)


@pytest.mark.parametrize("name", HEADS)
def test_an_adapter_that_names_no_head_has_the_bases(name, base, tmp_path):
    model = RewardModel(tiny_config(), head=HEADS[name])
    save(tmp_path / "base", model, tiny_params(model))
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "task_type": "SEQ_CLS"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    weights = Weights(tmp_path / "base", tmp_path / "adapter")
    assert is_reward(weights) and head_of(weights) == HEADS[name]
    assert head_of(Weights(base, tmp_path / "adapter")) == Head()


def test_a_folder_is_a_model_or_an_adapter(base, tmp_path):
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": str(base)}))
    # Some tools store the base's config.json beside the adapter.
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    assert model_or_adapter(str(tmp_path)) == Weights(base, tmp_path)
    assert model_or_adapter(str(base)) == Weights(base)
    (tmp_path / "model.safetensors").write_bytes(b"")
    words = r"holds a model \(model.safetensors\) and an adapter \(adapter_config.json"
    with pytest.raises(InputError, match=words):
        model_or_adapter(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    config.write_text(json.dumps({"base_model_name_or_path": "./gone"}))
    words = "adapter_config.json: field base_model_name_or_path: ./gone: no such folder"
    with pytest.raises(InputError, match=words):
        model_or_adapter(str(tmp_path))


def test_a_head_that_is_described_wrongly_is_refused(base, tmp_path):
    model = RewardModel(tiny_config(), head=HEADS["mlp"])
    trained = Trained(start=Weights(base), **WAYS["adapters"])
    scorer = make_scorer(model, frozenset({"rewards"}), trained=trained)
    params = scorer.load(base, jax.random.key(0))
    scorer.export(params, tmp_path / "export", ExportOptions(base, str(base)))
    weights = Weights(base, tmp_path / "adapter")
    path = tmp_path / "adapter" / HEAD_FILE
    path.write_text(json.dumps({"reward_head": {"layers": "conv"}}))
    with pytest.raises(InputError, match=f"{HEAD_FILE}.*layers is 'conv'; use linear"):
        head_of(weights)
    path.unlink()
    with pytest.raises(InputError, match=r"score.0.weight is not the adapter of a mat"):
        load_weights(weights, RewardModel(tiny_config(), head=head_of(weights)))
